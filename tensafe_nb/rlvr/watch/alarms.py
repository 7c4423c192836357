"""The alarms of an RL run: applies the rules of `rules.py` to every step, and keeps what they need to remember."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tensafe_nb.events import Alarm
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch
from tensafe_nb.rlvr.watch import rules
from tensafe_nb.rlvr.watch.metrics import Goal, Row
from tensafe_nb.rlvr.watch.rules import Memory, Rule
from tensafe_nb.runs.alarm_log import AlarmLog

ABOUT_REWARDS = ("no_signal", "no_learning", "reward_errors", "reward_fell")
QUIET = 5  # steps without a sign after which a trouble is over


class Alarms:
    """Looks at every step of a run and speaks up when a trouble begins or its level changes, not at every step.

    A trouble is over, or no longer red, after five steps in a row without such a sign.

    Args:
        gap: Mean difference of logprobs between sampler and training path that the precision explains.
    """

    def __init__(self, gap: float = rules.FP32_GAP) -> None:
        self.memory = Memory()
        self._rules: tuple[Rule, ...] = (
            rules.truncation,
            rules.no_signal,
            rules.no_learning,
            rules.entropy,
            rules.reward_fell,
            rules.sampler_mismatch(gap),
            rules.policy_kl,
            rules.stale,
            rules.reward_errors,
        )
        self._log = AlarmLog(QUIET)

    def observe(
        self, run_id: str, step: int, row: Row, batch: TrajectoryBatch, goal: Goal | None = None
    ) -> list[Alarm]:
        """Return the alarms that begin, or change their level, with this step."""
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        self.memory.take(row, batch, goal)
        findings = [found for rule in self._rules if (found := rule(self.memory, row, batch)) is not None]
        return self._log.announce(run_id, step, findings)

    def forget_reward(self) -> None:
        """Begin anew with what is said of rewards: another function scores from now on."""
        self.memory.forget_reward()
        self._log.forget(ABOUT_REWARDS)

    def forget_announcements(self) -> None:
        """Announce anew what goes on: another run, or another process, begins to listen."""
        self._log.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain data."""
        return asdict(self.memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in state.items()}
        values["tens"] = [list(ten) for ten in values.get("tens", ())]  # none in checkpoints of version 0.1
        self.memory = Memory(**values)
        self.forget_announcements()
