"""Measures how far an update moved the policy, KL(old ‖ new), on a sample of rollouts; short updates not every time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.batch import Array, BatchData
from tensafe_nb.protocol.results import LogprobsResult
from tensafe_nb.rlvr.algorithms.packing import pack, sampler_logprobs, unpack
from tensafe_nb.rlvr.algorithms.result import Move
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rollouts.trajectories import Trajectory, TrajectoryBatch

SHARE = 0.02  # of an update's passes that may go into its sample
GRADIENT = 3  # forward passes that a row's gradient costs: its own, and a backward pass of twice that
TOKENS_BETWEEN = 12_000  # in passes, after which a measurement is due again
UPDATES_BETWEEN = 10  # after which it is due in any case


@dataclass(slots=True)
class Pace:
    """Which updates are measured: the first, and from there as many as cost no more than 3 % of all updates.

    However small its sample, a measurement is one more operation and one more forward pass, a millisecond or a few.
    An update of 12,000 tokens bears that; where updates are smaller, they bear it together.

    Attributes:
        tokens: In the passes since the last measured update.
        updates: Since then.
    """

    tokens: int = TOKENS_BETWEEN  # so that the first is measured
    updates: int = 0

    def is_due(self, tokens: int) -> bool:
        """Whether an update of so many tokens is measured; takes note of it."""
        self.tokens, self.updates = self.tokens + tokens, self.updates + 1
        due = self.tokens >= TOKENS_BETWEEN or self.updates >= UPDATES_BETWEEN
        if due:
            self.tokens = self.updates = 0
        return due


@dataclass(slots=True)
class Measurement:
    """A sample of an update's rollouts, scored before its first step and after its last; S rows of C tokens."""

    trajectories: Sequence[Trajectory]
    data: BatchData
    mask: Array  # (S, C)
    temperature: float
    old: Array | None  # (S, C), where known before
    version: int | None  # whose they are, where the sampler told them
    before: FutureHandle[LogprobsResult] | None  # where they had to be asked for

    @classmethod
    def begin(
        cls,
        client: PolicyClient,
        batch: TrajectoryBatch,
        mask: Array,
        rows: Array,
        old: Array | None,
        *,
        passes: int,
        number: int,
    ) -> "Measurement":
        """Choose the sample, and learn its log-probabilities before the update.

        They come from what was read for the update, or from the sampler if it drew from these very weights, exact and
        uncut; else they are asked for, which leaves half as many rows for the same price.

        Args:
            client: Whose policy is measured.
            batch: The rollouts.
            mask: (N, C), the tokens in the loss.
            rows: The rollouts in the loss.
            old: (N, C) log-probabilities before, where they were read.
            passes: Of the update over the rows.
            number: Of the update.
        """
        trajectories, sampling = list(batch), batch.sampling
        read = 0 if old is None else len(trajectories)
        version, current = None, client.policy_version
        its_own = sampling.top_p == 1 and sampling.top_k == 0 and sampling.is_exact
        if old is None and its_own and all(t.policy_version == current for t in trajectories):
            old, version = sampler_logprobs(trajectories, mask.shape[1]), current
        budget = SHARE * (GRADIENT * rows.size * passes + read)  # in forward passes of a row
        sample = spread(batch, rows, max(1, int(budget) // (2 if old is None else 1)), number)
        chosen = [trajectories[row] for row in sample]
        data = pack(chosen, {})
        if old is None:
            before = client.compute_logprobs(data, temperature=sampling.temperature)
            return cls(chosen, data, mask[sample], sampling.temperature, None, None, before)
        return cls(chosen, data, mask[sample], sampling.temperature, old[sample], version, None)

    def after(self, client: PolicyClient) -> list[FutureHandle[LogprobsResult]]:
        """Queue the scoring under the new weights; return all that is to be waited for."""
        new = client.compute_logprobs(self.data, temperature=self.temperature)
        return [new] if self.before is None else [new, self.before]

    def read(self, scored: Sequence[LogprobsResult], began: int) -> Move:
        """Return KL(old ‖ new) = E[e^d − d − 1], d = log π_new − log π_old, and the largest |d|.

        That is the k3 estimate (Schulman 2020, "Approximating KL Divergence"): without bias, and never negative.

        Args:
            scored: What was waited for.
            began: Version of the weights that the update began with. If another update got in between, what the
                sampler told is not of these, and nothing was measured: NaN.
        """
        if self.version not in (None, began):
            return NOT_MEASURED
        new, *before = (unpack(self.trajectories, result.logprobs, self.mask.shape[1]) for result in scored)
        old = before[0] if before else self.old
        assert old is not None, "known before, or asked for"
        difference = (new - old) * self.mask  # (S, C)
        bounded = np.minimum(difference, 20)  # against overflow; far below 0 the term is linear
        k3 = ((np.expm1(bounded) - bounded) * self.mask).sum() / self.mask.sum()
        return Move(float(k3), float(np.abs(difference).max()))


NOT_MEASURED = Move(math.nan, 0.0)


def spread(batch: TrajectoryBatch, rows: Array, count: int, number: int) -> Array:
    """Return a systematic sample of rows: every n-th of those ordered by the sign of the advantage and by likelihood.

    What an update moves most are unlikely answers that it pushes down, least those it need not push. Ordered so, a
    tenth of the rows tells the KL about as well as a third drawn blindly.

    Args:
        batch: The rollouts, with their advantages.
        rows: Numbers of those to choose from.
        count: How many at most.
        number: Of the update: where in the order it starts.
    """
    trajectories = list(batch)
    signs = [float(np.mean(trajectories[row].advantage or 0.0)) > 0 for row in rows]
    likelihood = [sum(trajectories[row].logprobs or ()) for row in rows]
    order = rows[np.lexsort((likelihood, signs))]
    count = min(count, rows.size)
    start = np.random.default_rng([number, rows.size]).random()
    chosen: Array = order[((np.arange(count) + start) * rows.size / count).astype(np.int64)]
    return chosen
