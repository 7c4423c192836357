"""Reinforcement learning with differential privacy: what an algorithm may do with one prompt's rollouts, and what not.

The privacy unit is the prompt group: one prompt, its rollouts, their rewards and advantages. Whatever lets one prompt
act on another's gradient would make clipping bound nothing, and every further step on the same rollouts is a further
release. A step is never skipped: that, too, would tell of the data.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array
from tensafe_nb.rlvr.algorithms.advantages import token_weights
from tensafe_nb.rlvr.algorithms.options import PolicyConfig
from tensafe_nb.rlvr.algorithms.packing import group_numbers
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch

POISSON = "differential_privacy:poisson"
ALLOWED = ("none", "rloo", "group")
# Of a position, what is planned. A reward's version is a hash of whatever the reward refers to, the answers it knows
# included.
RELEASED = frozenset({"prompts", "draws", "row"})


def check_options(config: PolicyConfig, method: str, capabilities: frozenset[str]) -> None:
    """Refuse options under which prompts act on each other, or that take several steps on the same rollouts.

    Raises:
        ValidationError: Says which option to change.
    """
    if POISSON in capabilities:
        raise ValidationError(
            "Reinforcement learning draws prompts in epochs and accounts for each by name: create the client with "
            "DPConfig(sampling='worst_case')."
        )
    problems = list(coupling_options(config, method))
    if problems:
        raise ValidationError("With differential privacy, " + "; ".join(problems) + ".")


def coupling_options(config: PolicyConfig, method: str) -> Iterator[str]:
    """Yield what is wrong with the options, and what to choose instead."""
    if method not in ALLOWED:
        yield (
            f"the advantage {as_given(method)} couples prompts, or cannot be seen not to: choose one of "
            f"{', '.join(ALLOWED)}"
        )
    if config.effective_scale == "batch":
        yield "scale='batch' divides by what other prompts earned: choose 'group' or 'none'"
    if config.aggregation in ("token_mean", "seq_mean"):
        yield f"aggregation={config.aggregation!r} divides by the tokens of other prompts: choose 'const' or 'sum'"
    if config.passes > 1 or config.minibatch_count > 1:
        yield "every further step on the same rollouts is a further release: one pass, one minibatch"
    if config.resample_zero_signal:
        yield "resample_zero_signal selects prompts by what private answers scored: leave it out"
    if config.kl_limit is not None:
        yield "target_kl stops on private data: leave it out"
    if config.value is not None and method == "gae":
        yield "a value head is not trained"


def released(position: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a trainer's position what a checkpoint may hold: nothing that rewards or answers were added up to.

    Baselines, alarms and tokens seen carry no noise, and the algorithms that are allowed need none of them.
    """
    return {name: value for name, value in position.items() if name in RELEASED}


def record_ids(batch: TrajectoryBatch) -> Array:
    """Return (N,) the prompt that each rollout answers, by a hash of it: the same in every epoch.

    Of a conversation it is the row that the environment was given: two rows may begin with the same words.
    """
    units = [t.prompt if t.turns is None else t.prompt_id for t in batch]
    return np.array([hashlib.sha256(repr(unit).encode()).hexdigest()[:32] for unit in units])


def group_weights(batch: TrajectoryBatch, mask: Array, config: PolicyConfig) -> Array:
    """Return (N, C) token weights that are a function of each prompt group alone; the core divides by L groups."""
    weights, groups = np.zeros(mask.shape), group_numbers(batch)
    for number in np.unique(groups):
        rows = groups == number
        scored = int(np.isfinite(batch.rewards[rows]).sum())
        weights[rows] = token_weights(mask[rows], config.aggregation, batch.longest, scored)
    return weights
