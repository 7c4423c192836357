"""A comparison whose process is killed in the middle of a round: what was there is shown, and it goes on from there."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.events import Event, RunStep
from tests.faults.killing import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.soak]  # what goes on and how is in tests/unit/comparing
ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
RATES = {"learning_rate": [1e-3, 1e-2]}


def race(dies: bool = False, **how: Any) -> Any:
    """Race two arms over three seeds; one that dies waits for it in the fifth step of one of them."""

    def arm(
        service: tn.ServiceClient, seed: int, learning_rate: float, resume_from: str | None = None
    ) -> Any:
        def told(event: Event) -> None:
            if dies and (seed, learning_rate) == (1, 1e-2) and isinstance(event, RunStep) and event.done == 5:
                threading.Event().wait()

        tc = service.create_training_client(
            lora_config={"rank": 1}, optimizer={"learning_rate": learning_rate}, seed=seed
        )
        tc.subscribe(told)
        batches = tc.batches(ROWS, seed=seed)
        return tc.fit(batches, steps=8, checkpoint_every=2, resume_from=resume_from, show=False)

    return tn.compare(arm, seeds=3, vary=RATES, pace=3, show=False, **how)


def has_begun(racing: subprocess.Popen[bytes]) -> bool:
    """Whether the disk knows a step of each: what is told is written down a moment later."""
    assert racing.poll() is None, "the race ended by itself"
    if "rates" not in [kept.name for kept in tn.list_comparisons()]:
        return False
    tracks = tn.load_comparison("rates").standings().tracks
    return len(tracks) == 6 and all(len(track.steps) for track in tracks)


def curves(one: Any) -> list[Any]:
    return [(t.arm, t.seed, t.steps.tolist(), t.values.tolist()) for t in one.standings().tracks]


def test_a_comparison_that_was_killed_shows_what_there_was_and_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "home"))
    program = f"from {__name__} import race; race(dies=True, name='rates').result()"
    racing = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not has_begun(racing):
        time.sleep(0.1)
    racing.kill()
    assert racing.wait() == -signal.SIGKILL
    record = tn.load_comparison("rates")
    assert record.state == "INTERRUPTED" and record.kept.state == "RUNNING"
    before = record.result()
    assert "INTERRUPTED" in repr(record) and "interrupted" in before.headline
    assert all(len(values) >= 1 for *_, values in curves(record)) and not before.arms[0].failed
    assert before.step >= 1 and before.differences[0].by.seeds == 3
    assert any("compare(…, resume_from='rates') goes on" in note for note in before.notes())
    on = race(resume_from="rates")
    result = on.result()
    whole = race()
    assert repr(result).splitlines()[1:] == repr(whole.result()).splitlines()[1:]
    assert curves(tn.load_comparison("rates")) == curves(on) == curves(whole)
    assert len(tn.list_runs(tags="rates", state="interrupted")) == 6
