"""The built-in losses against plain torch, their gradients against finite differences, and through the engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.losses import LossOutputs, resolve_loss
from tests.close import assert_close

P, D, K = 4, 3, 2
TOKENS = {"input_ids": torch.zeros(2 * P, 1), "labels": torch.zeros(2 * P, dtype=torch.long)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def evaluate(name: str, view: str, value: Tensor, batch: Any = None, **kwargs: Any) -> Any:
    """Call a loss on outputs of which only one view is there."""
    return resolve_loss(name, **kwargs)(SimpleNamespace(**{view: value}), {**TOKENS, **(batch or {})})


def mean(name: str, view: str, value: Tensor, batch: Any = None, **kwargs: Any) -> Tensor:
    answer = evaluate(name, view, value, batch, **kwargs)
    return answer.total / answer.weight


# token_ce

LABELS = torch.tensor([3, 0, 2, 2, 1])


def outputs_of(hidden: Tensor, chunk_rows: int | None = None) -> LossOutputs:
    ids = LABELS.unsqueeze(0)
    return LossOutputs(
        hidden, lambda states: states, ids, torch.ones_like(ids), chunk_rows=chunk_rows, head_is_frozen=True
    )


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 2, "label_smoothing": 0.3}]
)
def test_token_ce_is_torchs_cross_entropy_of_the_labelled_tokens(
    options: dict[str, Any], chunk_rows: int | None
) -> None:
    logits = noise(1, 5, 4)
    loss = resolve_loss("token_ce", **options)
    batch = {"labels": LABELS, "input_ids": LABELS.unsqueeze(0)}

    def value(logits: Tensor) -> Tensor:
        answer = loss(outputs_of(logits, chunk_rows), batch)
        assert answer.weight == (3 if "ignore_index" in options else 5)
        return answer.total / answer.weight

    assert torch.allclose(value(logits), F.cross_entropy(logits[0], LABELS, **options), atol=1e-12)
    assert torch.autograd.gradcheck(value, (logits,))


def test_token_ce_of_no_token_at_all_is_0_and_weighs_nothing() -> None:
    batch = {"labels": LABELS, "input_ids": LABELS.unsqueeze(0)}
    value = resolve_loss("token_ce", ignore_index=2)(
        outputs_of(noise(1, 5, 4)), batch | {"labels": LABELS * 0 + 2}
    )
    assert (value.total.item(), value.weight) == (0, 0)


# margin_ranking


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_margin_ranking_is_torchs_margin_ranking_loss_of_chosen_and_rejected(margin: float) -> None:
    scores = noise(2 * P)
    chosen, rejected = scores.view(P, 2).unbind(1)
    reference = F.margin_ranking_loss(chosen, rejected, torch.ones(P), margin=margin)
    answer = evaluate("margin_ranking", "sequence_logprobs", scores, margin=margin)
    assert answer.weight == P
    assert torch.allclose(answer.total / P, reference, atol=1e-12)
    assert answer.metrics["accuracy"] == sum(chosen > rejected) / P
    assert answer.metrics["margin_mean"] == pytest.approx((chosen - rejected).mean().item())
    assert answer.metrics["chosen_logprobs"] == pytest.approx(chosen.mean().item())
    assert torch.autograd.gradcheck(
        lambda scores: mean("margin_ranking", "sequence_logprobs", scores, margin=margin), (scores,)
    )


def test_margin_ranking_lets_a_pair_alone_that_is_far_enough_apart() -> None:
    scores = torch.tensor([0.0, -2.0, -1.0, 0.0], requires_grad=True)
    mean("margin_ranking", "sequence_logprobs", scores, margin=1.5).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [0, 0, -0.5, 0.5]


# contrastive


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_contrastive_is_the_cross_entropy_of_partners_both_ways(temperature: float) -> None:
    embeddings = noise(2 * P, D)
    first, second = embeddings[0::2], embeddings[1::2]
    cosines = F.cosine_similarity(first.unsqueeze(1), second.unsqueeze(0), dim=-1)  # (P, P)
    rows, columns = ((cosines / temperature).log_softmax(way).diagonal() for way in (1, 0))
    reference = -(rows.mean() + columns.mean()) / 2
    answer = evaluate("contrastive", "embeddings", embeddings, temperature=temperature)
    assert answer.weight == P
    assert torch.allclose(answer.total / P, reference, atol=1e-10)
    assert answer.metrics["similarity"] == pytest.approx(cosines.diagonal().mean().item())
    right = (cosines.argmax(1) == torch.arange(P)).sum() + (cosines.argmax(0) == torch.arange(P)).sum()
    assert answer.metrics["accuracy"] == right / (2 * P)
    assert torch.autograd.gradcheck(
        lambda embeddings: mean("contrastive", "embeddings", embeddings, temperature=temperature),
        (embeddings,),
    )


def test_contrastive_of_one_pair_is_0_and_its_temperature_is_above_0() -> None:
    one = noise(2, D)
    answer = resolve_loss("contrastive")(SimpleNamespace(embeddings=one), {"input_ids": one, "labels": one})
    assert (answer.total.item(), answer.metrics["accuracy"]) == (0, 1)
    with pytest.raises(tn.ValidationError, match="temperature=0 must be above 0"):
        evaluate("contrastive", "embeddings", one, temperature=0)


# mse


@pytest.mark.parametrize("read", [None, "list", "array", "tensor"])
def test_mse_is_torchs_mse_of_the_read_out_embeddings(read: str | None) -> None:
    embeddings, matrix = noise(2 * P, D), noise(D, K, seed=1).detach()
    readout = {None: None, "list": matrix.tolist(), "array": matrix.numpy(), "tensor": matrix}[read]
    predicted = embeddings if read is None else embeddings @ matrix
    targets = noise(*predicted.shape, seed=2).detach()
    loss = lambda embeddings: mean("mse", "embeddings", embeddings, {"targets": targets}, readout=readout)  # noqa: E731
    assert torch.allclose(loss(embeddings), F.mse_loss(predicted, targets), atol=1e-12)
    assert torch.autograd.gradcheck(loss, (embeddings,))


def test_mse_gives_one_value_per_row_and_takes_a_view_of_ones_own() -> None:
    scores, targets = noise(2 * P), torch.arange(2 * P)
    answer = resolve_loss("mse", predictions=lambda outputs, batch: outputs.sequence_logprobs.unsqueeze(1))(
        SimpleNamespace(sequence_logprobs=scores), TOKENS | {"targets": targets}
    )
    assert answer.weight == 2 * P
    assert torch.allclose(answer.total, (scores - targets).square().sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"predictions have shape \(8, 3\), the targets \(8, 2\).*readout"),
        ({"readout": np.ones((2, 2))}, r"readout has shape \(2, 2\): expected \(3, numbers per target\)"),
        ({"readout": [1.0, 2.0, 3.0]}, r"readout has shape \(3,\)"),
        ({"readout": [[1, 2]] * 3, "predictions": lambda outputs, batch: outputs.embeddings}, r"not both"),
    ],
)
def test_mse_says_which_shape_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        evaluate("mse", "embeddings", noise(2 * P, D), {"targets": torch.zeros(2 * P, K)}, **options)


# through the engine


def pairs(targets: bool = False) -> tn.BatchData:
    rng = np.random.default_rng(0)
    extras = {"targets": rng.normal(size=(2 * P, K))} if targets else {}
    lengths = rng.integers(3, 11, 2 * P)
    return tn.BatchData(rng.integers(3, 200, (2 * P, 10)), np.arange(10) < lengths[:, None], None, extras)


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=4, alpha=4)))
    for _, parameter in engine.model.trainable:
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    return engine


def options_of(name: str, engine: Engine) -> dict[str, Any]:
    width = engine.model.causal.config.hidden_size
    return {
        "margin_ranking": {"margin": 3.0},
        "contrastive": {"temperature": 0.5},
        "mse": {"readout": np.random.default_rng(1).normal(size=(width, K))},
    }[name]


@pytest.mark.parametrize("name", ["margin_ranking", "contrastive", "mse"])
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(engine: Engine, name: str) -> None:
    found = []
    loss = resolve_loss(name, **options_of(name, engine))
    size = 0.0  # of what a metric is a difference of: the sums of logprobs that the ranking compares
    if name == "margin_ranking":
        size = float(np.abs(engine.compute_logprobs(pairs()).logprobs.sum(1)).max())
    for tokens in (16_384, 45, 1):
        engine.forward_pass.micro_batch_tokens = tokens
        result = engine.forward_backward(pairs(targets=name == "mse"), loss)
        found.append(
            (result, torch.cat([p.grad.flatten() / engine.window.divisor for p in engine.parameters]))
        )
        engine.discard_gradients()
    (whole, expected), *parts = found
    for result, gradient in parts:
        assert_close(result.loss, whole.loss)
        assert result.metrics.keys() == whole.metrics.keys()
        for metric, value in whole.metrics.items():
            assert_close(result.metrics[metric], value, at_least=size)
        assert_close(gradient, expected)
    engine.forward_pass.micro_batch_tokens = 16_384


@pytest.mark.parametrize("name", ["margin_ranking", "contrastive", "mse"])
def test_gradients_equal_a_plain_implementation_on_the_models_own_output(engine: Engine, name: str) -> None:
    batch, options = pairs(targets=name == "mse"), options_of(name, engine)
    engine.forward_backward(batch, resolve_loss(name, **options))
    found = [p.grad / engine.window.divisor for p in engine.parameters]
    engine.discard_gradients()
    answer = engine.model.causal(
        input_ids=torch.from_numpy(batch.input_ids),
        attention_mask=torch.from_numpy(batch.attention_mask),
        output_hidden_states=True,
    )
    expected = torch.autograd.grad(plainly(name, answer, batch, **options), engine.parameters)
    assert_close(found, expected)


def plainly(name: str, answer: Any, batch: tn.BatchData, **options: Any) -> Tensor:
    """Write each loss down again, from the logits and hidden states of a padded batch."""
    if name == "margin_ranking":
        labels = torch.from_numpy(batch.labels)
        losses = F.cross_entropy(answer.logits.transpose(1, 2), labels, reduction="none")
        chosen, rejected = -losses.sum(1)[0::2], -losses.sum(1)[1::2]
        return (options["margin"] - chosen + rejected).clamp(min=0).mean()
    kept = torch.from_numpy(batch.attention_mask).bool()
    means = torch.stack([row[mask].mean(0) for row, mask in zip(answer.hidden_states[-1], kept, strict=True)])
    if name == "mse":
        return F.mse_loss(
            means @ torch.tensor(options["readout"]).float(), torch.tensor(batch.extras["targets"]).float()
        )
    unit = means / means.norm(dim=1, keepdim=True)
    scores = unit[0::2] @ unit[1::2].T / options["temperature"]
    return (F.cross_entropy(scores, torch.arange(P)) + F.cross_entropy(scores.T, torch.arange(P))) / 2


@pytest.mark.parametrize("name", ["margin_ranking", "contrastive"])
def test_a_few_steps_teach_the_order_and_the_partners_of_pairs(name: str) -> None:
    config = tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 1e-2})
    engine, loss = Engine(config), resolve_loss(name)
    before = engine.forward(pairs(), loss)
    for _ in range(8):
        engine.forward_backward(pairs(), loss)
        engine.optim_step()
    after = engine.forward(pairs(), loss)
    assert after.loss < before.loss
    assert after.metrics["accuracy"] >= before.metrics["accuracy"]
