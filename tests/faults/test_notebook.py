"""A notebook whose server is killed under it, through a bad network, ends where one without a server does."""

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.faults.killing import ROOT, KilledServer, Nursery, killed_server
from tests.faults.proxy import BadNetwork

CELLS = [
    """
import pickle
from pathlib import Path
import tensafe_nb as tn
from tests.faults.trained import what_came_of
service = tn.ServiceClient()
""",
    """
tc = service.create_training_client(
    lora_config=tn.LoRAConfig(rank=4, dropout=0.1), optimizer={"learning_rate": 1e-2}, seed=3
)
rows = tn.datasets.docstring_pairs("train")[:40]
fitted = tc.fit(tc.batches(rows, seed=0), steps=12, checkpoint_every=4, show=False)
(await fitted).state
""",
    """
policy = service.create_training_client(
    model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 3e-3}
)
trainer = tn.rlvr.RLVRTrainer(
    policy, tn.datasets.sums(20, seed=1), "exact_match", tn.rlvr.PPO("grpo", ppo_epochs=2, kl_coef=0.05),
    prompts_per_step=4, max_new_tokens=4, seed=3,
)
taught = trainer.run(steps=6, show=False)
(await taught).state
""",
    """
text = (await tc.sample("def ", max_new_tokens=8, seed=1)).texts
found = [what_came_of(service, one, run.run_id, Path("out")) for one, run in ((tc, fitted), (policy, taught))]
Path("found").write_bytes(pickle.dumps([*found, text]))
tc.close(); policy.close(); service.close()
""",
]


def run(folder: Path, **environment: str) -> Any:
    """Run the notebook in a kernel of its own, and return what came of it."""
    import nbformat
    from nbclient import NotebookClient

    folder.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TENSAFE_HOME", str(folder / "home"))
        for name, value in environment.items():
            patch.setenv(name, value)
        client = NotebookClient(notebook, timeout=1_200, kernel_name="python3", store_widget_state=False)
        client.execute(cwd=str(folder))
    return pickle.loads((folder / "found").read_bytes())


class Assassin:
    """Kills a server once in each of two runs: when the kernel's own log tells of so many steps."""

    def __init__(self, server: KilledServer, home: Path) -> None:
        self._server, self._home, self.kills = server, home, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="assassin")

    def _steps(self) -> list[int]:
        logs = sorted(self._home.rglob("events.jsonl"), key=lambda log: log.stat().st_mtime)
        return [log.read_text().count('"run_step"') for log in logs]

    def _run(self) -> None:
        for runs in (1, 2):
            while not (len(steps := self._steps()) >= runs and steps[-1] >= 3):
                if self._over.wait(0.02):
                    return
            self._server.begin_again()
            self.kills += 1

    def __enter__(self) -> "Assassin":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.soak
@pytest.mark.timeout(2_400)
def test_a_notebook_whose_server_is_killed_twice_behind_a_bad_network_ends_as_the_embedded_one(
    nursery: Nursery, tmp_path: Path
) -> None:
    with (
        killed_server(nursery, tmp_path / "server", bounds={"MOST_OPERATIONS": 10, "SHARE": 0}) as server,
        BadNetwork(server.url, 20) as network,
        Assassin(server, tmp_path / "far" / "home") as assassin,
    ):
        far = run(tmp_path / "far", TENSAFE_BASE_URL=network.url, TENSAFE_API_KEY=server.token)
        assert assassin.kills == 2
        print(json.dumps(network.befell), f"ready again within {max(server.seconds[1:]):.1f} s")
    near = run(tmp_path / "near")
    for mine, its in zip(near, far, strict=True):
        assert mine == its
    assert near[0]["curves"]["loss"] and near[1]["rollouts"] and near[1]["curves"]["reward"]
