"""The views a loss reads: their values, and that what is not read is not computed."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.losses import LossOutputs, resolve_loss
from tests.close import assert_close
from tests.conftest import ARCHITECTURES

B, T, D, V = 3, 5, 4, 7
LABELS = torch.tensor([[1, 2, -100, 3, -100], [-100, 4, 5, -100, -100], [-100] * 5])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
WHERE = LABELS != -100
VIEWS = ("logits", "logprobs", "sequence_logprobs", "embeddings", "full_logits")


class Watched(nn.Module):
    """A head that notes of how many positions it was asked for logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V, dtype=torch.float64)
        self.asked: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.asked.append(hidden[..., 0].numel())
        return self.linear(hidden)


@pytest.fixture
def head() -> Watched:
    torch.manual_seed(0)
    return Watched()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


def test_views_hold_what_their_names_say(head: Watched, hidden: Tensor) -> None:
    outputs = LossOutputs(hidden, head, LABELS, MASK)
    everything = head.linear(hidden)
    chosen = everything.log_softmax(-1).gather(2, LABELS.clamp(min=0).unsqueeze(2)).squeeze(2) * WHERE
    assert torch.equal(outputs.full_logits, everything)
    assert torch.allclose(outputs.logits, everything[WHERE], atol=1e-12)
    assert torch.allclose(outputs.logprobs, chosen[WHERE], atol=1e-12)
    assert torch.allclose(outputs.sequence_logprobs, chosen.sum(1), atol=1e-12)
    means = torch.stack([row[mask.bool()].mean(0) for row, mask in zip(hidden, MASK, strict=True)])
    assert torch.allclose(outputs.embeddings, means, atol=1e-12)
    assert outputs.map_logits(lambda logits, labels: logits[:, 0]).equal(outputs.logits[:, 0])


@pytest.mark.parametrize(
    ("read", "computed", "asked"),
    [
        ((), set(), []),
        (("embeddings",), {"embeddings"}, []),
        (("logits",), {"logits"}, [5]),
        (("logprobs", "logits"), {"logits", "logprobs"}, [5]),
        (("sequence_logprobs", "sequence_logprobs"), {"logits", "logprobs", "sequence_logprobs"}, [5]),
        (("full_logits",), {"full_logits"}, [B * T]),
    ],
)
def test_what_is_not_read_is_not_computed_and_nothing_is_computed_twice(
    head: Watched, hidden: Tensor, read: tuple[str, ...], computed: set[str], asked: list[int]
) -> None:
    outputs = LossOutputs(hidden, head, LABELS, MASK)
    for view in read:
        getattr(outputs, view)
    assert set(VIEWS) & vars(outputs).keys() == computed
    assert head.asked == asked


def test_in_chunks_logprobs_never_ask_for_all_logits(head: Watched, hidden: Tensor) -> None:
    outputs = LossOutputs(hidden, head, LABELS, MASK, chunk_rows=2, head_is_frozen=True)
    assert len(outputs.sequence_logprobs) == B
    assert head.asked == [2, 2, 1]
    assert not {"logits", "full_logits"} & vars(outputs).keys()


@pytest.mark.parametrize("view", VIEWS)
def test_gradients_of_views_hold_up_to_finite_differences(head: Watched, hidden: Tensor, view: str) -> None:
    read = lambda hidden: getattr(LossOutputs(hidden, head, LABELS, MASK), view)  # noqa: E731
    assert torch.autograd.gradcheck(read, (hidden,))


def test_given_logits_are_used_as_they_are(head: Watched, hidden: Tensor) -> None:
    given = torch.randn(B, T, V)
    outputs = LossOutputs(hidden, head, LABELS, MASK, given, chunk_rows=1)
    assert torch.equal(outputs.full_logits, given)
    assert torch.equal(outputs.logits, given[WHERE])
    assert torch.equal(
        outputs.logprobs, given.log_softmax(-1)[WHERE].gather(1, LABELS[WHERE].unsqueeze(1))[:, 0]
    )
    assert head.asked == []


def test_views_of_a_bfloat16_model_are_float32() -> None:
    hidden = torch.ones(1, 300, D, dtype=torch.bfloat16)
    hidden[0, 0] = 301
    labels = torch.zeros(1, 300, dtype=torch.long)
    outputs = LossOutputs(hidden, nn.Linear(D, V, dtype=torch.bfloat16), labels, torch.ones_like(labels))
    assert all(getattr(outputs, view).dtype is torch.float32 for view in VIEWS)
    assert outputs.embeddings[0, 0] == pytest.approx((hidden[0, :, 0].float().mean()).item(), rel=1e-6)


# as the engine gives them


def looking_at(engine: Engine, batch: tn.BatchData) -> tuple[LossOutputs, dict[str, Tensor]]:
    """Return what a loss is given for a batch."""
    seen: list[Any] = []

    def looking(outputs: LossOutputs, tensors: Any) -> Tensor:
        seen.extend((outputs, tensors))
        return outputs.logits.sum()

    engine.forward(batch, resolve_loss(looking))
    return seen[0], seen[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_views_of_every_architecture_have_their_shapes_and_agree(
    random_model: Any, architecture: str
) -> None:
    engine = Engine(tn.TrainingConfig(model_ref=random_model(architecture), dtype="float32", device="cpu"))
    labels = np.where(WHERE, LABELS, -100)
    outputs, _ = looking_at(engine, tn.BatchData(np.ones((B, T), dtype=int), MASK.numpy(), labels))
    n, v = int(WHERE.sum()), engine.model.vocab_size
    with torch.no_grad():
        shapes = {view: tuple(getattr(outputs, view).shape) for view in VIEWS}
    assert shapes == {
        "logits": (n, v),
        "logprobs": (n,),
        "sequence_logprobs": (B,),
        "embeddings": (B, 32),
        "full_logits": (B, T, v),
    }
    assert_close(outputs.full_logits[WHERE], outputs.logits)
    assert_close(outputs.logprobs.sum(), outputs.sequence_logprobs.sum())
    assert outputs.sequence_logprobs[2] == 0


def test_entries_per_token_are_flattened_with_the_labels_and_entries_per_row_are_left_alone() -> None:
    engine = Engine(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=1)))
    per_token = np.arange(B * T, dtype=float).reshape(B, T)
    batch = tn.BatchData(
        np.ones((B, T), dtype=int), MASK.numpy(), LABELS.numpy(), values=per_token, score=[1.5, 2.5, 3.5],
        targets=per_token, words=["a", "b", "c"],
    )  # fmt: skip
    _, tensors = looking_at(engine, batch)
    assert tensors["labels"].tolist() == [1, 2, 3, 4, 5]
    assert tensors["sequence_index"].tolist() == [0, 0, 0, 1, 1]
    assert tensors["values"].tolist() == [0, 1, 3, 6, 7]
    assert tensors["score"].tolist() == [1.5, 2.5, 3.5]
    assert tensors["targets"].shape == (B, T)  # (B, K), though K happens to be T
    assert tensors["input_ids"].shape == tensors["attention_mask"].shape == (B, T)
    assert "words" not in tensors
