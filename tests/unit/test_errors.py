"""Errors as people read them in IPython: their own lines, and the message."""

import atexit
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.history import HistoryManager
from IPython.core.interactiveshell import InteractiveShell

import tensafe_nb as tn
from tensafe_nb.errors import TGTinkerError, error_of_code, short_traceback

Cell = Callable[[str], str]
LOSS = "def broken(outputs, batch):\n    nothing = 0\n    return 1 / nothing"


@pytest.fixture(scope="module")
def shell() -> Iterator[InteractiveShell]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HistoryManager, "enabled", False)
        shell = InteractiveShell.instance(user_module=types.ModuleType("cells"), colors="nocolor")
    yield shell
    shell.atexit_operations()
    atexit.unregister(shell.atexit_operations)
    InteractiveShell.clear_instance()


@pytest.fixture
def cell(
    shell: InteractiveShell, tc: tn.TrainingClient, capsys: pytest.CaptureFixture[str]
) -> Iterator[Cell]:
    """Run a cell; return what it prints."""
    tn.full_tracebacks(False)
    shell.push({"tn": tn, "tc": tc})

    def run(code: str) -> str:
        capsys.readouterr()
        shell.run_cell(code)
        return capsys.readouterr().out

    yield run
    tn.full_tracebacks(False)
    shell.reset(new_session=False)


def frames(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith(("Cell In", "File "))]


def test_an_error_shows_the_users_own_lines_and_the_message(cell: Cell) -> None:
    printed = cell("def prepare():\n    return tn.OptimizerConfig(learning_rat=1)\nprepare()")
    assert frames(printed) == ["Cell In[1], line 3", "Cell In[1], line 2, in prepare()"]
    assert "more of tensafe_nb: tn.full_tracebacks() shows all]" in printed
    assert printed.strip().endswith("Did you mean 'learning_rate'?")
    assert len(printed.splitlines()) < 20


@pytest.mark.parametrize(
    "wrong", ["tc.fit([], step=1)", "tn.rlvr.RLVRTrainer(tc, max_tokens=4)", "tn.load_runs"]
)
def test_a_misspelt_name_shows_the_users_line_and_the_nearest(cell: Cell, wrong: str) -> None:
    printed = cell(wrong)
    own, *others = frames(printed)
    assert own == "Cell In[1], line 1" and len(others) == 1  # IPython never hides the last
    assert "During handling" not in printed
    assert "Did you mean" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    "wait", ["await handle", "handle.result()", "handle.loss", "import asyncio\nawait asyncio.gather(handle)"]
)
def test_awaited_or_blocked_on_a_failed_handle_shows_the_users_lines_and_those_of_their_function(
    cell: Cell, wait: str
) -> None:
    cell(LOSS)
    printed = cell(f"handle = tc.forward_backward({{'input_ids': [[5, 6, 7]]}}, loss_fn=broken)\n{wait}")
    assert [frame.partition(", in ")[2] for frame in frames(printed)] == ["", "broken(…)"]
    assert "Caused by ZeroDivisionError: division by zero, raised in" in printed
    assert "----> 3     return 1 / nothing" in printed
    assert printed.strip().endswith(
        "FutureFailedError: The operation failed: ZeroDivisionError: division by zero"
    )


def test_a_run_that_fails_in_the_users_data_shows_where(cell: Cell) -> None:
    data = "def data():\n    yield tn.BatchData([[5, 6, 7]])\n    {}['tokens']"
    cell(data)
    printed = cell("run = tc.fit(data(), steps=3, show=False)\nawait run")
    assert [frame.partition(", in ")[2] for frame in frames(printed)] == ["", "data()"]
    assert "----> 3     {}['tokens']" in printed


def test_what_causes_an_error_is_named_in_a_line_unless_the_message_says_it(cell: Cell) -> None:
    printed = cell("raise tn.StorageError('full') from OSError(28, 'No space left')")
    assert "Caused by OSError: [Errno 28] No space left\n" in printed
    assert "Caused by" not in cell("raise tn.StorageError('OSError: disk') from OSError('disk')")
    assert "Caused by" not in cell("raise tn.ValidationError('Row 0: no x') from tn.ValidationError('no x')")
    twice = cell(
        "inner = OSError('gone')\ninner.__cause__ = ValueError('gone')\nraise tn.StorageError('no') from inner"
    )
    assert twice.count("Caused by") == 1
    printed = cell("try:\n    {}['x']\nexcept KeyError:\n    raise tn.ValidationError('no x')")
    assert "While handling KeyError: 'x', raised in" in printed
    assert "Caused by" not in cell(
        "try:\n    {}['x']\nexcept KeyError:\n    raise tn.ValidationError('no x') from None"
    )


def test_full_tracebacks_brings_the_rest_back_and_hides_it_again(cell: Cell) -> None:
    wrong = "tc.fit([], steps='ten')"
    assert len(frames(cell(wrong))) == 1
    everything = cell(f"tn.full_tracebacks()\n{wrong}")
    assert any("tensafe_nb/checks.py" in frame for frame in frames(everything))
    assert len(frames(cell(f"tn.full_tracebacks(False)\n{wrong}"))) == 1
    assert "True or False" in cell("tn.full_tracebacks('no')")


@pytest.mark.parametrize("mode", ["Plain", "Minimal", "Verbose"])
def test_every_mode_of_ipython_ends_with_the_message(cell: Cell, mode: str) -> None:
    cell(f"%xmode {mode}")
    printed = cell("tc.fit([], steps='ten')")
    cell("%xmode Context")
    assert "checks.py" not in printed
    assert printed.strip().endswith(
        "ValidationError: TrainingClient.fit: steps='ten' must be a whole number or None."
    )


def test_groups_and_errors_of_others_are_shown_as_ipython_shows_them(
    cell: Cell, shell: InteractiveShell
) -> None:
    foreign = cell("import json\njson.loads('{')")
    assert any("json/__init__.py" in frame for frame in frames(foreign))
    assert "more of tensafe_nb" not in foreign
    shell.run_cell("group = ExceptionGroup('two', [tn.ValidationError('a'), tn.ValidationError('b')])")
    with pytest.raises(ExceptionGroup):
        shell.run_cell("raise group").raise_error()


def test_an_error_keeps_its_frames_for_whoever_debugs_it(cell: Cell, shell: InteractiveShell) -> None:
    error = shell.run_cell("tc.fit([], steps='ten')").error_in_exec
    assert isinstance(error, TGTinkerError)
    trace, depth = error.__traceback__, 0
    while trace is not None:
        trace, depth = trace.tb_next, depth + 1
    assert depth > 2
    assert short_traceback(error) == short_traceback(error)


def test_a_plain_program_shows_what_python_shows_and_loads_no_ipython() -> None:
    code = (
        "import sys, tensafe_nb as tn\n"
        "try:\n    tn.OptimizerConfig(lr=1)\nfinally:\n    print('IPython' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n"
    assert "tensafe_nb/config.py" in done.stderr


@pytest.mark.parametrize("jedi", [False, True])
def test_tab_shows_what_there_is(cell: Cell, shell: InteractiveShell, jedi: bool) -> None:
    cell("service = tn.ServiceClient()")
    shell.Completer.use_jedi = jedi

    def completed(text: str) -> set[str]:
        with provisionalcompleter():
            return {found.text.lstrip(".") for found in shell.Completer.completions(text, len(text))}

    assert {name for name in tn.__all__ if not name.startswith("_")} == completed("tn.")
    assert {"Dashboard", "LossCurve"} <= completed("tn.widgets.")
    assert completed("service.create_training_client(gradient_a") == {"gradient_accumulation_steps="}
    assert completed("tc.sample('a', max_") >= {"max_new_tokens="}
    assert completed("tc.fit([], checkpoint") == {"checkpoint_every="}


@pytest.mark.parametrize(
    ("cls", "wrong", "right"),
    [
        (tn.TrainingRun, "metrics", r'It is run\.history\["loss"\]'),
        (tn.TrainingRun, "histroy", r"Did you mean 'history'\?"),
        (tn.TrainingClient, "train", r"It is tc\.fit\(batches, steps=…\)"),
        (tn.TrainingClient, "generate", r"It is tc\.sample\("),
        (tn.TrainingClient, "sampel", r"Did you mean 'sample'\?"),
        (tn.TrainingClient, "qqq", r"Press Tab behind the dot"),
        (tn.ServiceClient, "create_client", r"It is service\.create_training_client\("),
        (tn.ServiceClient, "list_artefacts", r"Did you mean 'list_artifacts'\?"),
    ],
)
def test_an_attribute_that_is_not_there_is_told_what_it_is_called_here(
    cls: type, wrong: str, right: str
) -> None:
    bare = object.__new__(cls)  # as an unpickler has it: nothing of it is read
    with pytest.raises(
        AttributeError, match=rf"^'{cls.__name__}' object has no attribute '{wrong}'\. ?{right}"
    ):
        getattr(bare, wrong)
    assert not hasattr(bare, wrong) and not hasattr(bare, "_repr_nothing_")
    with pytest.raises(AttributeError, match=r"'_wrong'$"):
        bare._wrong  # noqa: B018


@pytest.mark.parametrize("cls", [tn.TrainingRun, tn.TrainingClient, tn.ServiceClient])
def test_what_others_call_it_is_no_name_that_the_class_has_itself(cls: type) -> None:
    instead = vars(cls)["__getattr__"].instead
    assert instead and not set(instead) & set(dir(cls))


def test_a_code_means_the_class_that_has_it_and_no_class_below() -> None:
    class OfAnotherKind(tn.ValidationError):
        """Has its code from its base."""

    assert type(error_of_code("validation_error", "No.")) is tn.ValidationError
    assert type(error_of_code(OfAnotherKind("").code, "No.")) is tn.ValidationError
