"""What 0.1 wrote stays readable: every run, checkpoint, account, record and key of a home folder of its time.

`write.py` wrote the folder with the code of 0.1.0, and `expected.json` holds what 0.1.0 read back. Each test works on a
copy. Whoever changes a format keeps these green; nothing here is ever written again.
"""

import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.cli import main as cli
from tests.home_0_1 import write

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
STATES = EXPECTED["states"]
OPEN = [name for name in STATES if not name.startswith("private: ")]
PRIVATE = [name for name in STATES if name.startswith("private: ")]
RUNS = {record["run_id"]: record for record in EXPECTED["runs"]}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # of logprobs that are a few units large, on any processor


def tolerance(name: str) -> dict[str, float]:
    return {"rtol": 0.05, "atol": 0.05} if name == "bfloat16" else CLOSE


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as it lay on the disk of its user: private files, and the model where the references look for it."""
    copy = tmp_path / "home"
    shutil.copytree(HERE / "home", copy)
    shutil.copytree(HERE / write.MODEL, tmp_path / write.MODEL)
    for path in (copy, *copy.rglob("*")):  # a clone has them readable for all
        path.chmod(0o700 if path.is_dir() else 0o600)
    monkeypatch.chdir(tmp_path)
    return copy


@pytest.fixture
def old(home: Path, service: tn.ServiceClient) -> tn.ServiceClient:
    """A service on that home."""
    return service


# runs


@pytest.mark.usefixtures("home")
def test_every_run_is_listed_as_it_was() -> None:
    found = {record.run_id: record for record in tn.list_runs()}
    assert found.keys() == RUNS.keys()
    assert {str(record.state) for record in found.values()} == {
        "FINISHED",
        "STOPPED",
        "FAILED",
        "INTERRUPTED",
    }
    for run_id, record in found.items():
        assert write.describe(record) == write.describe(tn.load_run(run_id)) == RUNS[run_id]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("run_id", RUNS)
def test_every_run_replays_to_its_end(run_id: str) -> None:
    replay = tn.replay(run_id, speed=1e9, show=False)
    assert replay.result().run_id == run_id
    assert replay.state == RUNS[run_id]["state"]
    assert set(replay.history.names) <= set(RUNS[run_id]["last"])


@pytest.mark.usefixtures("home")
def test_every_rollout_is_there(home: Path) -> None:
    assert len(EXPECTED["rollouts"]) == 3
    for run_id, steps in EXPECTED["rollouts"].items():
        assert write.rollouts_of(tn, run_id.partition("/")[0], home) == steps
        assert Counter(RUNS[run_id]["events"])["Rollouts"] == len(steps)


# checkpoints


def test_every_artifact_is_listed_and_intact(
    old: tn.ServiceClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(found.artifact_id for found in old.list_artifacts()) == EXPECTED["artifacts"]
    for facts in STATES.values():
        found = old.get_artifact(facts["artifact_id"])
        assert {name: getattr(found, name) for name in ("name", "step", "content_hash")} == {
            name: facts[name] for name in ("name", "step", "content_hash")
        }
        assert found.metadata == facts["metadata"]
        assert found.model_ref == write.MODEL
    assert cli.main(["artifacts", "verify", *(facts["artifact_id"] for facts in STATES.values())]) == 0
    assert capsys.readouterr().out.count("ok   ") == len(STATES)


@pytest.mark.parametrize("name", STATES)
def test_every_state_loads_into_a_client_that_fits_and_scores_as_it_did(
    old: tn.ServiceClient, name: str
) -> None:
    facts = STATES[name]
    restored = old.restore(facts["name"] or facts["artifact_id"])
    fitting = old.create_training_client(restored.config)
    loaded = fitting.load_state(facts["artifact_id"]).result()
    assert (loaded.step, loaded.status) == (facts["step"], "READY")
    assert loaded.optimizer_restored is (name != "without optimiser")
    for tc in (restored, fitting):
        np.testing.assert_allclose(write.scores(tc), facts["logprobs"], **tolerance(name))
        assert tc.step == facts["step"]


@pytest.mark.parametrize("name", OPEN)
def test_training_goes_on_as_it_would_have(old: tn.ServiceClient, name: str) -> None:
    """Moments, open gradients and random streams came along: the next step is the one that 0.1 would have taken."""
    facts = STATES[name]
    found = write.going_on(old.restore(facts["artifact_id"]))
    assert found["sampled"] == facts["sampled"] or name == "bfloat16"
    for value in ("grad_norm", "logprobs after a step"):
        np.testing.assert_allclose(found[value], facts[value], **tolerance(name))


def test_a_frozen_reference_came_along(old: tn.ServiceClient) -> None:
    facts = STATES["value head and frozen reference"]
    tc = old.restore(facts["artifact_id"])
    found = tc.compute_logprobs(write.SCORED, reference=True).logprobs
    np.testing.assert_allclose(found, facts["reference_logprobs"], **CLOSE)
    assert not np.allclose(found, facts["logprobs"], rtol=1e-3)


def test_what_other_keys_sealed_opens_with_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"env": ("TENSAFE_KEK", write.KEK), "passphrase": ("TENSAFE_PASSPHRASE", write.PASSPHRASE)}
    for source, (variable, value) in secrets.items():
        with monkeypatch.context() as with_key, tn.ServiceClient(key_source=source) as service:
            with_key.setenv(variable, value)
            facts = EXPECTED["sealed by others"][source]
            assert service.get_artifact(source).artifact_id == facts["artifact_id"]
            np.testing.assert_allclose(write.scores(service.restore(source)), facts["logprobs"], **CLOSE)


@pytest.mark.parametrize("name", ["LoRA", "all weights, adamw"])
def test_an_adapter_and_a_whole_model_are_exported(old: tn.ServiceClient, tmp_path: Path, name: str) -> None:
    merged = old.export_adapter(STATES[name]["artifact_id"], tmp_path / "out", merged=name == "LoRA")
    tc = old.create_training_client(model_ref=str(merged), dtype="float32")
    np.testing.assert_allclose(write.scores(tc), STATES[name]["logprobs"], **CLOSE)


def test_an_interrupted_run_and_one_in_the_middle_go_on(old: tn.ServiceClient) -> None:
    middle, end = STATES["of a run at step 2"], STATES["of a run at step 4"]
    tc = old.restore(middle["artifact_id"])
    result = tc.fit(write.BATCHES, resume_from=middle["artifact_id"], show=False).result()
    assert (result.state, tc.step) == ("FINISHED", 4)
    np.testing.assert_allclose(write.scores(tc), end["logprobs"], **CLOSE)
    (dead,) = (record for record in tn.list_runs() if record.state == "INTERRUPTED")
    tc = old.restore(dead.last_checkpoint)
    batches = [write.STEP] * 5
    assert tc.fit(batches, steps=5, resume_from=dead.last_checkpoint, show=False).result().state == "FINISHED"
    assert tc.step == 5


@pytest.mark.parametrize("name", ["REINFORCE with a running mean", "PPO with a value head"])
def test_a_run_of_reinforcement_learning_goes_on(old: tn.ServiceClient, name: str) -> None:
    facts = STATES[f"{name}, step {4 if 'PPO' in name else 2}"]
    algo: Any = tn.rlvr.REINFORCE(baseline="ema", mask_truncated=False)
    if "PPO" in name:
        algo = tn.rlvr.PPO("ppo_value", ppo_epochs=2, mask_truncated=False, value_head={"warmup": 1})
    tc = old.restore(facts["artifact_id"])
    trainer = write.trainer_of(tn, tc, algo)
    result = trainer.run(steps=4, resume_from=facts["artifact_id"], show=False).result()
    assert result.state == "FINISHED"
    assert trainer.row == 4, "rows of metrics are numbered on from the second"


# privacy


@pytest.mark.parametrize("name", PRIVATE)
def test_every_account_claims_what_it_did(old: tn.ServiceClient, name: str) -> None:
    facts = STATES[name]
    found = write.claims(old.restore(facts["artifact_id"]))
    epsilon = facts["epsilon"]
    assert found["epsilon"] == (None if epsilon is None else pytest.approx(epsilon, rel=1e-6))
    for said in ("unit", "steps", "claimed_by", "void"):
        assert found[said] == facts[said]


def test_an_account_goes_on_where_it_stood(old: tn.ServiceClient) -> None:
    facts = STATES["private: poisson"]
    tc = old.restore(facts["artifact_id"])
    tc.fit(tc.dp_batches(write.ROWS, steps=1), show=False).result()
    assert tc.privacy_statement().epsilon == pytest.approx(facts["after a step"], rel=1e-6)
    assert old.verify_audit_log().ok


def test_a_budget_that_was_spent_stays_spent(old: tn.ServiceClient) -> None:
    tc = old.restore(STATES["private: budget spent"]["artifact_id"])
    (draw,) = tc.dp_batches(write.ROWS, steps=1)
    tc.forward_backward(draw)
    with pytest.raises(tn.DPBudgetExceededError):
        tc.optim_step().result()


# audit log and keys


def test_the_audit_log_verifies_with_every_checkpoint_as_its_anchor(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed = sorted((home / "artifacts").rglob("*.tsnb"))
    anchors = [argument for path in sealed for argument in ("--artifact", str(path))]
    assert cli.main(["audit", "verify", "--anchor", EXPECTED["audit"]["head"], *anchors]) == 0
    assert f"ok: {EXPECTED['audit']['records']} records checked" in capsys.readouterr().out


def test_the_audit_log_is_read_and_goes_on(old: tn.ServiceClient) -> None:
    records = EXPECTED["audit"]["records"]
    logs = old.get_audit_logs(limit=records)
    assert [entry.seq for entry in logs] == list(range(records - 1, -1, -1))
    assert {"forward_backward", "optim_step", "save_state", "load_state", "delete_artifact", "dp_charge"} <= {
        entry.operation for entry in logs
    }
    with contextlib.closing(old.restore("best ✓")) as tc:
        tc.save_state(name="of today").result()
    verified = old.verify_audit_log(anchors=[EXPECTED["audit"]["head"]])
    assert verified.ok and verified.records > records


def test_its_keys_are_there_and_rotate(old: tn.ServiceClient, home: Path) -> None:
    infos = [info for info in write.keys().infos() if info.source == "file"]
    assert [[info.key_id, info.retired] for info in infos] == EXPECTED["keys"]
    others = len(EXPECTED["sealed by others"])
    write.keys().new()
    assert old.rotate_keys() == len(EXPECTED["artifacts"]) - others
    np.testing.assert_allclose(write.scores(old.restore("best ✓")), STATES["LoRA"]["logprobs"], **CLOSE)
