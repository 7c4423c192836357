"""Base weights are shared by who adapts the same model, and by nobody else; what one does, no other sees."""

import gc
import hashlib
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models import memory, reading
from tensafe_nb.engine.models.bases import BASES, MadeOnce
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.losses import resolve_loss
from tests.parity.serving import eventually

LORA = tn.LoRAConfig(rank=2)
BATCH = tn.BatchData([[5, 6, 7, 8], [9, 10, 11, 12]])


def load(model_ref: Any, *, alone: bool = False, served: bool = False, **config: Any) -> LoadedModel:
    made = tn.TrainingConfig(model_ref=str(model_ref), device="cpu", **{"lora_config": LORA, **config})
    return models.load(made, alone=alone, served=served)


def storages(model: LoadedModel, *, trained: bool) -> set[int]:
    return {
        parameter.untyped_storage().data_ptr()
        for parameter in model.causal.parameters()
        if parameter.requires_grad is trained
    }


def digest(model: LoadedModel) -> str:
    """Return a hash of the weights that others may be computing with."""
    assert model.base is not None
    found = hashlib.sha256()
    for parameter in model.base.causal.parameters():
        found.update(parameter.detach().float().numpy().tobytes())
    return found.hexdigest()


def test_two_adapters_of_one_model_share_its_frozen_tensors_and_nothing_else() -> None:
    first = load("builtin:tiny")
    assert first.base is not None
    before = first.base.references  # models of other tests may not be collected yet
    second = load("builtin:tiny", seed=1)
    assert storages(first, trained=False) == storages(second, trained=False)
    assert not storages(first, trained=True) & storages(second, trained=True)
    assert first.base is second.base and first.base.references == before + 1
    names = dict(first.causal.named_parameters())
    assert all(names[name] is not parameter for name, parameter in second.causal.named_parameters())
    mine = {id(module) for module in first.causal.modules()}
    assert not any(id(module) in mine for module in second.causal.modules())
    buffers = {buffer.data_ptr() for buffer in first.causal.buffers() if buffer.dtype is not torch.bool}
    assert not buffers & {buffer.data_ptr() for buffer in second.causal.buffers()}
    second.causal.register_forward_hook(lambda *_: pytest.fail("a hook of another model"))
    first.causal(input_ids=torch.tensor([[1, 2, 3]]))


def test_a_further_adapter_owns_its_adapter_and_buffers_and_no_other_tensor(random_model: Any) -> None:
    first, second = (load(random_model("llama"), seed=seed) for seed in range(2))
    theirs = {t.untyped_storage().data_ptr() for t in (*first.causal.parameters(), *first.causal.buffers())}
    tensors = [*second.causal.parameters(), *second.causal.buffers()]
    own = memory.size_of(t for t in tensors if t.untyped_storage().data_ptr() not in theirs)
    adapter = memory.size_of(parameter for _, parameter in second.trainable)
    buffers = memory.size_of(second.causal.buffers())
    assert adapter <= own <= adapter + buffers < memory.size_of(second.causal.parameters()) / 2


@pytest.fixture
def own_model(random_model: Any, tmp_path: Path) -> Path:
    """A folder that no other test has loaded: clients of theirs may be there still."""
    return Path(shutil.copytree(random_model("llama"), tmp_path / "own"))


def test_a_base_is_freed_with_the_last_model_that_shares_it(own_model: Path) -> None:
    first, second = load(own_model), load(own_model)
    weights = weakref.ref(first.base.causal)  # type: ignore[union-attr]
    assert first.base is second.base
    del first
    gc.collect()
    assert weights() is not None and second.base is not None and second.base.references == 1
    del second
    gc.collect()
    assert weights() is None


def test_other_types_files_rows_and_purposes_share_nothing(random_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    models_ = [load(folder, dtype="float32"), load(folder, dtype="bfloat16")]
    models_ += [load(folder, lora_config=None), load(folder, alone=True)]
    os.utime(folder / "model.safetensors", ns=(1, 1))  # another file, for all that is known
    models_ += [load(folder, dtype="float32")]
    every = [storages(m, trained=False) | storages(m, trained=True) for m in models_]
    assert not any(a & b for i, a in enumerate(every) for b in every[:i])
    assert [model.base is None for model in models_] == [False, False, True, True, False]


@pytest.mark.parametrize(
    "lora",
    [
        tn.LoRAConfig(rank=2, bias="all", dropout=0.1),
        tn.LoRAConfig(rank=2, bias="lora_only", modules_to_save=["lm_head"]),
        tn.LoRAConfig(rank=2, target_modules=["embed_tokens", "q_proj"]),
    ],
    ids=["biases", "a module", "the embedding"],
)
def test_training_sampling_and_scoring_leave_the_base_as_it_is(random_model: Any, lora: Any) -> None:
    model_ref = random_model("qwen2")  # it has biases
    one, other = (load(model_ref, lora_config=lora, dtype="float32") for _ in range(2))
    before, plain = digest(one), other.causal(input_ids=torch.tensor([[1, 2, 3]])).logits
    engine = Engine(tn.TrainingConfig(lora_config=lora, optimizer={"learning_rate": 0.1}), one)
    for _ in range(2):
        engine.forward_backward(BATCH, resolve_loss("token_ce"))
        engine.optim_step()
    engine.freeze_reference()
    engine.compute_logprobs(BATCH, reference=True)
    engine.sample([[1, 2, 3]], tn.SamplingConfig(max_new_tokens=20))
    assert digest(one) == before
    assert torch.equal(other.causal(input_ids=torch.tensor([[1, 2, 3]])).logits, plain)


def test_a_merged_export_leaves_the_base_of_others_as_it_is(tmp_path: Path) -> None:
    with tn.ServiceClient() as service:
        tc = service.create_training_client(lora_config=LORA, optimizer={"learning_rate": 0.1})
        tc.forward_backward(BATCH), tc.optim_step()
        saved = tc.save_state().result()
        beside = load("builtin:tiny")
        before = digest(beside)
        service.export_adapter(saved.artifact_id, tmp_path / "merged", merged=True)
        assert digest(beside) == before


def test_what_is_asked_for_together_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, together = [], threading.Barrier(4)
    theirs = reading.read

    def counted(*args: Any) -> Any:
        reads.append(args[0])
        return theirs(*args)

    def ask(seed: int) -> LoadedModel:
        together.wait()
        return load("builtin:sums", seed=seed, dtype="bfloat16")

    monkeypatch.setattr(reading, "read", counted)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, range(4)))
    assert reads == ["builtin:sums"] and {id(model.base) for model in found} == {id(found[0].base)}


def test_a_load_that_fails_is_tried_again_by_the_next() -> None:
    made: MadeOnce[Any] = MadeOnce()
    with pytest.raises(ZeroDivisionError):
        made.get("key", lambda: 1 / 0)
    assert made.get("key", lambda: LORA) is LORA


@pytest.mark.parametrize("slow", ["identity_of", "readable"], ids=["a slow disk", "a download"])
def test_a_slow_load_blocks_nobody_elses(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    reached, go = threading.Event(), threading.Event()
    theirs = getattr(models, slow)

    def waits(source: str, *args: Any, **kwargs: Any) -> Any:
        if "sums" in source:
            reached.set()
            assert go.wait(60)
        return theirs(source, *args, **kwargs)

    monkeypatch.setattr(models, slow, waits)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, "builtin:sums")
        try:
            assert reached.wait(20)
            assert load("builtin:tiny").base is not None and not loading.done()
        finally:
            go.set()
        assert loading.result().base is not None


def test_a_client_that_is_served_shares_its_tokenizer_and_a_users_is_its_own() -> None:
    mine, yours = load("builtin:tiny"), load("builtin:tiny")
    assert mine.tokenizer is not yours.tokenizer
    assert load("builtin:tiny", served=True).tokenizer is not mine.tokenizer
    one = load("builtin:tiny", served=True)
    assert load("builtin:tiny", served=True).tokenizer is one.tokenizer


def test_a_cell_that_is_run_again_shares_with_the_client_it_replaces_and_frees_both_at_the_end(
    own_model: Path,
) -> None:
    gc.collect()
    there = [*BASES.all()]

    def own() -> int:
        return sum(not any(base is other for other in there) for base in BASES.all())

    with tn.ServiceClient() as service:
        for _ in range(3):
            tc = service.create_training_client(model_ref=str(own_model), lora_config=LORA)
            tc.ready().result()
        assert own() == 1
        del tc

    def gone() -> bool:
        gc.collect()
        return own() == 0

    eventually(gone)
