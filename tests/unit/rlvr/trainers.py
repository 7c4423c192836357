"""Trainers of the built-in model that half knows how to add, and what their runs leave."""

from tensafe_nb import datasets
from tensafe_nb.config import LoRAConfig, OptimizerConfig, TrainingConfig
from tensafe_nb.events import Alarm, Metrics, Rollouts
from tensafe_nb.rlvr import (
    RLVRTrainer,
    TrajectoryBatch,
)

CONFIG = TrainingConfig(
    model_ref="builtin:sums", lora_config=LoRAConfig(rank=4), optimizer=OptimizerConfig(learning_rate=1e-3)
)
SUMS = datasets.sums(8, seed=0)
SMALL = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4}


def rows(client):
    """The metric rows of the trainer, the worker's own left out."""
    return [e for e in client.history.events() if isinstance(e, Metrics) and not {"loss"} & set(e.values)]


def events(client, kind):
    return [event for event in client.history.events() if isinstance(event, kind)]


def stored(client):
    """The rollouts of each step, as they are on the disk."""
    return [TrajectoryBatch.load(client.history.rollouts_file(event)) for event in events(client, Rollouts)]


def trainer_of(client, reward="exact_match", **options):
    """A trainer that calls functions of a test in the test's own process, unless told otherwise."""
    return RLVRTrainer(client, SUMS, reward, **SMALL | {"reward_timeout": None} | options)


def train(client, reward="exact_match", steps=3, **options):
    return trainer_of(client, reward, **options).run(steps=steps, show=False)


def checksum(prompt, response, meta=None):
    """A reward without a meaning that differs from answer to answer."""
    return float(sum(map(ord, response)) % 7)


def alarms_named(name, client):
    """The levels at which a trouble was announced; a learning rate of 1e-3 is loud enough for others."""
    return [alarm.level for alarm in events(client, Alarm) if alarm.name == name]
