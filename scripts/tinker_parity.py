"""The unmodified tinker SDK and its cookbook against `tensafe-nb serve --tinker`, over loopback alone.

Each program of `scripts.tinker_programs` runs in an environment that has the SDK: `make tinker-parity` makes those. One
line a program: what it checked, and for how long.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tensafe_nb as tn

VERSIONS = ("0.25.0", "0.29.1", "0.33.0", "0.38.0")
NEWEST = VERSIONS[-1]
PROGRAMS = ("numerics", "optimizer_state", "custom_loss", "private", "faults", "supervised", "reinforcement")
PROGRAMS += ("notebook",)
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "tinker-parity"
LONGEST = 900.0  # s of a program


class Served:
    """A server of ours, as a process, in a home folder that outlives it."""

    def __init__(self, port: int = 0, tokens: Path = FOLDER / "tokens.json") -> None:
        self.port, self.tokens, self.token = port, tokens, ""
        self.process = self._started()

    def _started(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tensafe_nb.cli", "serve", "--tinker", "--json", "--idle-after", "0"]
        command += [
            "--port",
            str(self.port),
            "--home",
            str(FOLDER / "home"),
            "--models",
            str(FOLDER / "models"),
        ]
        command += ["--tokens", str(self.tokens), *([] if self.token else ["--print-token"])]
        log = (FOLDER / "server.log").open("a")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        self.url, self.port = told["url"], int(told["url"].rpartition(":")[2])
        self.token = self.token or told["token"]
        return process

    def kill_and_start_again(self) -> None:
        """End it as a power cut does, and begin it anew at the same address."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = self._started()

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


def make_model() -> None:
    """Write the built-in model as a folder that both sides read."""
    os.environ["TENSAFE_HOME"] = str(FOLDER / "own-home")
    with tn.ServiceClient() as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=1), dtype="float32")
        saved = tc.save_state().result()
        service.export_adapter(saved.artifact_id, FOLDER / "models" / "tiny", merged=True)


def start(served: Served, version: str, program: str) -> "subprocess.Popen[str]":
    """Begin a program in the environment of an SDK."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    environment |= {"TINKER_BASE_URL": f"{served.url}/tinker", "TINKER_API_KEY": f"tml-{served.token}"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    python = ROOT / f".venv-tinker-{version}" / "bin" / "python"
    return subprocess.Popen(
        [str(python), str(ROOT / "scripts" / "tinker_programs.py"), program],
        cwd=FOLDER / "models",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def report(version: str, program: str, process: "subprocess.Popen[str]", began: float) -> bool:
    """Wait for a program, and say how it ended."""
    output, _ = process.communicate(timeout=LONGEST)
    lines = output.strip().splitlines()
    passed = process.returncode == 0
    told = "\n    ".join(line for line in lines if is_told(line)) if passed else "\n    ".join(lines[-30:])
    seconds = time.monotonic() - began
    print(f"{'ok  ' if passed else 'FAIL'} {version} {program} ({seconds:.0f} s)\n    {told}", flush=True)
    return passed


def is_told(line: str) -> bool:
    """Whether a line is what a program says, and not its libraries' logs."""
    words = (
        "SDK ",
        "logprobs ",
        "unbroken",
        "gradient norm",
        "dp_epsilon",
        "RequestFailed",
        "waited",
        "train_mean",
    )
    words += ("importance_sampling:", "ppo:", "the model goes", "resumed", "{", "notebook:")
    return line.startswith(words)


def killed(served: Served) -> list[bool]:
    """Kill the server in the middle of a session."""
    began, ready = time.monotonic(), FOLDER / "models" / "ready"
    ready.unlink(missing_ok=True)
    process = start(served, NEWEST, "before_the_end")
    while not ready.exists() and process.poll() is None:
        time.sleep(0.05)
    served.kill_and_start_again()
    ready.unlink(missing_ok=True)
    first = report(NEWEST, "before_the_end", process, began)
    began = time.monotonic()
    return [first, report(NEWEST, "after_the_end", start(served, NEWEST, "after_the_end"), began)]


def main(asked: Sequence[str]) -> int:
    """Run what is asked for, by program or version; everything by default."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "models").mkdir(parents=True)
    make_model()
    served, passed = Served(), []
    try:
        runs = [(version, "contract") for version in VERSIONS] + [(NEWEST, program) for program in PROGRAMS]
        for version, program in runs:
            if not asked or program in asked or version in asked:
                passed.append(report(version, program, start(served, version, program), time.monotonic()))
        if not asked or "killed" in asked:
            passed += killed(served)
    finally:
        served.stop()
    print(f"{sum(passed)} of {len(passed)} passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
