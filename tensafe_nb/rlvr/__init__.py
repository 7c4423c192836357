"""Reinforcement learning with verifiable rewards: bring prompts and a function that scores an answer.

The way of a step: `rollouts` (sample) → `rewards` (score) → `advantages` → `algorithms` (update), driven by
`trainer`. No torch here: the policy is behind the training client, embedded or remote.
"""

from tensafe_nb.rlvr import tools
from tensafe_nb.rlvr.algorithms.advantages import (
    get_registered_advantages,
    register_advantage,
    token_weights,
)
from tensafe_nb.rlvr.algorithms.options import PPOConfig, REINFORCEConfig, ValueOptions
from tensafe_nb.rlvr.algorithms.packing import loss_mask, pack, unpack
from tensafe_nb.rlvr.algorithms.policy_gradient import PPO, REINFORCE
from tensafe_nb.rlvr.algorithms.presets import get_presets, register_preset
from tensafe_nb.rlvr.algorithms.result import UpdateResult
from tensafe_nb.rlvr.environments import builtin as _builtin  # noqa: F401  # registers what ships
from tensafe_nb.rlvr.environments.adapters.gym import gym_environment
from tensafe_nb.rlvr.environments.adapters.trl import trl_environment
from tensafe_nb.rlvr.environments.adapters.verifiers import verifiers_environment, verifiers_prompts
from tensafe_nb.rlvr.environments.environment import (
    Environment,
    Outcome,
    RolloutEnded,
    Turn,
    environment,
    get_registered_environments,
    resolve_environment,
)
from tensafe_nb.rlvr.environments.rehearsal import Rehearsal, rehearse
from tensafe_nb.rlvr.environments.sampler import EnvironmentSampler
from tensafe_nb.rlvr.environments.tool_use import tool_environment
from tensafe_nb.rlvr.rewards.composite import Part
from tensafe_nb.rlvr.rewards.reward import (
    Reward,
    get_registered_rewards,
    judge,
    register_reward,
    resolve_reward,
)
from tensafe_nb.rlvr.rollouts.choosing import (
    AdaptivePrompts,
    CurriculumPrompts,
    DynamicSampling,
    PromptPolicy,
    PromptRecord,
    UniformPrompts,
)
from tensafe_nb.rlvr.rollouts.prompts import gym_prompts
from tensafe_nb.rlvr.rollouts.samplers import MockRolloutSampler, PolicySampler
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory, TrajectoryBatch, TurnRecord
from tensafe_nb.rlvr.scoring.scorer import Scorer, ScoreReport
from tensafe_nb.rlvr.trainer import RLVRTrainer
from tensafe_nb.rlvr.watch.preview import RewardPreview, preview_reward
from tensafe_nb.rlvr.watch.rescoring import rescore

__all__ = [
    "RLVRTrainer",
    "REINFORCE",
    "REINFORCEConfig",
    "PPO",
    "PPOConfig",
    "ValueOptions",
    "get_presets",
    "register_preset",
    "UpdateResult",
    "environment",
    "Environment",
    "Turn",
    "Outcome",
    "RolloutEnded",
    "resolve_environment",
    "get_registered_environments",
    "tool_environment",
    "tools",
    "rehearse",
    "Rehearsal",
    "trl_environment",
    "verifiers_environment",
    "verifiers_prompts",
    "gym_environment",
    "PolicySampler",
    "EnvironmentSampler",
    "MockRolloutSampler",
    "Trajectory",
    "TrajectoryBatch",
    "RolloutGroup",
    "TurnRecord",
    "Reward",
    "register_reward",
    "resolve_reward",
    "get_registered_rewards",
    "judge",
    "Part",
    "Scorer",
    "ScoreReport",
    "rescore",
    "preview_reward",
    "RewardPreview",
    "gym_prompts",
    "PromptPolicy",
    "PromptRecord",
    "UniformPrompts",
    "CurriculumPrompts",
    "AdaptivePrompts",
    "DynamicSampling",
    "register_advantage",
    "get_registered_advantages",
    "pack",
    "unpack",
    "loss_mask",
    "token_weights",
]
