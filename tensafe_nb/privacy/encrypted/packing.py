"""How activations and adapter lie in the slots of ciphertexts, and what a call costs in operations.

The slots are G groups of P tokens: slot = g·P + s, token s in group g. Rank is taken in chunks of R, a power of two;
in a chunk, group g belongs to rank g mod R.

    A    in group h lies feature φ(h) = (h div R)·τ + h mod τ. Any τ = R/ρ neighbours and their likes R, 2R, … further
         hold each of the G/ρ features of a ciphertext once, so that

             w[g] = Σ_t<τ (x ∘ A_t)[g + t],   A_t[h] = A[(h − t) mod R, φ(h)]

         takes τ − 1 rotations by one group (Horner), and log2(G/R) rotate-and-adds leave u[g] = (A x) of rank g mod R
         in all groups.
    B    υ = R/σ rotated copies of u serve every output: Σ_t<υ u[h + t] · B[ψ(h), (h + t) mod R] sums υ ranks for the
         row ψ(h) = (h div R)·υ + h mod υ, and log2(σ) rotate-and-adds the others. Row ψ is read where h mod R < υ.

ρ repeats inputs and σ rows: fewer rotations against more ciphertexts. ρ = R is the row method of Halevi and Shoup
(CRYPTO 2014), ρ = σ = 1 their diagonals, of the small matrix whose side is the rank. Depth 2, no relinearisation.
"""

import functools
import itertools
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy.encrypted.parameters import Parameters
from tensafe_nb.privacy.encrypted.scheme import Vector

PACKINGS = (1, 8, 64, 512)  # tokens of one ciphertext
MOST_WIDTH, MOST_RANK, MOST_TOKENS = 16_384, 256, 4096

# Milliseconds by which plans are compared, those of one machine: only their proportions matter, and both sides have to
# come to the same plan. Operations at each level; what crosses is counted as on a line of 100 Mbit/s.
ROTATE, MULTIPLY, RESCALE = (1.7, 1.0, 0.5), (0.16, 0.10), (0.4, 0.27)
SENT, RETURNED = 2.0 + 13.0, 0.5 + 10.5


@dataclass(frozen=True, slots=True)
class Shape:
    """Of an adapter: x (S, d_in) → scale · B (A x)."""

    d_in: int
    d_out: int
    rank: int

    @classmethod
    def of(cls, given: Any) -> "Shape":
        """Return a shape from one, or from (d_in, d_out, rank).

        Raises:
            ValidationError: It is neither, or beyond what there can be.
        """
        if isinstance(given, Shape):
            return given
        if not isinstance(given, tuple | list) or len(given) != 3:
            raise ValidationError(
                f"The shape of an encrypted adapter is (d_in, d_out, rank), width in, width out and rank, not "
                f"{as_given(given)}."
            )
        return cls(*(int(value) if isinstance(value, np.integer) else value for value in given))

    def __post_init__(self) -> None:
        for name, value, most in (
            ("d_in", self.d_in, MOST_WIDTH),
            ("d_out", self.d_out, MOST_WIDTH),
            ("rank", self.rank, MOST_RANK),
        ):
            if type(value) is not int or not 1 <= value <= most:
                raise ValidationError(
                    f"{name} of an encrypted adapter is a whole number from 1 to {most}: {value!r}."
                )


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """Where everything lies, for one packing of one shape.

    Attributes:
        shape: Of the adapter.
        slots: Of a ciphertext.
        tokens: P, of a ciphertext.
        ranks: R, ranks of a chunk.
        repeats_in: ρ, how often a ciphertext holds a feature.
        repeats_out: σ, over how many groups the sum of a row is spread.
    """

    shape: Shape
    slots: int
    tokens: int
    ranks: int
    repeats_in: int
    repeats_out: int

    @property
    def groups(self) -> int:
        return self.slots // self.tokens

    @property
    def turns_in(self) -> int:
        """τ."""
        return self.ranks // self.repeats_in

    @property
    def turns_out(self) -> int:
        """υ."""
        return self.ranks // self.repeats_out

    @property
    def chunks(self) -> int:
        """K."""
        return ceil(self.shape.rank / self.ranks)

    @property
    def inputs(self) -> int:
        """How many ciphertexts go to the server."""
        return ceil(self.shape.d_in * self.repeats_in / self.groups)

    @property
    def outputs(self) -> int:
        """How many come back."""
        return ceil(self.shape.d_out * self.repeats_out / self.groups)

    @property
    def sum_steps(self) -> list[int]:
        return [self.ranks * self.tokens << i for i in range(int(log2(self.groups // self.ranks)))]

    @property
    def row_steps(self) -> list[int]:
        return [self.turns_out * self.tokens << i for i in range(int(log2(self.repeats_out)))]

    @property
    def steps(self) -> set[int]:
        """By how many slots the server rotates: it needs a key for each."""
        one_group = {self.tokens} if max(self.turns_in, self.turns_out) > 1 else set()
        return {*self.sum_steps, *self.row_steps, *one_group}

    @property
    def multiplications(self) -> int:
        return self.chunks * (self.turns_in * self.inputs + self.turns_out * self.outputs)

    @property
    def rotations(self) -> int:
        return sum(self.rotations_by_level)

    @property
    def rotations_by_level(self) -> tuple[int, int, int]:
        """How many where ciphertexts have three primes, two, one: each is cheaper than the one before."""
        first, second = self.turns_in - 1, len(self.sum_steps) + self.turns_out - 1
        return self.chunks * first, self.chunks * second, self.outputs * len(self.row_steps)

    @property
    def multiplications_by_level(self) -> tuple[int, int]:
        return self.chunks * self.turns_in * self.inputs, self.chunks * self.turns_out * self.outputs

    @property
    def rescales(self) -> int:
        return self.chunks + self.outputs

    @property
    def weight(self) -> float:
        """What plans are compared by."""
        return (
            sum(n * ms for n, ms in zip(self.rotations_by_level, ROTATE, strict=True))
            + sum(n * ms for n, ms in zip(self.multiplications_by_level, MULTIPLY, strict=True))
            + self.chunks * RESCALE[0]
            + self.outputs * RESCALE[1]
            + self.inputs * SENT
            + self.outputs * RETURNED
        )

    def packed(self, x: Vector) -> Vector:
        """Lay (P, d_in) activations into (inputs, slots)."""
        padded = np.zeros((self.tokens, self.inputs * self._features))
        padded[: len(x), : self.shape.d_in] = x
        features = np.arange(self.inputs)[:, None] * self._features + self._feature_of
        laid: Vector = padded.T[features].reshape(self.inputs, self.slots)  # (inputs, G, P)
        return laid

    def unpacked(self, slots: Vector) -> Vector:
        """Read (P, d_out) from (outputs, slots)."""
        read = slots.reshape(self.outputs, self.groups, self.tokens)
        group = np.arange(self.groups)
        rows = read[:, group % self.ranks < self.turns_out].reshape(-1, self.tokens)  # (rows, P)
        return rows[: self.shape.d_out].T

    def diagonal_in(self, a: Vector, chunk: int, turn: int, which: int) -> Vector:
        """Return the (slots,) of A_t for an input ciphertext."""
        group = np.arange(self.groups)
        ranks = chunk * self.ranks + (group - turn) % self.ranks
        return self._spread(a, ranks, which * self._features + self._feature_of)

    def diagonal_out(self, b: Vector, chunk: int, turn: int, which: int) -> Vector:
        """Return the (slots,) of B_t for an output ciphertext."""
        group = np.arange(self.groups)
        row_of = group // self.ranks * self.turns_out + group % self.turns_out  # ψ
        rows = which * (self.groups // self.repeats_out) + row_of
        return self._spread(b, rows, chunk * self.ranks + (group + turn) % self.ranks)

    def _spread(self, matrix: Vector, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Vector:
        height, width = matrix.shape
        there = (rows < height) & (columns < width)  # what is beyond is padding
        values = np.where(there, matrix[np.minimum(rows, height - 1), np.minimum(columns, width - 1)], 0.0)
        return np.repeat(values, self.tokens)

    @property
    def _features(self) -> int:
        return self.groups // self.repeats_in

    @property
    def _feature_of(self) -> NDArray[np.int64]:
        group = np.arange(self.groups)
        return group // self.ranks * self.turns_in + group % self.turns_in


@functools.lru_cache(maxsize=256)
def plan_of(shape: Shape, tokens: int, parameters: Parameters) -> PackingPlan:
    """Return the cheapest plan of a packing: from public figures alone, so that both sides have the same."""
    groups = parameters.slots // tokens
    widest = min(1 << (shape.rank - 1).bit_length(), groups)
    powers = [1 << i for i in range(widest.bit_length())]
    plans = (
        PackingPlan(shape, parameters.slots, tokens, ranks, repeats_in, repeats_out)
        for ranks, repeats_in, repeats_out in itertools.product(powers, repeat=3)
        if max(repeats_in, repeats_out) <= ranks
    )
    return min(plans, key=lambda plan: plan.weight)


def best_plan(shape: Shape, tokens: int, packings: tuple[int, ...], parameters: Parameters) -> PackingPlan:
    """Return the plan by which so many tokens cost least; they take ceil(tokens / plan.tokens) rounds of it."""
    plans = (plan_of(shape, packing, parameters) for packing in packings)
    return min(plans, key=lambda plan: ceil(tokens / plan.tokens) * plan.weight)


def packings_of(tokens: object) -> tuple[int, ...]:
    """Return the packings that a client prepares: all for "auto", or the one that was asked for.

    Raises:
        ValidationError: It is neither.
    """
    if tokens == "auto":
        return PACKINGS
    if type(tokens) is not int or tokens not in PACKINGS:
        known = ", ".join(map(str, PACKINGS))
        raise ValidationError(
            f'tokens= is "auto" or one of {known}: how many share a ciphertext. Not {tokens!r}.'
        )
    return (tokens,)
