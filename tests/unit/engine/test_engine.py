"""The engine against plain torch: losses, gradients, micro-batches, padding, optimisers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.config import StepConfig
from tensafe_nb.engine import optimizers
from tensafe_nb.engine.engine import Engine
from tensafe_nb.losses import resolve_loss
from tests.close import assert_close
from tests.conftest import ARCHITECTURES

TOKEN_CE = resolve_loss("token_ce")
ADAPTERS = [None, tn.LoRAConfig(rank=4)]


def engine_of(**fields: Any) -> Engine:
    return Engine(tn.TrainingConfig(device="cpu", **fields))


def ragged(seed: int = 0, rows: int = 6, width: int = 12) -> tn.BatchData:
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 200, (rows, width))
    lengths = rng.integers(2, width + 1, rows)
    return tn.BatchData(ids, np.arange(width) < lengths[:, None])


def gradients(engine: Engine, batch: tn.BatchData, **options: Any) -> tuple[float, list[torch.Tensor]]:
    result = engine.forward_backward(batch, TOKEN_CE, **options)
    weight = engine.window.divisor
    found = [p.grad.clone() / weight for p in engine.parameters]
    engine.discard_gradients()
    return result.loss, found


@pytest.fixture(scope="module", params=ADAPTERS, ids=["all weights", "LoRA"])
def engine(request: pytest.FixtureRequest) -> Engine:
    engine = engine_of(lora_config=request.param)
    for _, parameter in engine.model.trainable:  # LoRA's B starts at zero: give every weight a gradient
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    return engine


@pytest.mark.parametrize("tokens", [1, 24, 36])
def test_micro_batches_equal_one_big_batch_ragged_or_not(engine: Engine, tokens: int) -> None:
    whole = gradients(engine, ragged())
    engine.forward_pass.micro_batch_tokens = tokens
    parts = gradients(engine, ragged())
    engine.forward_pass.micro_batch_tokens = 16_384
    assert_close(parts[0], whole[0])
    assert_close(parts[1], whole[1])


def test_accumulated_batches_equal_one_big_batch(engine: Engine) -> None:
    batch = ragged()
    whole = gradients(engine, batch)
    for start in range(0, 6, 2):
        engine.forward_backward(batch.rows(start, start + 2), TOKEN_CE)
    accumulated = [p.grad / engine.window.divisor for p in engine.parameters]
    engine.discard_gradients()
    assert_close(accumulated, whole[1])


@settings(max_examples=15)
@given(left=st.integers(0, 5), right=st.integers(0, 5), token=st.integers(0, 100))
def test_padding_never_changes_a_loss(engine: Engine, left: int, right: int, token: int) -> None:
    batch = ragged(rows=2)
    pads = ((0, 0), (left, right))
    padded = tn.BatchData(
        np.pad(batch.input_ids, pads, constant_values=token),
        np.pad(batch.attention_mask, pads),
        np.pad(batch.labels, pads, constant_values=-100),
    )
    assert_close(engine.forward(padded, TOKEN_CE).loss, engine.forward(batch, TOKEN_CE).loss)


@pytest.mark.parametrize("lora", [None, tn.LoRAConfig(rank=4, alpha=8)], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_equal_plain_torch_and_peft(
    random_model: Any, architecture: str, lora: Any
) -> None:
    folder = random_model(architecture)
    engine = engine_of(model_ref=folder, lora_config=lora, dtype="float32")
    batch = ragged(rows=3)
    loss, found = gradients(engine, batch)

    model = engine.model.peft or engine.model.causal
    model.eval()
    logits = model(
        input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
    ).logits
    reference = F.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), ignore_index=-100
    )
    expected = torch.autograd.grad(reference, engine.parameters)
    assert_close(loss, reference)
    assert_close(found, expected)


def test_a_model_whose_logits_are_more_than_head_of_body_takes_its_own_path(random_model: Any) -> None:
    assert engine_of(model_ref=random_model("llama"), dtype="float32").model.split
    assert not engine_of(model_ref=random_model("gemma2"), dtype="float32").model.split


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_an_optimiser_step_equals_torchs_own(name: str) -> None:
    config = tn.OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
    engine = engine_of(lora_config=tn.LoRAConfig(rank=2), optimizer=config)
    weights = [p.detach().clone().requires_grad_() for p in engine.parameters]
    reference = {
        "adamw": lambda: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
        "adam": lambda: torch.optim.Adam(weights, lr=1e-2, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(weights, lr=1e-2, weight_decay=0.1, momentum=0.9),
        "adafactor": lambda: torch.optim.Adafactor(weights, lr=1e-2, weight_decay=0.1),
    }[name]()
    for seed in range(3):
        engine.forward_backward(ragged(seed), TOKEN_CE)
        for weight, parameter in zip(weights, engine.parameters, strict=True):
            weight.grad = parameter.grad / engine.window.divisor
        reference.step()
        engine.optim_step()
    assert_close(engine.parameters, weights)


def test_gradients_are_clipped_to_the_global_norm_and_reported_before() -> None:
    plain = engine_of(optimizer={"name": "sgd", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0})
    clipped = engine_of(optimizer=plain.config.optimizer.replace(max_grad_norm=0.01))
    results = []
    for engine in (plain, clipped):
        engine.forward_backward(ragged(), TOKEN_CE)
        results.append(engine.optim_step())
    assert results[0].grad_norm == results[1].grad_norm > 0.01
    assert results[1].param_delta_norm == pytest.approx(0.01, rel=1e-3)
    assert results[0].param_delta_norm == pytest.approx(results[0].grad_norm, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.85355, 0.5, 0.14645]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    config = tn.OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2, total_steps=6)
    assert [optimizers.learning_rate(config, step) for step in range(6)] == pytest.approx(expected, abs=1e-4)


def test_dropout_is_on_in_training_only_and_repeats_with_the_seed() -> None:
    lora = tn.LoRAConfig(rank=4, dropout=0.5)
    runs = []
    for _ in range(2):
        engine = engine_of(lora_config=lora, optimizer={"learning_rate": 1e-2})
        losses = []
        for seed in range(3):
            losses.append(engine.forward_backward(ragged(seed), TOKEN_CE).loss)
            engine.optim_step()
        runs.append(losses)
        assert engine.forward(ragged(), TOKEN_CE).loss == engine.forward(ragged(), TOKEN_CE).loss
    assert runs[0] == runs[1]


def test_a_window_does_not_mix_sums_with_means(engine: Engine) -> None:
    batch = ragged(rows=2)
    extras = {"advantages": np.ones(batch.shape), "weights": np.ones(batch.shape)}
    engine.forward_backward(batch, TOKEN_CE)
    with pytest.raises(
        tn.ValidationError, match=r"cannot share an optimiser step.*optim_step\(\) in between"
    ):
        engine.forward_backward(
            tn.BatchData(batch.input_ids, batch.attention_mask, batch.labels, extras),
            resolve_loss("policy_reinforce"),
        )


def test_scores_of_labels_equal_a_log_softmax(engine: Engine) -> None:
    batch = ragged(rows=2)
    result = engine.compute_logprobs(batch, temperature=0.7)
    with torch.no_grad():
        logits = engine.model.causal(torch.from_numpy(batch.input_ids)).logits / 0.7
    scores = torch.log_softmax(logits, -1)
    labelled = batch.labels != -100
    expected = scores.gather(2, torch.from_numpy(np.where(labelled, batch.labels, 0)).unsqueeze(2)).squeeze(2)
    assert_close(result.logprobs, expected.numpy() * labelled)
    entropy = -(scores.exp() * scores).sum(-1).numpy() * labelled
    assert_close(result.entropy, entropy, within=1e-4)


def test_the_reference_of_a_fresh_adapter_is_the_base_model() -> None:
    engine = engine_of(lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 1e-1})
    before = engine.compute_logprobs(ragged()).logprobs
    engine.forward_backward(ragged(), TOKEN_CE)
    engine.optim_step()
    assert np.abs(engine.compute_logprobs(ragged()).logprobs - before).max() > 1e-3
    assert np.array_equal(engine.compute_logprobs(ragged(), reference=True).logprobs, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_config": tn.LoRAConfig(target_modules=("q_prj",))}, r"no layer named 'q_prj'.*'q_proj'"),
        ({"lora_config": tn.LoRAConfig(target_modules=())}, r"target_modules is empty"),
        (
            {"lora_config": tn.LoRAConfig(rank=10_000)},
            r"rank=10000 is larger than the smallest adapted layer",
        ),
        ({"model_ref": "builtin:tine"}, r"no built-in model 'builtin:tine'.*'builtin:tiny'"),
        ({"model_ref": "./no/such/folder"}, r"no folder './no/such/folder'"),
        ({"model_ref": "some-org/some-model"}, r"hub cannot be reached.*taken for a hub id"),
        ({"model_ref": "model.gguf"}, r"no file 'model.gguf'"),
    ],
)
def test_what_cannot_be_loaded_says_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((tn.ValidationError, tn.ModelLoadError), match=message):
        engine_of(**fields)


def test_a_broken_model_folder_says_what_it_should_hold(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(tn.ModelLoadError, match=r"config.json, model.safetensors and tokenizer.json"):
        engine_of(model_ref=str(tmp_path))


def test_a_stop_token_that_is_never_drawn_is_refused_with_the_size_of_the_vocabulary(engine: Engine) -> None:
    for token in (2048, 10**30):
        with pytest.raises(tn.ValidationError, match=f"stop_tokens holds {token}.*2,048 tokens, 0 to 2047"):
            engine.sample([[5]], tn.SamplingConfig(max_new_tokens=1, stop_tokens=[7, token]))


def test_a_token_outside_the_vocabulary_is_named(engine: Engine) -> None:
    size = engine.model.vocab_size
    with pytest.raises(tn.ValidationError, match=rf"input_ids\[1\]\[2\] is {size}: .*0 to {size - 1}"):
        engine.forward_backward(tn.BatchData([[1, 2, 3], [4, 5, size]]), TOKEN_CE)
    with pytest.raises(tn.ValidationError, match=r"labels\[0\]\[0\] is -7"):
        engine.forward_backward(tn.BatchData([[1, 2]], labels=[[-7, -100]]), TOKEN_CE)


def test_a_row_longer_than_the_context_is_refused(engine: Engine) -> None:
    context = engine.model.context
    with pytest.raises(tn.ValidationError, match=rf"reads at most {context}"):
        engine.forward(tn.BatchData(np.ones((1, context + 1)).astype(int)), TOKEN_CE)


def test_a_nan_loss_names_its_rows_and_leaves_the_weights(engine: Engine) -> None:
    def poisoned(outputs: Any, batch: Any) -> Any:
        return outputs.logits.sum() * math.nan

    before = [p.detach().clone() for p in engine.parameters]
    batch = ragged(rows=2)
    named = tn.BatchData(batch.input_ids, batch.attention_mask, batch.labels, example_ids=np.array([70, 71]))
    with pytest.raises(
        tn.NonFiniteLossError, match=r"'poisoned' is nan in rows 0 to 1.*examples 70, 71.*No weight"
    ):
        engine.forward_backward(named, resolve_loss(poisoned))
    with pytest.raises(tn.ValidationError, match=r"found no gradients"):
        engine.optim_step()
    assert all(map(torch.equal, before, engine.parameters))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_a_step_out_of_what_numbers_hold_is_refused_and_nothing_of_it_stays(optimizer: str) -> None:
    tried, never = (
        engine_of(lora_config=tn.LoRAConfig(rank=4), optimizer=tn.OptimizerConfig(name=optimizer))
        for _ in range(2)
    )
    for seed in range(3):
        for engine in (tried, never):
            engine.forward_backward(ragged(seed), TOKEN_CE)
            engine.optim_step()
        tried.forward_backward(ragged(9), TOKEN_CE)
        with pytest.raises(tn.NonFiniteLossError, match=r"learning rate 1e\+30 .*No weight has moved"):
            tried.optim_step(step=StepConfig(learning_rate=1e30))
    assert all(map(torch.equal, tried.parameters, never.parameters))


def test_a_window_of_weight_zero_moves_nothing(engine: Engine) -> None:
    def weightless(outputs: Any, batch: Any) -> Any:
        return {"loss": outputs.logits.mean(), "weight": 0.0}

    before = [p.detach().clone() for p in engine.parameters]
    engine.forward_backward(ragged(rows=2), resolve_loss(weightless))
    with pytest.raises(tn.ValidationError, match=r"have weight 0.*No weight has moved"):
        engine.optim_step()
    assert all(map(torch.equal, before, engine.parameters))


def test_extras_per_sequence_stay_so_in_every_micro_batch(engine: Engine) -> None:
    seen = []

    def watching(outputs: Any, batch: Any) -> Any:
        seen.append(tuple(batch["features"].shape))
        return outputs.logprobs.mean()

    mask = [[1] * 10, [1, 1, 1, 1] + [0] * 6]
    batch = tn.BatchData(np.full((2, 10), 5), mask, features=np.ones((2, 4)))
    engine.forward_pass.micro_batch_tokens = 10
    engine.forward(batch, resolve_loss(watching))
    engine.forward_pass.micro_batch_tokens = 16_384
    assert seen == [(1, 4), (1, 4)]


def test_biases_trained_along_leave_no_reference() -> None:
    engine = engine_of(lora_config=tn.LoRAConfig(rank=4, bias="all"))
    with pytest.raises(tn.ValidationError, match=r"trains the model's own biases"):
        engine.compute_logprobs(ragged(), reference=True)


def test_adapters_of_clients_made_at_once_are_the_same_for_the_same_seed() -> None:
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        engines = list(pool.map(lambda _: engine_of(lora_config=tn.LoRAConfig(rank=4), seed=7), range(6)))
    for engine in engines[1:]:
        assert all(map(torch.equal, engine.parameters, engines[0].parameters))


def test_a_damaged_file_names_the_model(random_model: Any, tmp_path: Any) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(random_model("llama"), folder)
    (folder / "model.safetensors").write_bytes(b"not a model")
    with tn.ServiceClient() as service:
        tc = service.create_training_client(model_ref=str(folder))
        with pytest.raises(tn.ModelLoadError, match=r"damaged.*could not be loaded"):
            tc.sample("x").result()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trained_biases_go_with_bfloat16(random_model: Any, architecture: str) -> None:
    lora = tn.LoRAConfig(rank=4, bias="all")
    engine = engine_of(model_ref=random_model(architecture), lora_config=lora, dtype="bfloat16")
    assert engine.forward_backward(ragged(), TOKEN_CE).loss > 0
    assert {p.dtype for p in engine.parameters} == {torch.float32}
