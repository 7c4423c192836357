"""Scoring in processes that can be killed: order, failures, timeouts, coroutines, and nothing left behind."""

import asyncio
import importlib
import linecache
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading

import pytest

from tensafe_nb.errors import ClientClosedError, RewardError, ValidationError
from tensafe_nb.rlvr import rescore, resolve_reward
from tensafe_nb.rlvr.rewards.reward import Part
from tensafe_nb.rlvr.scoring.scorer import Scorer, score
from tensafe_nb.rlvr.watch.preview import preview_reward
from tests.unit.rlvr.functions import batch_of, length, make_awkward, rollouts

SOON = 2.5  # seconds after which a call that hangs is given up: on a busy machine the others are done by then
SOONER = 0.5  # where the others only have to be called, in this process


def is_alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def process_id(prompt, response, meta=None):
    return float(os.getpid())


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tsnb-")]


def test_results_come_in_order_from_a_function_defined_in_a_cell():
    scale = 2
    with Scorer(lambda prompt, response: scale * len(response), processes=2) as scorer:
        for _ in range(2):
            trajectories = rollouts(*("x" * n for n in range(50)))
            report = scorer.score(trajectories)
            assert [t.reward for t in trajectories] == [2.0 * n for n in range(50)]
    assert (report.scored, report.errors, report.timeouts, report.abstained) == (50, 0, 0, 0)


def test_an_error_of_a_reward_shows_its_line_in_the_cell_where_it_was_written(monkeypatch):
    name, cell = "<ipython-input-3-cell>", "def score(prompt, response):\n    return 1 / 0\n"
    monkeypatch.setitem(linecache.cache, name, (len(cell), None, cell.splitlines(keepends=True), name))
    space = {"__name__": "__main__"}
    exec(compile(cell, name, "exec"), space)
    trajectories = rollouts("a")
    with Scorer(space["score"], processes=1) as scorer:
        scorer.score(trajectories)
    assert trajectories[0].reward_error == (
        "ZeroDivisionError: division by zero (line 2 of score: return 1 / 0)"
    )


def test_whatever_goes_wrong_the_others_are_scored_and_no_score_is_invented():
    awkward = make_awkward()
    trajectories = rollouts("ok", "raise", "hang", "none", "exit", "nan", "die", "text", "fine")
    with Scorer(awkward, timeout=SOON, processes=2) as scorer:
        report = scorer.score(trajectories)
    found = {t.response: (t.reward, t.reward_error) for t in trajectories}
    assert found == {
        "ok": (2.0, None),
        "raise": (None, "KeyError: 'missing' (line 4 of awkward: return {}[\"missing\"])"),
        "hang": (None, f"took longer than {SOON} s and was ended"),
        "none": (None, None),
        "exit": (None, "SystemExit: 3 (line 6 of awkward: raise SystemExit(3))"),
        "nan": (None, "returned 'nan', expected a finite number or None"),
        "die": (None, "the process that scores ended during this call"),
        "text": (None, "returned '1.0', expected a finite number or None"),
        "fine": (4.0, None),
    }
    assert (report.scored, report.abstained, report.errors, report.timeouts) == (2, 1, 6, 1)
    assert report.metrics == pytest.approx(
        {
            "rewards/awkward/mean": 3.0,
            "rewards/awkward/std": math.sqrt(2),
            "rewards/awkward/errors": 6,
            "rewards/awkward/timeouts": 1,
        }
    )


def test_a_regular_expression_that_never_ends_is_ended_though_it_holds_the_interpreter():
    trajectories = rollouts("a" * 40 + "b", "aaa")
    with Scorer(resolve_reward("regex", pattern="(a+)+$", full=True), timeout=SOON, processes=1) as scorer:
        scorer.score(trajectories)
    assert [t.reward for t in trajectories] == [None, 1.0]


@pytest.mark.parametrize("given", [None, [1], "a text"])
def test_what_is_no_list_of_rollouts_is_refused(given):
    with Scorer(length) as scorer, pytest.raises(ValidationError, match="score: trajectories are rollouts"):
        scorer.score(given)


def test_code_whose_scoring_process_is_killed_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started = tmp_path / "started"
    endless = resolve_reward("python_code", tests="pass", timeout=100.0)
    trajectories = rollouts(f"open({str(started)!r}, 'w').close()\nwhile True: pass")
    with Scorer(endless, timeout=SOONER, processes=1) as scorer:
        scorer.score(trajectories)
    assert trajectories[0].reward_error == f"took longer than {SOONER} s and was ended"
    assert [path for path in tmp_path.iterdir() if path != started] == []


def test_a_function_that_only_hangs_or_dies_is_given_up_before_all_have_had_their_turn():
    calls = rollouts(*["die"] * 40)
    with Scorer(make_awkward(), processes=2) as scorer:
        report = scorer.score(calls)
    texts = [t.reward_error for t in calls]
    assert report.errors == 40
    assert sum("ended during this call" in text and "not called" not in text for text in texts) < 40
    assert re.match(r"not called: \d+ calls in a row were lost", texts[-1])


def test_processes_start_with_the_first_rollouts_stay_and_are_gone_after_close():
    trajectories, processes = rollouts(*"abcd"), set()
    with Scorer(process_id, processes=2) as scorer:
        assert ours() == []
        for _ in range(3):
            scorer.score(trajectories)
            processes |= {t.reward for t in trajectories}
        assert 1 <= len(processes) <= 2
        assert os.getpid() not in processes
        assert all(map(is_alive, processes))
    scorer.close()
    assert not any(map(is_alive, processes))
    assert ours() == []
    with pytest.raises(ClientClosedError, match="Make a new Scorer"):
        scorer.score(trajectories)


def test_a_process_that_became_ready_after_its_round_serves_the_next_also_another_function():
    parts = [Part(process_id, name="first"), Part(process_id, name="second")]
    with Scorer(resolve_reward("composite", parts=parts), processes=2) as scorer:
        for _ in range(5):
            assert scorer.score(rollouts(*"ab")).errors == 0


def test_a_process_that_ended_between_two_rounds_costs_nothing():
    import signal

    trajectories = rollouts("a")
    with Scorer(process_id, processes=1) as scorer:
        scorer.score(trajectories)
        before = trajectories[0].reward
        [worker] = scorer._pool._workers.values()
        os.kill(int(before), signal.SIGTERM)
        worker.link._process.wait()
        worker.link._reader.join()
        report = scorer.score(trajectories)
    assert report.errors == 0
    assert trajectories[0].reward != before


def test_a_process_outlasts_the_thread_in_which_it_was_first_asked_for():
    with Scorer(process_id, processes=1) as scorer:
        seen = []
        for _ in range(3):
            trajectories = rollouts("a")
            thread = threading.Thread(target=scorer.score, args=(trajectories,))
            thread.start()
            thread.join()
            seen.append(trajectories[0].reward)
    assert len(set(seen)) == 1
    assert seen[0] is not None


KERNEL = """
import sys
from tensafe_nb.rlvr import Trajectory
from tensafe_nb.rlvr.scoring.scorer import Scorer

def greedy(prompt, response, meta=None):
    import os, re
    os.write(2, b"here\\n")
    return float(bool(re.match("(a+)+b", "a" * 60)))  # holds the interpreter, for ever

Scorer(greedy, timeout=3600, processes=1).score([Trajectory("q", "a")])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process that holds Python's lock")
def test_a_process_ends_with_the_kernel_whatever_it_executes():
    import select

    kernel = subprocess.Popen([sys.executable, "-c", KERNEL], stderr=subprocess.PIPE)
    assert kernel.stderr.readline() == b"here\n"
    kernel.kill()
    kernel.wait()
    ended, _, _ = select.select([kernel.stderr], [], [], 60)  # its last holder is the process that scores
    assert ended, "the scoring process goes on"
    assert kernel.stderr.read() == b""
    kernel.stderr.close()


def test_built_ins_start_no_process():
    with Scorer("exact_match") as scorer:
        scorer.score(rollouts("7", answer="7"))
        assert ours() == []


def test_closing_from_another_thread_ends_a_round_under_way(tmp_path):
    reached = tmp_path / "reached"
    os.mkfifo(reached)

    def hang(prompt, response, meta=None):
        with open(meta["reached"], "w") as fifo:  # noqa: PTH123  # runs elsewhere
            fifo.write("here")
        while True:
            pass

    scorer, raised = Scorer(hang, timeout=60, processes=1), []

    def drive():
        try:
            scorer.score(rollouts("a", reached=str(reached)))
        except ClientClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=drive)
    thread.start()
    assert reached.read_text() == "here"
    scorer.close()
    thread.join()
    assert len(raised) == 1


def test_a_function_that_cannot_be_pickled_runs_in_a_thread_and_says_so():
    lock, never = threading.Lock(), threading.Event()

    def locked(prompt, response, meta=None):
        with lock:
            if response == "hang":
                never.wait()
            return float(len(response))

    with pytest.warns(
        UserWarning, match=r"'locked' cannot be sent to another process .*lock.* cannot be ended"
    ):
        scorer = Scorer(locked, timeout=SOONER)
    trajectories = rollouts("ok", "hang")
    report = scorer.score(trajectories)
    assert (report.scored, report.timeouts) == (1, 1)
    assert trajectories[0].reward == 2.0
    never.set()
    scorer.score(rollouts("a", "bc"))
    scorer.close()


def test_a_function_whose_module_is_of_this_process_only_is_sent_with_it(monkeypatch):
    import types

    module = types.ModuleType("of_this_process_only")
    exec("def reward(prompt, response, meta=None):\n    return 5.0", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    trajectories = rollouts("a")
    with Scorer(module.reward, processes=1) as scorer:
        scorer.score(trajectories)
        assert scorer._threads._workers == {}
    assert trajectories[0].reward == 5.0


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Return the folder of a module whose reward uses another one, also by an import inside the function."""
    (tmp_path / "scoring_low.py").write_text("FACTOR = 1.0\n\nclass Row:\n    value = 1.0\n")
    (tmp_path / "scoring_late.py").write_text("BONUS = 10.0\n")
    (tmp_path / "scoring_top.py").write_text(
        "import scoring_low\n\n"
        "def reward(prompt, response, meta=None):\n"
        "    import scoring_late\n"
        "    if response == 'hang':\n"
        "        while True:\n"
        "            pass\n"
        "    row = meta.get('row')\n"
        "    bonus = isinstance(row, scoring_low.Row) if row else 0\n"
        "    return scoring_low.FACTOR * len(response) + scoring_late.BONUS + bonus\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("scoring_low", "scoring_late", "scoring_top"):
        sys.modules.pop(name, None)


def test_a_module_edited_on_the_disk_changes_no_score_whatever_process_is_started(edited):
    module = importlib.import_module("scoring_top")
    with Scorer(module.reward, timeout=0.5, processes=1) as scorer:
        before = scorer.score(rollouts("abc"))
        for name in ("scoring_low", "scoring_late", "scoring_top"):
            (edited / f"{name}.py").write_text("raise RuntimeError('half written')")
        hanging = rollouts("hang", "abc")
        scorer.score(hanging)
        after = rollouts("abc")
        report = scorer.score(after)
    assert [t.reward for t in (hanging[1], *after)] == [13.0, 13.0]
    assert hanging[0].reward_error == "took longer than 0.5 s and was ended"
    assert before.version == report.version
    assert "partial" not in report.version


def test_a_helper_that_is_reloaded_scores_from_the_next_round_on_under_its_own_version(edited):
    module = importlib.import_module("scoring_top")
    with Scorer(module.reward, processes=1) as scorer:
        before, again, after = rollouts("abc"), rollouts("abc"), rollouts("abc")
        scorer.score(before)
        scorer.score(again)
        (edited / "scoring_low.py").write_text("FACTOR = 200.0\n")
        importlib.invalidate_caches()
        importlib.reload(sys.modules["scoring_low"])
        report = scorer.score(after)
    assert [t.reward for t in (*before, *again, *after)] == [13.0, 13.0, 610.0]
    assert before[0].reward_version == again[0].reward_version != after[0].reward_version == report.version
    assert report.version == resolve_reward(module.reward).version


def test_objects_in_columns_are_of_the_class_that_the_function_knows(edited):
    module = importlib.import_module("scoring_top")
    trajectories = rollouts("a", row=sys.modules["scoring_low"].Row())
    with Scorer(module.reward, processes=1) as scorer:
        scorer.score(trajectories)
    assert trajectories[0].reward == 12.0


def test_a_variable_that_a_function_reads_is_the_notebooks_at_every_round():
    variables = {"__name__": "__main__", "LIMIT": 2}
    exec("def reward(prompt, response, meta=None):\n    return float(len(response) > LIMIT)", variables)
    with Scorer(variables["reward"], processes=1) as scorer:
        first, second = rollouts("abc"), rollouts("abc")
        scorer.score(first)
        variables["LIMIT"] = 5
        scorer.score(second)
    assert (first[0].reward, second[0].reward) == (1.0, 0.0)
    assert first[0].reward_version != second[0].reward_version


def test_what_a_function_of_this_process_keeps_for_itself_makes_no_new_version():
    variables = {"__name__": "__main__"}
    exec(
        "CACHE = {}\ndef shift(n):\n    return n\n"
        "async def judge(prompt, response, meta=None):\n"
        "    return CACHE.setdefault(response, shift(len(response)))",
        variables,
    )
    with Scorer(variables["judge"]) as scorer:
        versions = [scorer.score(rollouts(text)).version for text in ("a", "bb", "ccc")]
        exec("def shift(n):\n    return n + 1", variables)
        last = rollouts("dddd")
        changed = scorer.score(last).version
    assert len(set(versions)) == 1
    assert changed != versions[0]
    assert last[0].reward == 5.0


def test_two_functions_that_cannot_be_sent_are_each_called_themselves():
    lock = threading.Lock()

    def one(prompt, response):
        return 1.0 + lock.locked()

    def two(prompt, response):
        return 2.0 + lock.locked()

    with pytest.warns(UserWarning, match="cannot be sent"):
        scorer = Scorer({"one": one, "two": two})
    trajectories = rollouts("a")
    with scorer:
        scorer.score(trajectories)
    assert trajectories[0].reward_parts == {"one": 1.0, "two": 2.0}


def test_columns_that_cannot_be_sent_leave_their_rollouts_unscored():
    with Scorer(length, processes=1) as scorer:
        trajectories = rollouts("a", lock=threading.Lock())
        scorer.score(trajectories)
        assert trajectories[0].reward is None
        assert "the prompt's columns cannot be sent" in trajectories[0].reward_error
        again = rollouts("abc")
        scorer.score(again)
        assert again[0].reward == 3.0


def test_a_batch_function_is_called_once_with_everything():
    def relative(completions, answer, **columns):
        longest = max(map(len, completions))
        return [len(text) / longest for text in completions]

    trajectories = rollouts("a", "bb", "cccc", answer="x")
    with Scorer(relative) as scorer:
        scorer.score(trajectories)
    assert [t.reward for t in trajectories] == [0.25, 0.5, 1.0]


def test_coroutines_are_awaited_together_and_one_that_takes_too_long_is_cancelled():
    together = threading.Barrier(1)  # cannot be pickled: coroutines stay in this process
    waiting, all_wait = [], asyncio.Event()

    async def judge(prompt, response, meta=None):
        waiting.append(response)
        if len(waiting) == 3:
            all_wait.set()
        await all_wait.wait()
        if response == "hang":
            await asyncio.Event().wait()
        if response == "raise":
            raise ValueError("no verdict")
        return together.parties * len(response)

    trajectories = rollouts("ok", "hang", "raise")
    with Scorer(judge, timeout=SOONER) as scorer:
        report = scorer.score(trajectories)
        scorer.score(rollouts("again"))
    assert [t.reward for t in trajectories] == [2.0, None, None]
    assert trajectories[1].reward_error == f"took longer than {SOONER} s and was cancelled"
    assert (
        trajectories[2].reward_error
        == 'ValueError: no verdict (line 9 of judge: raise ValueError("no verdict"))'
    )
    assert (report.errors, report.timeouts) == (2, 1)


def test_what_a_judge_holds_may_be_used_by_one_scorer_after_the_other_and_by_hand():
    gate = asyncio.Semaphore(1)

    async def judge(prompt, response, meta=None):
        async with gate:
            await asyncio.sleep(0)
            return float(len(response))

    assert resolve_reward(judge)("q", "a") == 1.0
    for _ in range(2):
        with Scorer(judge) as scorer:
            assert scorer.score(rollouts("a", "bb", "ccc")).errors == 0
    preview = preview_reward(judge, batch_of(["a", "bb"]))
    assert preview.report.errors == 0
    assert resolve_reward(judge)("q", "ab") == 2.0


def test_an_async_reward_may_call_another_one_by_hand():
    async def inner(prompt, response):
        return 1.0

    async def outer(prompt, response):
        return 1.0 + resolve_reward(inner)(prompt, response)

    assert resolve_reward(outer)("q", "a") == 2.0


def test_a_coroutine_that_blocks_its_loop_is_left_behind():
    release = threading.Event()

    async def blocks(prompt, response, meta=None):
        if response == "block":
            release.wait()
        return 1.0

    trajectories = rollouts("block", "other")
    with Scorer(blocks, timeout=SOONER) as scorer:
        report = scorer.score(trajectories)
        assert "it must await, not wait" in trajectories[0].reward_error
        assert report.timeouts == 2
        release.set()
        assert scorer.score(rollouts("fine")).scored == 1


def test_a_composite_reports_each_part_and_fills_in_the_trajectory():
    parts = [Part("exact_match", 1.0), Part(make_awkward(), 0.0, "judge", true=True)]
    reward = resolve_reward("composite", parts=parts)
    trajectories = rollouts("7", "raise", answer="7")
    with Scorer(reward, processes=1) as scorer:
        report = scorer.score(trajectories)
    assert [t.reward for t in trajectories] == [1.0, 0.0]
    assert trajectories[0].reward_parts == {"exact_match": 1.0, "judge": 1.0}
    assert (
        trajectories[1].reward_error
        == "judge: KeyError: 'missing' (line 4 of awkward: return {}[\"missing\"])"
    )
    assert trajectories[0].reward_version == reward.version == report.version
    assert report.metrics["rewards/exact_match/mean"] == 0.5
    assert report.metrics["rewards/judge/errors"] == 1
    assert report.metrics["rewards/true"] == 1.0


def test_composites_within_composites_are_named_by_their_path():
    inner = resolve_reward("composite", parts=[Part(lambda p, r: {"score": 1.0, "acc": 0.5}, name="deep")])
    reward = resolve_reward("composite", parts=[Part(inner, 2.0, "inner"), Part(length, name="length")])
    trajectories = rollouts("abc")
    with Scorer(reward, processes=1) as scorer:
        report = scorer.score(trajectories)
    assert trajectories[0].reward == 5.0
    assert set(report.functions) == {"inner/deep", "inner/deep/acc", "length"}
    assert trajectories[0].reward_parts["inner/deep"] == 1.0


def test_nothing_to_score_is_no_trouble():
    for reward in (length, "exact_match", lambda completions, **columns: []):
        with Scorer(reward) as scorer:
            assert scorer.score([]).scored == 0


@pytest.mark.parametrize("kwargs", [{"timeout": 0}, {"timeout": -1.0}, {"processes": 0}])
def test_settings_that_cannot_work_are_refused(kwargs):
    with pytest.raises(ValidationError, match="Scorer: "):
        Scorer("exact_match", **kwargs)


def test_a_process_that_cannot_be_started_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with Scorer(length) as scorer, pytest.raises(RewardError, match="/no/such/python"):
        scorer.score(rollouts("a"))


def test_scoring_here_and_scoring_elsewhere_agree():
    here, elsewhere = (rollouts("ok", "raise", "none", "fine") for _ in range(2))
    report = score(here, resolve_reward(make_awkward()))
    with Scorer(make_awkward(), processes=2) as scorer:
        other = scorer.score(elsewhere)
    assert [(t.reward, t.reward_error) for t in here] == [(t.reward, t.reward_error) for t in elsewhere]
    assert report.metrics == other.metrics


SCRIPT = """
import sys, threading
from tensafe_nb.rlvr import Trajectory
from tensafe_nb.rlvr.scoring.scorer import Scorer

print("the script runs")
LIMIT = 3

def helper(text):
    return len(text) > LIMIT

def reward(prompt, response, meta=None):
    import sys
    assert "torch" not in sys.modules
    return float(helper(response))

rollouts = [Trajectory("q", text) for text in ("ab", "abcd")]

def drive():
    with Scorer(reward, processes=2) as scorer:
        print(scorer.score(rollouts).errors, [t.reward for t in rollouts])

thread = threading.Thread(target=drive)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("how", ["-c", "stdin", "file"])
def test_it_works_without_an_importable_main_and_never_runs_the_script_again(how, tmp_path):
    file = tmp_path / "script.py"  # no guard by __name__: multiprocessing would run it in each process
    file.write_text(textwrap.dedent(SCRIPT))
    command = {"-c": ["-c", SCRIPT], "stdin": ["-"], "file": [str(file)]}[how]
    given = SCRIPT if how == "stdin" else None
    ran = subprocess.run([sys.executable, *command], input=given, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n") == ["the script runs", "0 [0.0, 1.0]", ""]


def test_rescoring_returns_a_copy_and_leaves_the_batch_as_it_is():
    batch = batch_of(["a", "bb"], ["ccc", "dddd"])
    score(batch, resolve_reward(length))
    for trajectory in batch:
        trajectory.advantage = 1.0
    again = rescore(batch, lambda prompt, response: -len(response))
    assert [t.reward for t in again] == [-1.0, -2.0, -3.0, -4.0]
    assert [t.advantage for t in again] == [None] * 4
    assert [t.reward for t in batch] == [1.0, 2.0, 3.0, 4.0]
    assert [group.prompt_id for group in again.groups] == ["p0", "p1"]
    assert again[0].reward_version != batch[0].reward_version
