"""Waits in a cell, plain and interrupted, on the ipykernel versions that behave differently; no page is open."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from tests.browser.kernels import VERSIONS, NoIndexError, register

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

PROMPT = 0.5  # s, from ■ until the cell has its prompt back
PRESSED_AFTER = 1.0  # s into the wait
SETUP = """
import asyncio, json, os, threading
import psutil
import tensafe_nb as tn
from tensafe_nb.rlvr import RLVRTrainer

def reward(prompt, response, meta=None):
    return float(response == meta["answer"])

service = tn.ServiceClient()
tc = service.create_training_client(model_ref="builtin:sums", optimizer={"learning_rate": 1e-4})
trainer = RLVRTrainer(tc, tn.datasets.sums(256, seed=0), reward, prompts_per_step=8, group_size=8, max_new_tokens=4)
run = trainer.run(steps=100_000, show=False)
other = service.create_training_client()
await other.ready()

def short():
    return other.forward({"input_ids": [[5, 6, 7, 8]]})

def long():
    rows = {"input_ids": [[5 + n % 50 for n in range(120)]] * 4000}
    return other.forward_backward(rows)

def pool():
    return sorted(child.pid for child in psutil.Process().children(recursive=True))

def threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("tsnb-"))
"""
WAITS = {
    "result()": "{job}().result()",
    "await": "await {job}()",
    "gather": "await asyncio.gather({job}(), short())",
    "wait_for": "await asyncio.wait_for({job}(), 60)",
    "await run": "await run",
    "run.result()": "run.result()",
}
PAUSE = "run.pause()\nwhile run.state != 'PAUSED':\n    await asyncio.sleep(0.05)"


@dataclass
class Cell:
    """What a cell that has ended left behind; times in seconds."""

    took: float
    printed: str = ""
    error: str | None = None
    back_after: float = 0.0  # from the interrupt to the prompt


@dataclass
class Kernel:
    """A running kernel, and what was measured with it."""

    version: str
    manager: KernelManager
    client: BlockingKernelClient
    measured: dict[str, float] = field(default_factory=dict)

    def run(self, code: str, *, press_after: float | None = None) -> Cell:
        """Run a cell to its end; interrupt it meanwhile if asked to."""
        started = pressed = time.perf_counter()
        request = self.client.execute(code)
        printed: list[str] = []
        error = None
        due = None if press_after is None else started + press_after
        while True:
            if due is not None and time.perf_counter() >= due:
                due, pressed = None, time.perf_counter()
                self.manager.interrupt_kernel()
            message = self._next(0.02 if due is not None else 60.0)
            if message is None or message["parent_header"].get("msg_id") != request:
                continue
            match message["msg_type"], message["content"]:
                case "stream", {"text": text}:
                    printed.append(text)
                case "error", {"ename": name, "evalue": text, "traceback": traceback}:
                    error = name or text
                    printed += traceback
                case "status", {"execution_state": "idle"}:
                    now = time.perf_counter()
                    self.client.get_shell_msg(timeout=10)
                    return Cell(now - started, "".join(printed), error, now - pressed)

    def ask(self, expression: str) -> Any:
        """Return the value of an expression, carried as JSON."""
        cell = self.run(f"print('answer', json.dumps({expression}))")
        assert cell.error is None, cell.printed
        return json.loads(cell.printed.split("answer", 1)[1])

    def _next(self, timeout: float) -> Mapping[str, Any] | None:
        try:
            return self.client.get_iopub_msg(timeout=timeout)
        except Empty:
            assert timeout < 1, "the kernel says nothing any more"
            return None


@pytest.fixture(scope="module", params=VERSIONS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    home = tmp_path_factory.mktemp("kernel")
    try:
        name = register(request.param, home)
    except NoIndexError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSAFE_HOME", str(home / "home"))
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        patch.delenv("TENSAFE_NB_RENDERER", raising=False)
        manager = KernelManager(
            kernel_name=name, kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(home / "kernels")])
        )
        manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        kernel = Kernel(request.param, manager, client)
        started = kernel.run(SETUP)
        assert started.error is None, started.printed
        first = kernel.run("1 / 0")  # IPython loads what it prints tracebacks with
        kernel.measured["(the first error of a kernel)"] = round(first.took, 3)
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        print(f"\nipykernel {request.param}: ■ → prompt, in seconds: {kernel.measured}")


@pytest.mark.parametrize("wait", [name for name in WAITS if "run" not in name])
def test_a_wait_ends_with_its_job(kernel: Kernel, wait: str) -> None:
    cell = kernel.run(WAITS[wait].format(job="short"))
    assert cell.error is None, cell.printed
    assert cell.took < 5


@pytest.mark.parametrize("wait", WAITS)
def test_an_interrupted_wait_gives_the_prompt_back_and_the_work_goes_on(kernel: Kernel, wait: str) -> None:
    pool = kernel.ask("pool()")
    assert pool, "the rewards are scored by processes"
    of_run = "run" in wait
    kernel.run("def job():\n    global handle\n    handle = long()\n    return handle")
    kernel.run("run.resume()" if of_run else PAUSE)
    cell = kernel.run(WAITS[wait].format(job="job"), press_after=PRESSED_AFTER)
    state = kernel.ask("run.state" if of_run else "handle.state")
    assert kernel.run("run.resume()" if of_run else "handle.cancel(); run.resume()").error is None
    kernel.measured[wait] = round(cell.back_after, 3)
    assert cell.error in ("KeyboardInterrupt", "CancelledError"), cell.printed
    assert cell.back_after <= PROMPT
    assert state == "RUNNING"
    step = kernel.ask("run.steps_done")
    assert kernel.run(f"while run.steps_done <= {step}:\n    await asyncio.sleep(0.05)").error is None
    assert kernel.ask("pool()") == pool, "an interrupt reached a process of the pool"


def test_after_a_wait_that_ran_out_of_time_a_later_one_gets_the_result(kernel: Kernel) -> None:
    kernel.run("handle = long()")
    cell = kernel.run("await asyncio.wait_for(handle, 0.5)")
    assert cell.error == "TimeoutError"
    assert kernel.ask("handle.done()") is False
    assert kernel.run("handle.cancel()").error is None
    assert kernel.run("await short()").error is None


def test_after_close_no_thread_and_no_process_is_left(kernel: Kernel) -> None:
    assert kernel.ask("threads()")
    closed = kernel.run("service.close()")
    assert closed.error is None, closed.printed
    assert closed.took < 10
    assert kernel.ask("threads()") == []
    assert kernel.ask("pool()") == []
