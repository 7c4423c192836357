"""The gradients of units, written out or as factors, beside autograd on each unit alone: norms and weighted sums."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from tensafe_nb.privacy.dp_sgd import EPSILON, ClippedSum
from tensafe_nb.privacy.per_example import Factored, PerUnit, Use, WrittenOut, way_for

EXACT = 1e-6
TOKENS, WIDTH = 23, 12


class Small(nn.Module):
    """One layer of each kind that is known, with a head that may be the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids)
        hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        logits: Tensor = self.head(self.norm(hidden))  # the norm is used twice
        return logits


def loss_of(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum of losses on each next token, without padding."""
    logits = model(ids)
    labels = torch.where(torch.arange(ids.shape[1]) < lengths[:, None], ids, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")


def made(tied: bool, sizes: Sequence[int], columns: int, seed: int) -> tuple[Small, Tensor, Tensor]:
    """Return a model, tokens (B, T) with equal ones among them, and how many of each row are no padding."""
    torch.manual_seed(seed)
    rows = sum(sizes)
    ids, lengths = torch.randint(1, 6, (rows, columns)), torch.randint(2, columns + 1, (rows,))
    # in float64, so that what is compared is how gradients are put together, not the model's own rounding
    return Small(tied).double(), torch.where(torch.arange(columns) < lengths[:, None], ids, 0), lengths


def told_apart(model: nn.Module, sizes: Sequence[int], ids: Tensor, lengths: Tensor) -> list[PerUnit]:
    way = way_for(model, list(model.parameters()))
    assert way is not None
    with way.recording(sizes):
        loss_of(model, ids, lengths).backward()
    assert all(p.grad is None for p in model.parameters()) and "forward" not in model.head.__dict__
    return way.collect()


def one_by_one(model: Small, sizes: Sequence[int], ids: Tensor, lengths: Tensor) -> list[list[Tensor]]:
    """The oracle: autograd on each unit alone."""
    units = zip(ids.split(list(sizes)), lengths.split(list(sizes)), strict=True)
    return [list(torch.autograd.grad(loss_of(model, *unit), list(model.parameters()))) for unit in units]


@given(
    tied=st.booleans(),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    columns=st.integers(2, 20),
    seed=st.integers(0, 2**16),
)
def test_norms_and_the_clipped_sum_are_those_of_each_unit_alone(
    tied: bool, sizes: list[int], columns: int, seed: int
) -> None:
    model, ids, lengths = made(tied, sizes, columns, seed)
    expected = one_by_one(model, sizes, ids, lengths)
    found = told_apart(model, sizes, ids, lengths)
    exact = torch.stack([torch.cat([g.flatten() for g in unit]) for unit in expected])  # (units, parameters)
    norms = torch.stack([one.squares() for one in found]).sum(0).sqrt()
    assert torch.allclose(norms.double(), exact.norm(dim=1), rtol=EXACT, atol=0)
    limit = float(exact.norm(dim=1).median())
    clipped = ClippedSum(list(model.parameters()), limit)
    clipped.add(found)
    total = torch.cat([t.flatten() for t in clipped._totals()])
    factors = (limit / (exact.norm(dim=1) + EPSILON)).clamp(max=1)
    assert float((total - factors @ exact).norm()) <= EXACT * float(factors @ exact.norm(dim=1))


@pytest.mark.parametrize("columns", [3, 20])
def test_what_takes_fewer_numbers_is_kept(columns: int) -> None:
    model, ids, lengths = made(True, [1, 1], columns, 0)
    kinds = {
        name: type(one)
        for (name, _), one in zip(
            model.named_parameters(), told_apart(model, [1, 1], ids, lengths), strict=True
        )
    }
    assert kinds["norm.weight"] is kinds["up.bias"] is WrittenOut
    assert kinds["up.weight"] is kinds["tokens.weight"] is (Factored if columns == 3 else WrittenOut)


def test_factors_that_cancel_are_multiplied_in_float64() -> None:
    left, right = torch.randn(2, 64, 30), torch.randn(2, 64, 40)
    left[0, 32:] = -left[0, :32]
    right[0, 32:] = right[0, :32] * (1 + 1e-4)  # next to nothing is left of the first unit
    factored = Factored([Use(left, right)], torch.Size((30, 40)))
    exact = torch.einsum("uko,uki->uoi", left.double(), right.double()).flatten(1).square().sum(1)
    assert torch.allclose(factored.squares().double(), exact, rtol=EXACT, atol=0)
    rough = (torch.bmm(left, left.mT) * torch.bmm(right, right.mT)).sum((1, 2))
    assert abs(float(rough[0] / exact[0]) - 1) > 0.01, "float32 would have been far off"


@pytest.mark.parametrize("columns", [3, 20])
def test_a_unit_that_is_not_finite_counts_as_zero_and_leaves_the_others(columns: int) -> None:
    model, ids, lengths = made(True, [1, 1, 1], columns, 1)
    lengths[:] = columns
    found = told_apart(model, [1, 1, 1], ids, lengths)
    for one in found:
        for values in (use.left for use in one.uses) if isinstance(one, Factored) else (one.written_out(),):
            if values.is_floating_point():
                values[1] = torch.nan
    clipped, others = (ClippedSum(list(model.parameters()), 0.5) for _ in range(2))
    clipped.add(found)
    keep = torch.tensor([0, 2])
    others.add(told_apart(model, [1, 1], ids[keep], lengths[keep]))
    assert clipped.norms.units == 3 and clipped.norms.clipped == 2
    for total, expected in zip(clipped._totals(), others._totals(), strict=True):
        assert torch.allclose(total, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_finds_the_same_gradients() -> None:
    model, ids, lengths = made(False, [1] * 5, 7, 2)
    found = told_apart(model, [1] * 5, ids, lengths)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    loss_of(model, ids, lengths).backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        assert torch.allclose(one.written_out().double(), parameter.grad_sample, rtol=EXACT, atol=EXACT)
    hooks.remove_hooks()


def test_a_layer_of_another_kind_is_not_taken() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1))
    assert way_for(model, list(model.parameters())) is None
    assert way_for(model, list(model[0].parameters())) is not None
    scaled = nn.Embedding(4, 3, scale_grad_by_freq=True)
    assert way_for(scaled, list(scaled.parameters())) is None
