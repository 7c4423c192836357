"""Checkpoints: exact, all or nothing, and never in the way."""

import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.events import CheckpointSaved, StateLoaded
from tensafe_nb.protocol.results import StateSource
from tests.close import assert_close
from tests.parity.serving import engine_of

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor")


def training_batch(seed: int, rows: int = 3) -> tn.BatchData:
    return tn.BatchData(np.random.default_rng(seed).integers(5, 900, (rows, 9)))


def weights(tc: tn.TrainingClient) -> dict[str, torch.Tensor]:
    """What is trained, read where it lies."""
    return {name: parameter.detach().clone() for name, parameter in engine_of(tc).model.trainable}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def settings(optimizer: str, lora: bool) -> dict[str, Any]:
    adapter = tn.LoRAConfig(rank=4, dropout=0.2, bias="lora_only") if lora else None
    schedule = {"schedule": "cosine", "warmup_steps": 2, "total_steps": 8}
    return {"lora_config": adapter, "optimizer": {"name": optimizer, "learning_rate": 1e-2, **schedule}}


def first_half(tc: tn.TrainingClient) -> None:
    for seed in range(3):
        tc.forward_backward(training_batch(seed))
        tc.optim_step()
    tc.sample("def f", max_new_tokens=2)
    tc.forward_backward(training_batch(10, rows=2))  # the window of step 4 is open when the state is saved


def second_half(tc: tn.TrainingClient) -> list[Any]:
    handles: list[Any] = [tc.forward_backward(training_batch(11)), tc.optim_step()]
    for seed in range(12, 15):
        handles += [tc.forward_backward(training_batch(seed)), tc.optim_step()]
    handles.append(tc.sample(["def g", "import"], max_new_tokens=5))
    return [handle.result() for handle in handles]


@pytest.mark.transports("embedded", soak="http")
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_save_load_continue_equals_never_having_stopped_bit_for_bit(
    service: tn.ServiceClient, optimizer: str, lora: bool
) -> None:
    config = tn.TrainingConfig(**settings(optimizer, lora))
    tc = service.create_training_client(config)
    first_half(tc)
    saved = tc.save_state(name="half")
    expected = second_half(tc)
    other = service.create_training_client(config)
    other.forward_backward(training_batch(99)), other.optim_step(), other.forward_backward(training_batch(98))
    fresh = service.create_training_client(config)
    for restored in (other, fresh):
        loaded = restored.load_state(saved.artifact_id)
        assert (loaded.step, loaded.status, loaded.optimizer_restored) == (3, "READY", True)
        found = second_half(restored)
        assert [r.loss for r in found[::2][:4]] == [r.loss for r in expected[::2][:4]]
        assert [r.grad_norm for r in found[:-1]] == [r.grad_norm for r in expected[:-1]]
        assert found[-1].sequences == expected[-1].sequences
        assert_equal(weights(restored), weights(tc))
    assert fresh.history["loss"].tolist() == tc.history["loss"][3:].tolist(), (
        "the open window's loss came along"
    )
    assert fresh.policy_version == tc.policy_version
    assert other.policy_version > tc.policy_version, "a version never names two different weights"


def test_a_restored_client_has_the_configuration_and_goes_on_exactly(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(**settings("adamw", True))
    first_half(tc)
    saved = tc.save_state()
    expected = second_half(tc)
    restored = service.restore(saved.artifact_id)
    assert restored.config == tc.config
    assert [r.loss for r in second_half(restored)[::2][:4]] == [r.loss for r in expected[::2][:4]]
    assert_equal(weights(restored), weights(tc))
    changed = service.restore(saved.artifact_id, optimizer={"learning_rate": 5e-4})
    assert changed.config.optimizer == tc.config.optimizer.replace(learning_rate=5e-4)


def test_a_restored_client_whose_state_does_not_open_is_in_error(service: tn.ServiceClient, tc: Any) -> None:
    saved = tc.save_state().result()
    restored = service._transport.create(
        tc.config.replace(lora_config={"rank": 2}), StateSource(artifact_id=saved.artifact_id)
    )
    with pytest.raises(tn.ValidationError, match=r"lora_config\.rank: 4 there, 2 here"):
        restored.ready().result()
    assert restored.info().status == "ERROR"


def test_the_result_tells_what_was_saved(service: tn.ServiceClient, tc: tn.TrainingClient) -> None:
    metadata = {"epoch": 1, "validation_loss": np.float32(0.5), "tags": ["a", None, True]}
    saved = tc.save_state(metadata=metadata, name="first ✓").result()
    stored = service.get_artifact("first ✓")
    assert stored == saved == service.get_artifact(saved.artifact_id) == service.list_artifacts()[0]
    assert saved.metadata == {"epoch": 1, "validation_loss": 0.5, "tags": ["a", None, True]}
    assert (saved.artifact_type, saved.step, saved.model_ref) == ("checkpoint", 0, "builtin:tiny")
    assert saved.saved_by == tc.training_client_id
    assert saved.encryption.algorithm == "AES-256-GCM" and saved.content_hash.startswith("sha256:")
    data = service.pull_artifact(saved.artifact_id)
    assert len(data) == saved.size_bytes and saved.encryption.key_id.encode() in data
    assert b"validation_loss" not in data and b"first" not in data, "what the user wrote is sealed"


def test_without_the_optimizer_a_state_is_smaller_and_says_so(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch), tc.optim_step()
    whole, part = tc.save_state().result(), tc.save_state(include_optimizer=False).result()
    assert part.size_bytes < 0.5 * whole.size_bytes
    other = service.create_training_client(tc.config.replace(optimizer={"name": "sgd"}))
    assert other.load_state(part.artifact_id).optimizer_restored is False
    assert_equal(weights(other), weights(tc))


def test_differences_are_listed_and_nothing_is_loaded(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch), tc.optim_step()
    saved = tc.save_state().result()
    other = service.create_training_client(
        model_ref="builtin:sums",
        lora_config=tn.LoRAConfig(rank=2, target_modules=("q_proj",)),
        optimizer={"name": "sgd"},
    )
    other.forward_backward(tn.BatchData([[1, 2, 3]]))
    before = other.save_state().result() and weights(other)
    with pytest.raises(tn.ValidationError) as refused:
        other.load_state(saved.artifact_id).result()
    names = [name for name, *_ in refused.value.details["differences"]]
    assert names == ["model_ref", "lora_config.rank", "lora_config.target_modules", "optimizer.name"]
    assert "'builtin:tiny' there, 'builtin:sums' here" in str(refused.value)
    assert_equal(weights(other), before)
    assert other.optim_step().step == 1, "the open window is still there"
    full = service.create_training_client()
    with pytest.raises(tn.ValidationError, match="'LoRA of rank 4' there, 'all weights' here"):
        full.load_state(saved.artifact_id).result()


def test_other_base_weights_under_the_same_name_are_noticed(
    service: tn.ServiceClient,
    random_model: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    monkeypatch.chdir(tmp_path)
    config = tn.TrainingConfig(model_ref="model", lora_config=tn.LoRAConfig(rank=2))
    saved = service.create_training_client(config).save_state().result()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(tn.ValidationError, match="other weights under the same name"):
        service.create_training_client(config).load_state(saved.artifact_id).result()


def test_an_unknown_artifact_is_named_and_bad_input_is_refused_in_the_call(tc: tn.TrainingClient) -> None:
    with pytest.raises(tn.errors.ArtifactNotFoundError, match="art-nope"):
        tc.load_state("art-nope").result()
    with pytest.raises(tn.ValidationError, match=r"load_state: artifact_id=None must be a text\.$"):
        tc.load_state(None)  # type: ignore[arg-type]
    with pytest.raises(tn.ValidationError, match="id or name"):
        tc.load_state("")
    with pytest.raises(tn.ValidationError, match=r"include_optimizer=array.* must be True or False"):
        tc.load_state("art-nope", include_optimizer=np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(tn.ValidationError, match=r"metadata\['loss'\] is nan"):
        tc.save_state(metadata={"loss": float("nan")})
    with pytest.raises(tn.ValidationError, match=r"metadata\['model'\]"):
        tc.save_state(metadata={"model": object()})
    with pytest.raises(tn.ValidationError, match="name="):
        tc.save_state(name="")


def test_an_altered_artifact_is_refused_and_the_client_goes_on_unchanged(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData, core_home: Any
) -> None:
    saved = tc.save_state().result()
    tc.forward_backward(batch), tc.optim_step().result()
    before = weights(tc)
    (stored,) = core_home.artifacts().rglob(f"*{saved.artifact_id}*")
    data = bytearray(stored.read_bytes())
    data[-1000] ^= 1
    stored.write_bytes(bytes(data))
    with pytest.raises(tn.errors.DecryptionError):
        tc.load_state(saved.artifact_id).result()
    stored.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(tn.errors.DecryptionError):
        tc.load_state(saved.artifact_id).result()
    assert_equal(weights(tc), before)
    assert tc.step == 1
    service.delete_artifact(saved.artifact_id)
    assert not stored.exists(), "what is damaged can be thrown away"


def test_a_state_goes_to_another_home_as_a_file_and_back(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path
) -> None:
    tc.forward_backward(batch), tc.optim_step()
    saved = tc.save_state(name="mine").result()
    path = service.pull_artifact("mine", to=tmp_path / "checkpoint.bin")
    assert path.read_bytes() == service.pull_artifact(saved.artifact_id)
    service.delete_artifact(saved.artifact_id)
    assert service.list_artifacts() == []
    with pytest.raises(tn.errors.ArtifactNotFoundError):
        service.get_artifact(saved.artifact_id)
    assert service.push_artifact(path) == saved
    assert service.restore("mine").load_state("mine").step == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
@pytest.mark.transports("embedded", soak="http")
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_an_exported_adapter_gives_plain_peft_and_transformers_the_same_logits(
    service: tn.ServiceClient, batch: tn.BatchData, tmp_path: Path, merged: bool
) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 0.1})
    tc.forward_backward(batch), tc.optim_step()
    folder = service.export_adapter(tc.save_state().artifact_id, tmp_path / "out", merged=merged)
    model: Any
    if merged:
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        from tensafe_nb.engine.models.load import ASSETS

        model = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32), folder
        )
    ids = torch.tensor(batch.input_ids)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.log_softmax(-1)
    expected = tc.forward(batch, return_logprobs=True).logprobs
    labelled = torch.tensor(batch.labels).clamp(min=0)
    found = logits.gather(2, labelled.unsqueeze(2)).squeeze(2).numpy() * (batch.labels != -100)
    assert_close(found, expected, at_least=1)
    assert AutoTokenizer.from_pretrained(folder)("def f")["input_ids"] == tc.tokenizer("def f")["input_ids"]
    with pytest.raises(tn.ValidationError, match="not an empty folder"):
        service.export_adapter(service.list_artifacts()[0].artifact_id, folder)


def test_a_fork_shares_the_frozen_weights_and_nothing_else(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch), tc.optim_step()
    branch = tc.fork(optimizer={"learning_rate": 1e-3})
    tc.forward_backward(batch), tc.optim_step().result()
    first, second = (engine_of(client).model.causal for client in (tc, settled(branch)))
    frozen = {n: p for n, p in first.named_parameters() if not p.requires_grad}
    mine = dict(second.named_parameters())
    assert all(mine[name].data_ptr() == parameter.data_ptr() for name, parameter in frozen.items())
    trained = weights(tc)
    assert all(mine[name].data_ptr() != dict(first.named_parameters())[name].data_ptr() for name in trained)
    assert (branch.step, tc.step) == (1, 2)
    assert branch.config.optimizer == tc.config.optimizer.replace(learning_rate=1e-3)
    assert branch in [service.get_training_client(branch.training_client_id)]
    tc.close()
    branch.forward_backward(batch)
    assert branch.optim_step().learning_rate == 1e-3
    with pytest.raises(tn.ValidationError, match="lora_config cannot change"):
        branch.fork(lora_config={"rank": 2})


def settled(tc: tn.TrainingClient) -> tn.TrainingClient:
    tc.forward(training_batch(0)).result()
    return tc


def test_a_fork_of_another_optimizer_starts_its_moments_at_zero(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch), tc.optim_step()
    branch = tc.fork(optimizer={"name": "sgd", "learning_rate": 0.1})
    branch.forward_backward(batch), branch.optim_step()
    assert branch.save_state().step == 2


def test_checkpoints_are_events_of_the_history(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    saved = tc.save_state().result()
    tc.forward_backward(batch), tc.optim_step()
    tc.load_state(saved.artifact_id).result()
    found = [e for e in tc.history.events() if isinstance(e, CheckpointSaved | StateLoaded)]
    assert [(type(e).__name__, e.artifact_id, e.step) for e in found] == [
        ("CheckpointSaved", saved.artifact_id, 0),
        ("StateLoaded", saved.artifact_id, 0),
    ]
    assert tc.step == 0


def test_what_happened_is_in_the_audit_log(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path
) -> None:
    tc.forward_backward(batch), tc.optim_step()
    saved = tc.save_state().result()
    tc.load_state(saved.artifact_id).result()
    with pytest.raises(tn.ValidationError):
        tc.optim_step().result()
    logs = service.get_audit_logs()
    assert [entry.operation for entry in logs][:5] == [
        "optim_step",
        "load_state",
        "save_state",
        "optim_step",
        "forward_backward",
    ]
    assert [entry.success for entry in logs][:5] == [False, True, True, True, True]
    assert logs[0].error_code == "validation_error" and logs[0].error_message == "ValidationError"
    assert logs[1].artifact_ids_consumed == logs[2].artifact_ids_produced == (saved.artifact_id,)
    assert all(a.prev_hash == b.record_hash for a, b in itertools.pairwise(logs))
    assert {entry.training_client_id for entry in logs[:5]} == {tc.training_client_id}
    verified = service.verify_audit_log()
    assert verified.ok and verified.head == logs[0].record_hash
    header = service.pull_artifact(saved.artifact_id)[:4000]
    assert logs[3].record_hash.encode() in header, "the checkpoint is an anchor of the log"
    assert service.verify_audit_log(anchors=[logs[3].record_hash]).anchors_matched
    assert service.get_audit_logs(operation="save_state", limit=1)[0].artifact_ids_produced == (
        saved.artifact_id,
    )
    service.delete_artifact(saved.artifact_id)
    assert service.get_audit_logs(limit=1)[0].operation == "delete_artifact"


def test_the_audit_log_holds_nothing_of_the_data(
    service: tn.ServiceClient, tc: tn.TrainingClient, tmp_path: Path, core_home: Any
) -> None:
    tc.sample("my secret prompt", max_new_tokens=2)
    tc.save_state(metadata={"patient": "Jane"}, name="secret name").result()
    text = "".join(p.read_text() for p in core_home.audit().rglob("*") if p.is_file())
    assert not [word for word in ("secret", "Jane", "patient", str(tmp_path)) if word in text]
    assert json.loads(text.splitlines()[0])


def test_a_checkpoint_that_comes_next_is_written_though_the_client_is_closed(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch), tc.optim_step().result()
    kept, doomed, lost = tc.save_state(), tc.forward_backward(batch), tc.save_state()
    tc.close()
    assert kept.step == 1
    assert [handle.state for handle in (doomed, lost)] == ["CANCELLED", "CANCELLED"]


def test_a_window_that_was_broken_when_it_was_saved_is_broken_when_it_is_loaded(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch), tc.forward_backward({"input_ids": [[1, 999_999]]})
    saved = tc.save_state().result()
    restored = service.restore(saved.artifact_id)
    for client in (tc, restored):
        client.forward_backward(batch)
        with pytest.raises(tn.FutureFailedError, match="optim_step was not run"):
            client.optim_step().result()
        client.forward_backward(batch)
        assert client.optim_step().step == 1


@pytest.mark.transports("embedded", soak="http")
def test_forks_made_while_the_parent_scores_its_reference_are_whole(service: tn.ServiceClient) -> None:
    parent = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))
    saved, rows = parent.save_state().result(), tn.BatchData([[3, 4, 5, 6] * 6] * 100)
    expected = parent.forward(rows).loss
    for _ in range(5):
        scoring = [parent.compute_logprobs(rows, reference=True) for _ in range(3)]
        fork = parent.fork(saved.artifact_id)
        assert fork.forward(rows).loss == expected
        [handle.result() for handle in scoring]
        before = weights(parent)
        fork.forward_backward(rows), fork.optim_step().result()
        assert_equal(weights(parent), before)
        fork.close()


@pytest.mark.transports("embedded")  # the loss is the user's own code
def test_what_cannot_be_written_as_plain_data_is_still_audited(
    service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    def scaled(outputs: Any, batch: Any, by: Any = None) -> Any:
        return outputs.logprobs.mean() * by.sum()

    tc.forward_backward(batch, loss_fn=scaled, loss_kwargs={"by": torch.ones(2)}).result()
    assert service.get_audit_logs(limit=1)[0].operation == "forward_backward"


def test_a_key_that_cannot_be_had_is_an_error_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSAFE_KEK", "YWJj")
    with (
        tn.ServiceClient() as service,
        pytest.raises(tn.errors.KeyUnavailableError, match="exactly 32 random bytes"),
    ):
        service.create_training_client()


# runs


class Endless:
    """Batches that never end, and that can be iterated again."""

    def __iter__(self) -> Iterator[tn.BatchData]:
        seed = 0
        while True:
            yield training_batch(seed)
            seed += 1


@pytest.mark.transports("embedded", soak="http")
def test_an_interrupted_run_resumed_in_a_new_client_equals_one_that_was_not(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    rows = [{"text": f"def f{i}(x):\n    return x + {i}"} for i in range(23)]
    config = tn.TrainingConfig(**settings("adamw", True), batch_size=4, gradient_accumulation_steps=2)
    whole = service.create_training_client(config)
    expected = whole.fit(whole.batches(rows), steps=8, show=False).result()
    first = service.create_training_client(config)
    interrupted = first.fit(first.batches(rows), steps=5, checkpoint_every=5, show=False)
    interrupted.result()
    second = service.create_training_client(config)
    checkpoint = tn.load_run(interrupted.run_id).last_checkpoint
    assert checkpoint is not None
    run = second.fit(second.batches(rows), steps=8, resume_from=checkpoint, show=False)
    assert run.result().steps == 3 and (run.steps_done, second.step) == (8, 8)
    assert_equal(weights(second), weights(whole))
    assert second.history["loss"].tolist() == whole.history["loss"][5:].tolist()
    assert expected.steps == 8


def test_a_checkpoint_of_a_running_run_is_saved_between_its_steps_and_rollback_repeats_them(
    tc: tn.TrainingClient,
) -> None:
    run = tc.fit(Endless(), steps=10_000, show=False)
    run.pause()
    run.step(3)
    until(run, "PAUSED")
    saved = run.checkpoint(note="here").result()
    assert saved.step == tc.step and saved.metadata == {"note": "here"}
    run.step(4)
    until(run, "PAUSED", steps=saved.step + 4)
    after, losses = weights(tc), tc.history["loss"][-4:].tolist()
    loaded = run.rollback(saved.artifact_id).result()
    until(run, "PAUSED", steps=saved.step)
    assert loaded.step == tc.step == saved.step
    run.step(4)
    until(run, "PAUSED", steps=saved.step + 4)
    assert tc.history["loss"][-4:].tolist() == losses
    assert_equal(weights(tc), after)
    run.stop()
    assert run.result().steps == saved.step + 8
    assert run.checkpoint().step == saved.step + 4, "an ended run still saves"


def until(run: tn.TrainingRun, state: str, steps: int | None = None) -> None:
    import time

    while run.state != state or (steps is not None and run.steps_done != steps):
        time.sleep(0.005)


def test_a_rollback_to_what_no_run_saved_says_so_and_the_run_goes_on(tc: tn.TrainingClient) -> None:
    saved = tc.save_state().result()
    run = tc.fit(Endless(), steps=10_000, show=False)
    run.pause()
    run.step(2)
    until(run, "PAUSED")
    step = tc.step
    with pytest.raises(tn.ValidationError, match="not saved by a run of this kind"):
        run.rollback(saved.artifact_id).result()
    assert tc.step == step, "nothing was loaded"
    with pytest.raises(tn.errors.ArtifactNotFoundError):
        run.rollback("art-none").result()
    assert not run.done()
    run.stop()


def test_a_resume_on_fewer_batches_than_were_trained_on_is_refused(tc: tn.TrainingClient) -> None:
    run = tc.fit([training_batch(seed) for seed in range(5)], steps=4, checkpoint_every=4, show=False)
    run.result()
    checkpoint = tn.load_run(run.run_id).last_checkpoint
    assert checkpoint is not None
    resumed = tc.fit([training_batch(0)] * 2, steps=8, resume_from=checkpoint, show=False)
    with pytest.raises(tn.ValidationError, match="after 4 batches of a pass; there are only 2"):
        resumed.result()


def test_a_checkpoint_of_another_kind_of_run_is_refused_before_anything_is_loaded(
    service: tn.ServiceClient, tc: tn.TrainingClient
) -> None:
    run = tc.fit([training_batch(0)], steps=2, checkpoint_every=2, show=False)
    run.result()
    (saved,) = service.list_artifacts()
    other = service.create_training_client(tc.config)
    trainer = tn.rlvr.RLVRTrainer(other, ["a"], "exact_match", chat="never")
    resumed = trainer.run(steps=4, resume_from=saved.artifact_id, show=False)
    with pytest.raises(tn.ValidationError, match="not saved by a run of this kind"):
        resumed.result()
    assert other.step == 0


def test_a_generator_cannot_be_rolled_back(tc: tn.TrainingClient) -> None:
    run = tc.fit((training_batch(seed) for seed in range(1000)), steps=500, show=False)
    run.pause()
    run.step(2)
    until(run, "PAUSED")
    saved = run.checkpoint().result()
    run.step(2)
    until(run, "PAUSED", steps=saved.step + 2)
    with pytest.raises(tn.ValidationError, match="a generator, which cannot go back"):
        run.rollback(saved.artifact_id).result()


def test_a_checkpoint_the_user_deleted_first_is_no_reason_to_fail(
    service: tn.ServiceClient, tc: tn.TrainingClient
) -> None:
    run = tc.fit(Endless(), steps=8, checkpoint_every=2, keep_last=1, show=False)
    tc.subscribe(lambda e: service.delete_artifact(e.artifact_id) if isinstance(e, CheckpointSaved) else None)
    assert run.result().steps == 8


def test_retention_keeps_the_newest_and_the_best(service: tn.ServiceClient, tc: tn.TrainingClient) -> None:
    mine = tc.save_state(name="mine").result()
    batches = [training_batch(seed) for seed in range(3)]
    run = tc.fit(
        batches,
        steps=12,
        eval_batches=[training_batch(50)],
        eval_every=2,
        checkpoint_every=2,
        keep_last=2,
        keep_best="eval/loss",
        show=False,
    )
    run.result()
    steps, values = tc.history.series("eval/loss")
    best = int(steps[1:][np.argmin(values[1:])])
    kept = {
        artifact.step for artifact in service.list_artifacts() if artifact.artifact_id != mine.artifact_id
    }
    assert kept == {10, 12, best}
    assert service.get_artifact("mine") == mine, "what the user saved is never deleted"
    branch = run.fork(step=10)
    assert settled(branch).step == 10
    with pytest.raises(tn.ValidationError, match="no checkpoint of step 3"):
        run.fork(step=3)


def test_an_unknown_metric_to_keep_the_best_of_names_those_there_are(tc: tn.TrainingClient) -> None:
    run = tc.fit([training_batch(0)], steps=2, checkpoint_every=1, keep_best="eval/los", show=False)
    with pytest.raises(tn.ValidationError, match=r"There are: .*loss"):
        run.result()
    with pytest.raises(tn.ValidationError, match="need checkpoint_every"):
        tc.fit([training_batch(0)], keep_last=2)


def test_an_rl_run_resumed_in_a_new_client_equals_one_that_was_not(service: tn.ServiceClient) -> None:
    from tensafe_nb.rlvr import REINFORCE, RLVRTrainer

    config = tn.TrainingConfig(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 3e-3}
    )
    prompts = tn.datasets.sums(40, seed=1)

    def trainer(tc: tn.TrainingClient) -> RLVRTrainer:
        algo = REINFORCE(baseline="ema")
        return RLVRTrainer(tc, prompts, "exact_match", algo, prompts_per_step=6, max_new_tokens=4, seed=3)

    whole, first, second = (service.create_training_client(config) for _ in range(3))
    trainer(whole).run(steps=6, show=False).result()
    run = trainer(first).run(steps=3, checkpoint_every=3, show=False)
    run.result()
    saved = service.list_artifacts(first.training_client_id)[0].artifact_id
    trainer(second).run(steps=6, resume_from=saved, show=False).result()
    assert_equal(weights(second), weights(whole))
    assert second.history["reward"].tolist() == whole.history["reward"][3:].tolist()
    assert second.history["num_tokens"].tolist() == whole.history["num_tokens"][3:].tolist()


def test_conversations_with_an_environment_go_on_as_if_they_had_not_stopped(
    service: tn.ServiceClient,
) -> None:
    config = tn.TrainingConfig(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 3e-3}
    )
    sums = tn.datasets.sums(24, seed=1)
    rows = [{"sums": [one, other]} for one, other in zip(sums[::2], sums[1::2], strict=True)]

    def trainer(tc: tn.TrainingClient) -> tn.rlvr.RLVRTrainer:
        algo = tn.rlvr.REINFORCE(baseline="ema", mask_truncated=False)
        return tn.rlvr.RLVRTrainer(
            tc, rows, environment="sums", algo=algo, prompts_per_step=4, max_new_tokens=4, reward_timeout=None
        )

    whole, first, second = (service.create_training_client(config) for _ in range(3))
    trainer(whole).run(steps=4, show=False).result()
    trainer(first).run(steps=2, checkpoint_every=2, show=False).result()
    saved = service.list_artifacts(first.training_client_id)[0].artifact_id
    trainer(second).run(steps=4, resume_from=saved, show=False).result()
    assert_equal(weights(second), weights(whole))
    assert second.history["reward"].tolist() == whole.history["reward"][2:].tolist()


def test_an_unchanged_fork_of_an_rl_run_gives_the_same_rows(service: tn.ServiceClient) -> None:
    from tensafe_nb.events import Metrics

    config = tn.TrainingConfig(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 3e-3}
    )

    def run(tc: tn.TrainingClient, **options: Any) -> tn.TrainingRun:
        algo = tn.rlvr.PPO("grpo", ppo_epochs=2, minibatches=2, kl_coef=0.05)
        trainer = tn.rlvr.RLVRTrainer(
            tc,
            tn.datasets.sums(40, seed=1),
            "exact_match",
            algo,
            prompts_per_step=6,
            max_new_tokens=4,
            seed=3,
        )
        return trainer.run(show=False, **options)

    def rows(tc: tn.TrainingClient) -> list[dict[str, float]]:
        found = [e.values for e in tc.history.events() if isinstance(e, Metrics) and "reward" in e.values]
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "policy_version"))} for row in found
        ]

    parent = service.create_training_client(config)
    first = run(parent, steps=4, checkpoint_every=2)
    first.result()
    saved = service.list_artifacts(parent.training_client_id)[1]
    fork = first.fork(saved.artifact_id)
    run(fork, steps=4, resume_from=saved.artifact_id).result()
    assert len(rows(fork)) == 2 and rows(fork) == rows(parent)[2:]
    assert_equal(weights(fork), weights(parent))


def reinforced(tc: tn.TrainingClient, reward: Any, algo: Any, **options: Any) -> tn.TrainingRun:
    prompts = tn.datasets.sums(40, seed=1)
    trainer = tn.rlvr.RLVRTrainer(
        tc, prompts, reward, algo, prompts_per_step=4, max_new_tokens=4, seed=3, reward_timeout=None
    )
    return trainer.run(show=False, **options)


SUMS = tn.TrainingConfig(
    model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 3e-3}
)


def test_the_best_checkpoint_of_an_rl_run_is_that_of_the_best_row(service: tn.ServiceClient) -> None:
    tc, calls = service.create_training_client(SUMS), iter(range(10_000))

    def checklist(prompt: str, response: str, meta: Any = None) -> float:
        step, number = divmod(next(calls), 32)
        return [0.1, 0.2, 9.0, 5.0, 4.0][step] + 0.01 * (
            number % 2
        )  # the third step is the best, and all teach

    algo = tn.rlvr.PPO("grpo", ppo_epochs=2, mask_truncated=False)
    reinforced(tc, checklist, algo, steps=5, checkpoint_every=1, keep_best="reward").result()
    assert np.argmax(tc.history["reward"]) == 2
    assert {artifact.step for artifact in service.list_artifacts()} == {6, 10}, (
        "two optimiser steps for each row"
    )


def test_a_rolled_back_run_with_minibatches_repeats_itself(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(SUMS)
    algo = tn.rlvr.PPO("grpo", ppo_epochs=2, minibatches=2, mask_truncated=False)
    run = reinforced(tc, "exact_match", algo, steps=100)
    run.pause()
    run.step(1)
    until(run, "PAUSED")
    done, saved = run.steps_done, run.checkpoint().result()
    run.step(2)
    until(run, "PAUSED", steps=done + 2)
    after = weights(tc)
    run.rollback(saved.artifact_id).result()
    until(run, "PAUSED", steps=done)
    run.step(2)
    until(run, "PAUSED", steps=done + 2)
    assert_equal(weights(tc), after)
    run.stop()


def test_one_algorithm_settles_the_reference_of_every_client_it_updates(service: tn.ServiceClient) -> None:
    algo = tn.rlvr.REINFORCE(kl_coef=0.1, kl_in="loss", mask_truncated=False)
    for _ in range(2):
        tc = service.create_training_client(SUMS)
        tc.forward_backward(tn.BatchData([[3, 4, 5, 6]])), tc.optim_step().result()  # it has trained before
        batch = tn.rlvr.PolicySampler(tc, 4, 4, seed=0).generate_trajectories(["12+34=", "7+5="])
        for number, trajectory in enumerate(batch):
            trajectory.reward = float(number % 2)
        assert algo.update(batch, tc).kl == pytest.approx(0, abs=1e-6), "the reference is the policy it found"


def test_a_fork_of_another_precision_is_loaded_in_it(service: tn.ServiceClient) -> None:
    fork = service.create_training_client(SUMS).fork(dtype="bfloat16")
    fork.freeze_reference().result()  # it is there now
    model = engine_of(fork).model.causal
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_rollback_that_fails_counts_no_steps(tc: tn.TrainingClient) -> None:
    run = tc.fit(Endless(), steps=10, show=False)
    run.pause()
    run.step(2)
    until(run, "PAUSED")
    for _ in range(2):
        with pytest.raises(tn.errors.ArtifactNotFoundError):
            run.rollback("nope").result()
    run.resume()
    assert run.result().steps == 10


def test_a_full_disk_stops_neither_the_worker_nor_the_history(
    tc: tn.TrainingClient, batch: tn.BatchData, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    tc.forward_backward(batch).result()
    channel: Any = tc._channel
    recorder = channel.bus if transport == "embedded" else channel._recorder
    log = recorder._log

    class Full:
        closed = False

        def __getattr__(self, name: str) -> Any:
            return getattr(log, name)

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    recorder._log = Full()
    assert tc.optim_step().step == 1
    assert caplog.text.count("No space left on device") == 1, "said once, not with every event"
    recorder._log = log
    tc.forward_backward(batch), tc.optim_step().result()
    assert [e.seq for e in tc.history.events()] == list(range(1, tc.history.last_seq + 1)), (
        "nothing is missing"
    )
