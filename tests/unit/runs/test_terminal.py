"""A script in a real terminal, and one that writes to a file: a bar there, plain lines here, a replay that says so."""

import os
import pty
import termios
import threading
from pathlib import Path

import pytest

from tests.forking import Forker

END = b"\0"
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


def run(forker: Forker, out: str, err: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TENSAFE_NB_RENDERER")
        pid = forker.begin(SCRIPT, out=out, err=err)
    assert forker.status_of(pid) == 0


def in_a_terminal(forker: Forker, columns: int) -> str:
    """Run the script where its output is a terminal that says it is so wide; return what it wrote."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    written = bytearray()

    def read() -> None:
        while chunk := os.read(ours, 4096):
            written.extend(chunk)
            if written.endswith(END):
                return

    reader = threading.Thread(target=read)
    reader.start()
    run(forker, os.ttyname(theirs), os.ttyname(theirs))
    os.write(theirs, END)
    reader.join()
    os.close(theirs)
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize("columns", [100, 0], ids=["wide", "of a container"])
def test_in_a_terminal_there_is_one_bar_for_each_run(forker: Forker, columns: int) -> None:
    shown = in_a_terminal(forker, columns)
    bars = [bar.strip() for bar in shown.split("\r")]
    assert shown.count("\rrun 1: ") > 3, "it moves"
    assert any(bar.startswith("run 1: 100%") and "40/40" in bar for bar in bars)
    assert "REPLAY run 1: 100%" in shown
    assert "run 2 failed" in shown


def test_in_a_file_there_are_plain_lines_and_freezing_prints_one_sentence(
    forker: Forker, tmp_path: Path
) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    run(forker, str(out), str(err))
    told = err.read_bytes().decode()
    lines = [line for line in told.splitlines() if " step " in line]
    assert "\r" not in told and "\x1b" not in told
    live = [line for line in lines if not line.startswith("REPLAY") and "/1 step " in line]
    assert len(live) == 20 and live[-1].endswith(" finished")
    assert [line.removeprefix("REPLAY ") for line in lines if line.startswith("REPLAY")] == live
    assert lines[-1].endswith("failed (the data ran out)")
    [sentence] = out.read_text().splitlines()
    assert sentence.startswith("Run 1 of tc-") and ": FINISHED at step 40 of 40, loss " in sentence
