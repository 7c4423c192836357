"""The store over many deaths, and with a state larger than 2 GiB."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import large_state
from tests.unit.store import lives

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

GIB = 1 << 30
NEEDED = 3 * GIB
BOUND = 200 << 20


@pytest.mark.parametrize(("task", "count"), [("save", 200), ("rotate", 60)])
def test_killed_again_and_again_it_keeps_what_it_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, count: int
) -> None:
    interrupted = lives.survive(tmp_path, task, count, seed=count)
    with capsys.disabled():
        print(f"\n{task}: {count} kills, {interrupted} of them left something unfinished")
    assert interrupted > 0


def test_a_state_past_two_gib_needs_no_more_memory_than_a_small_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED:
        pytest.fail(
            f"{tmp_path} has {free / GIB:.1f} GiB free; this test needs {NEEDED / GIB:.0f}. Free some space."
        )
    try:
        program = [sys.executable, "-m", large_state.__name__, str(tmp_path)]
        facts = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)  # pytest keeps the folders of three runs
    with capsys.disabled():
        print(
            f"\n{facts['bytes'] / GIB:.3f} GiB: saved in {facts['save_seconds']:.1f} s, checked and read in "
            f"{facts['open_seconds']:.1f} s, {facts['extra_memory'] / (1 << 20):.0f} MiB more than a small one"
        )
    assert facts["bytes"] > 1 << 31
    assert facts["extra_memory"] < BOUND
