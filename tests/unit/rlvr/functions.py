"""Answers to score, and functions that score them, in every way that there is to fail."""

import math
import os

from tensafe_nb.config import SamplingConfig
from tensafe_nb.rlvr import RolloutGroup, Trajectory, TrajectoryBatch


def rollouts(*responses, **meta):
    return [Trajectory("q", response, meta) for response in responses]


def batch_of(*groups):
    made = [RolloutGroup(f"p{i}", "q", rollouts(*responses)) for i, responses in enumerate(groups)]
    return TrajectoryBatch(made, SamplingConfig())


def length(prompt, response, meta=None):
    return len(response)


def make_awkward():
    """Return a function, of a cell as it were, that fails in every way there is."""

    def awkward(prompt, response, meta=None):
        match response:
            case "raise":
                return {}["missing"]
            case "exit":
                raise SystemExit(3)
            case "hang":
                while True:
                    pass
            case "die":
                os._exit(3)
            case "none":
                return None
            case "nan":
                return math.nan
            case "text":
                return "1.0"
        print("noise on standard output", flush=True)
        return float(len(response))

    return awkward
