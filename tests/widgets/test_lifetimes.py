"""In a real kernel, with panels shown and `Out` filled: a cell that is run again frees what it made before."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.manager import start_new_kernel

SETUP = """
import gc, json, threading, time, weakref
import psutil
import tensafe_nb as tn
from tensafe_nb.core import worker as _workers

def models(at_most=1):
    "Models and workers that are alive, once what is on its way out has gone."
    for _ in range(100):
        names = [t.name for t in threading.enumerate() if t.name.startswith("tsnb-worker")]
        alive = sum(1 for _ in _workers.loaded_models)
        if max(len(names), alive) <= at_most:
            break
        time.sleep(0.05)
    return max(len(names), alive)
"""
WARM = """
with tn.ServiceClient() as service:
    service.create_training_client(model_ref="builtin:sums").forward({"input_ids": [[3, 4, 5, 6]]}).result()
del service
gc.collect()
gc.freeze()  # what imports left behind is not searched at every collection of every cell
"""
FORGET = (
    "for name in ('service', 'tc', 'run', 'trainer', 'last', 'held', 'chat'):\n    globals().pop(name, None)"
)
MAKE = """
service = tn.ServiceClient()
tc = service.create_training_client(model_ref="builtin:sums", optimizer={"learning_rate": 1e-4})
"""
FIT = "run = tc.fit([tn.BatchData([[3, 4, 5, 6]])], steps=3, checkpoint_every=2)\nawait run\n"
CELLS = {
    "the run is shown": MAKE + FIT + "run",
    "the client is shown": MAKE
    + "tc.forward_backward({'input_ids': [[3, 4, 5, 6]]})\nawait tc.optim_step()\ntc",
    "both are shown": MAKE + FIT + "tc, run",
    "a handle is shown": MAKE + FIT + "last = tc.forward({'input_ids': [[3, 4, 5, 6]]})\nawait last\nlast",
    "the panel is shown": MAKE + FIT + "tc.dashboard()",
    "a chat is shown": MAKE + "chat = tc.chat(max_new_tokens=2)\nawait chat.say('1+2=')\nchat",
    "a chat without a name is shown": MAKE + "await tc.chat(max_new_tokens=2).say('1+2=')\ntc.chat()",
    "a curve is shown": MAKE + FIT + "from tensafe_nb.widgets import LossCurve\nLossCurve(run)",
    "nothing has a name": """
def train():
    tc = tn.ServiceClient().create_training_client(model_ref="builtin:sums", optimizer={"learning_rate": 1e-4})
    run = tc.fit([tn.BatchData([[3, 4, 5, 6]])], steps=3)
    run.result()
    return run
train()""",
    "only the client is made again": """
held = globals().get("held") or tn.ServiceClient()
tc = held.create_training_client(model_ref="builtin:sums", optimizer={"learning_rate": 1e-4})
run = tc.fit([tn.BatchData([[3, 4, 5, 6]])], steps=3)
await run
tc""",
    "a subscriber refers to its client": MAKE + "tc.subscribe(lambda event, tc=tc: tc.step)\n" + FIT + "run",
    "rewards": MAKE
    + """
from tensafe_nb.rlvr import RLVRTrainer
trainer = RLVRTrainer(tc, tn.datasets.sums(16, seed=0), "exact_match", prompts_per_step=2, group_size=2,
                      max_new_tokens=4)
run = trainer.run(steps=2)
await run
trainer""",
    "the cell fails": MAKE + FIT + "tc.fit([], show=False)",
}


class Kernel:
    """A kernel with a panel renderer."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def run(self, code: str, *, fails: bool = False) -> str:
        said: list[str] = []

        def take(message: Any) -> None:
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])
            elif message["msg_type"] == "error":
                said.extend(message["content"]["traceback"])

        reply = self._client.execute_interactive(code, timeout=100, output_hook=take)
        assert (reply["content"]["status"] == "error") is fails, "".join(said)
        return "".join(said)

    def ask(self, expression: str) -> Any:
        return json.loads(self.run(f"print('answer', json.dumps({expression}))").split("answer", 1)[1])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSAFE_NB_RENDERER", "widget")
        patch.setenv("TENSAFE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        manager, client = start_new_kernel(kernel_name="python3")
        try:
            kernel = Kernel(client)
            kernel.run(SETUP)
            kernel.run(WARM)
            yield kernel
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


IN_CI = ("both are shown", "the cell fails", "rewards")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "cell", [cell if cell in IN_CI else pytest.param(cell, marks=pytest.mark.soak) for cell in CELLS]
)
def test_a_cell_run_again_leaves_one_model(kernel: Kernel, cell: str) -> None:
    kernel.run(FORGET)
    for _ in range(3):
        kernel.run(CELLS[cell], fails=cell == "the cell fails")
    assert kernel.ask("models()") == 1
    kernel.run(FORGET)
    if cell != "nothing has a name":  # then Out is all there is, until another client is made
        assert kernel.ask("models(0)") == 0, "what Out alone refers to is let go with the last name"


def test_the_output_history_keeps_results_and_says_what_was_freed(kernel: Kernel) -> None:
    kernel.run(FORGET)
    kernel.run(MAKE + FIT + "here = len(Out)\nrun")
    number = kernel.ask("max(Out)")
    kernel.run(
        "shown = "
        + str(number)
        + "\nlast = tc.forward({'input_ids': [[3, 4, 5]]})\nfirst = (await last).loss"
    )
    kernel.run("last")
    kernel.run(FORGET)
    assert kernel.ask("models(0)") == 0
    assert kernel.ask("[Out[shown].result().steps, Out[shown].state, Out[shown].steps_done]") == [
        3,
        "FINISHED",
        3,
    ]
    assert kernel.ask("len(Out[shown].history['loss'])") == 3
    assert kernel.ask("Out[max(n for n in Out if n > shown)].loss == first")
    assert "was freed" in kernel.run("Out[shown].checkpoint()", fails=True)
    kernel.run("Out[shown]")  # is shown again, from what is left


def test_a_live_run_keeps_its_client_and_ends_well(kernel: Kernel) -> None:
    kernel.run(FORGET)
    kernel.run(
        MAKE + "import itertools\nsteps = threading.Semaphore(0)\n"
        "def rows():\n    while steps.acquire():\n        yield tn.BatchData([[3, 4, 5, 6]])\n"
        "run = tc.fit(rows(), steps=4)\nrun_id = run.run_id"
    )
    kernel.run(FORGET)
    kernel.run(MAKE)  # loads another model, and makes room for it
    assert kernel.ask("models(2)") == 2
    kernel.run("for _ in range(4): steps.release()")
    kernel.run(FORGET)
    assert kernel.ask("models(0)") == 0
    assert kernel.ask("[tn.load_run(run_id).state, tn.load_run(run_id).steps_done]") == ["FINISHED", 4]


def test_the_panel_of_a_freed_client_shows_how_it_ended(kernel: Kernel) -> None:
    kernel.run(FORGET)
    kernel.run(MAKE + FIT + "panel = tc.dashboard()\npanel")
    kernel.run(FORGET)
    assert kernel.ask("models(0)") == 0
    status = kernel.ask(
        "{k: v for k, v in panel.status().items() if k in ('state', 'step', 'of', 'steer', 'client')}"
    )
    assert status == {"state": "FINISHED", "step": 3, "of": 3, "steer": False, "client": "TERMINATED"}
    assert kernel.ask("len(panel.feed.client.history['loss'])") == 3


@pytest.mark.timeout(240)
def test_memory_after_five_reruns_is_that_after_two(kernel: Kernel) -> None:
    kernel.run(FORGET)
    cell = MAKE.replace("builtin:sums", "builtin:tiny") + FIT + "run"
    used = []
    for _ in range(5):
        kernel.run(cell)
        assert kernel.ask("models()") == 1
        used.append(kernel.ask("gc.collect() * 0 + psutil.Process().memory_info().rss"))
    assert used[4] <= 1.1 * used[1], used
