"""A script in a real terminal, and one that writes to a file: a bar there, plain lines here, a replay that says so.

What is slow is to import torch. One process does it once, and forks a child for each place that the script runs in.
"""

import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

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


# reads the paths for output and errors, runs the script in a child that writes there, answers its exit status
FORKING = """
import gc, os, sys
import matplotlib, peft, safetensors.torch, torch.optim, transformers.models.llama.modeling_llama, tqdm.auto
import tensafe_nb.engine.engine, tensafe_nb.widgets, tensafe_nb.widgets.still.snapshot
gc.freeze()  # a client looks for circles when it ends: among what is its own, not among all of torch
for place in iter(sys.stdin.readline, ""):
    child = os.fork()
    if not child:
        out, err = place.split()
        for path, stream in ((os.devnull, 0), (out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_RDWR), stream)
        exec(sys.argv[1], {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """Runs the script in children of a process that has imported what it needs."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FORKING, SCRIPT]
        environment = {name: value for name, value in os.environ.items() if name != "TENSAFE_NB_RENDERER"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )

    def run(self, out: str, err: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{out} {err}\n")
        status = self.process.stdout.readline()
        assert status == "0\n", status


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSAFE_HOME", str(tmp_path_factory.mktemp("home")))
        forker = Forker()
    yield forker
    forker.process.communicate()


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
    forker.run(os.ttyname(theirs), os.ttyname(theirs))
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
    for file in (out, err):
        file.touch()
    forker.run(str(out), str(err))
    told = err.read_bytes().decode()
    lines = [line for line in told.splitlines() if " step " in line]
    assert "\r" not in told and "\x1b" not in told
    live = [line for line in lines if not line.startswith("REPLAY") and "/1 step " in line]
    assert len(live) == 20 and live[-1].endswith(" finished")
    assert [line.removeprefix("REPLAY ") for line in lines if line.startswith("REPLAY")] == live
    assert lines[-1].endswith("failed (the data ran out)")
    [sentence] = out.read_text().splitlines()
    assert sentence.startswith("Run 1 of tc-") and ": FINISHED at step 40 of 40, loss " in sentence
