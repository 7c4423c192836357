"""`tensafe-nb run`: trains from a file, says where the history is, and ends every failure with one message."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.cli import main as cli

ROWS = [
    {"prompt": "abs(x)\n", "completion": "Return the absolute value."},
    {"prompt": "len(x)\n", "completion": "Return the number of items."},
]
SFT = "training: {steps: 4}\nlora: {rank: 4}\nbatch: {batch_size: 2}\n"
RLVR = """
training: {mode: rlvr, steps: 2}
model: builtin:sums
rlvr: {reward: exact_match, prompts_per_step: 2, group_size: 2, max_new_tokens: 4}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that writes the files, runs the command and returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(recipe: str, *options: str, rows: Sequence[Mapping[str, Any]] = ROWS) -> tuple[int, str, str]:
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        for name in ("rows.jsonl", "heldout.jsonl"):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        status = cli.main(["run", "recipe.yaml", "--data", "rows.jsonl", *options])
        return status, *capsys.readouterr()

    return run


def test_it_trains_shows_its_progress_and_says_where_the_history_is(run: Run) -> None:
    status, out, err = run(SFT, "--eval", "heldout.jsonl")
    run_id = re.search(r"run (tc-\w+/1) FINISHED after 4 steps", out)[1]
    assert status == 0, err
    assert err.splitlines()[-1].startswith(f"{run_id} step 4/4 loss=")
    (record,) = tn.list_runs(name="recipe")  # called after its file
    history = record.history
    assert f"  eval/loss                {history['eval/loss'][-1]:.6g}\n" in out
    assert f"tensafe_nb.load_run('{run_id}').history, kept in {tn.load_run(run_id).history.path}" in out


def test_it_reinforces(run: Run) -> None:
    sums = tn.datasets.sums(4, seed=0)
    status, out, err = run(
        RLVR, "--eval", "heldout.jsonl", "--name", "sums", "--tag", "a", "--tag", "b", rows=sums
    )
    assert status == 0, err
    assert [record.name for record in tn.list_runs(tags=["b", "a"])] == ["sums"]
    assert re.search(r"FINISHED after [012] steps\n(  .*\n)*  eval/reward +\d", out)
    assert "step 2/2 reward=" in err


def test_it_ranks_pairs(run: Run) -> None:
    pairs = [{"prompt": "abs(x)\n", "chosen": "Return the absolute value.", "rejected": "No idea."}]
    status, out, _ = run("training: {steps: 2}\nloss: margin_ranking", rows=pairs)
    assert status == 0
    assert re.search(r"  accuracy +[01]\n", out)


def test_steps_take_the_place_of_the_files_steps_and_epochs(run: Run) -> None:
    assert "FINISHED after 3 steps" in run("training: {epochs: 1}", "--steps", "3")[1]


def test_a_loss_may_lie_in_the_current_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my_cli_losses.py").write_text(
        "def half(outputs, batch):\n    return -outputs.logprobs.mean() / 2\n"
    )
    plain, half = (
        float(re.search(r"  loss +(\S+)", run(f"training: {{steps: 1}}\nloss: {loss}\n")[1])[1])
        for loss in ("token_ce", "my_cli_losses:half")
    )
    assert half == pytest.approx(plain / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("trainin: {}", [], "recipe.yaml, line 1: There is no section 'trainin'. Did you mean 'training'?"),
        (SFT, ["--data", "nosuch.jsonl"], "There is no file 'nosuch.jsonl'"),
        (SFT, ["--steps", "0"], "Recipe.steps: Input should be greater than 0 (got 0)."),
        ("model: builtin:tny", [], "There is no built-in model 'builtin:tny'. Did you mean 'builtin:tiny'?"),
        ("loss: nosuch_module:fn", [], "cannot import 'nosuch_module'"),
        (RLVR.replace("exact_match", "keyword_contains"), [], "The reward 'keyword_contains' scored none of"),
        (RLVR.replace(", steps: 2", ""), [], "Mode rlvr needs a number of steps"),
    ],
)
def test_whatever_fails_ends_with_one_message(
    run: Run, recipe: str, options: list[str], message: str
) -> None:
    rows = tn.datasets.sums(4, seed=0) if "rlvr" in recipe else ROWS
    status, out, err = run(recipe, *options, rows=rows)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("tensafe-nb run: ")
    assert message in err.splitlines()[-1]


def test_an_interrupt_stops_the_run_and_keeps_its_history(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, waits = tn.TrainingRun.result, []

    def interrupted(self: tn.TrainingRun, timeout: float | None = None) -> Any:
        waits.append(timeout)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(tn.TrainingRun, "result", interrupted)
    status, out, _ = run("training: {steps: 100000}")
    assert status == 130
    assert re.search(r"run \S+ STOPPED after \d+ steps", out)
