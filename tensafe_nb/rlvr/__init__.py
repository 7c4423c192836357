"""Reinforcement learning with verifiable rewards: bring prompts and a function that scores an answer.

The way of a step: `rollouts` (sample) → `rewards` (score) → `advantages` → `algorithms` (update), driven by
`trainer`. No torch here: the policy is behind the training client, embedded or remote.
"""

from tensafe_nb.rlvr.algorithms import REINFORCE, REINFORCEConfig, UpdateResult
from tensafe_nb.rlvr.rewards import Reward, get_registered_rewards, register_reward, resolve_reward
from tensafe_nb.rlvr.rollouts import (
    MockRolloutSampler,
    PolicySampler,
    RolloutGroup,
    Trajectory,
    TrajectoryBatch,
)
from tensafe_nb.rlvr.trainer import RLVRTrainer

__all__ = [
    "RLVRTrainer",
    "REINFORCE",
    "REINFORCEConfig",
    "UpdateResult",
    "PolicySampler",
    "MockRolloutSampler",
    "Trajectory",
    "TrajectoryBatch",
    "RolloutGroup",
    "Reward",
    "register_reward",
    "resolve_reward",
    "get_registered_rewards",
]
