"""A script in a real terminal and in a pipe: a bar there, plain lines here, and a replay that says what it is."""

import os
import pty
import subprocess
import sys
import termios

import pytest

SCRIPT = """
import tensafe_nb as tn
with tn.ServiceClient() as service:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=4))
    batch = tn.BatchData([[5, 6, 7, 8]])
    run = tc.fit([batch], steps=40)
    run.result()
    run.freeze()
    tn.replay(run.run_id, speed=1000).result()
    def torn():
        yield batch
        raise RuntimeError("the data\\nran out")
    try:
        tc.fit(torn(), steps=5).result()
    except tn.FutureFailedError:
        pass
"""


@pytest.fixture(autouse=True)
def _no_renderer_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSAFE_NB_RENDERER", raising=False)


def in_a_terminal(command: list[str], columns: int) -> str:
    """Run a command whose output is a terminal that says it is so wide; return what it wrote."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = bytearray()
    while True:
        try:
            written += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("columns", [100, 0], ids=["wide", "of a container"])
def test_in_a_terminal_there_is_one_bar_for_each_run(columns: int) -> None:
    shown = in_a_terminal([sys.executable, "-c", SCRIPT], columns)
    bars = [bar.strip() for bar in shown.split("\r")]
    assert shown.count("\rrun 1: ") > 3, "it moves"
    assert any(bar.startswith("run 1: 100%") and "40/40" in bar for bar in bars)
    assert "REPLAY run 1: 100%" in shown
    assert "run 2 failed" in shown


def test_in_a_pipe_there_are_plain_lines_and_freezing_prints_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if " step " in line]
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    live = [line for line in lines if not line.startswith("REPLAY") and "/1 step " in line]
    assert len(live) == 20 and live[-1].endswith(" finished")
    assert [line.removeprefix("REPLAY ") for line in lines if line.startswith("REPLAY")] == live
    assert lines[-1].endswith("failed (the data ran out)")
    [sentence] = done.stdout.splitlines()
    assert sentence.startswith("Run 1 of tc-") and ": FINISHED at step 40 of 40, loss " in sentence
