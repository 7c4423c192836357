"""What speaks up when a run goes wrong: the rules' findings, announced once, as events."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tensafe_nb.events import Alarm
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch
from tensafe_nb.rlvr.watch import rules
from tensafe_nb.rlvr.watch.metrics import Goal, Row
from tensafe_nb.rlvr.watch.rules import Finding, Level, Memory, Rule

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
        self._sounding: dict[str, tuple[Level, int]] = {}  # name → level, steps since the last sign

    def observe(
        self, run_id: str, step: int, row: Row, batch: TrajectoryBatch, goal: Goal | None = None
    ) -> list[Alarm]:
        """Return the alarms that begin, or change their level, with this step."""
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        self.memory.take(row, batch, goal)
        findings = [found for rule in self._rules if (found := rule(self.memory, row, batch)) is not None]
        before = {name: level for name, (level, _) in self._sounding.items()}
        self._listen({found.name: found.level for found in findings})
        fresh = [found for found in findings if self._begins(found, before.get(found.name))]
        return [alarm_of(run_id, step, found) for found in fresh]

    def forget_reward(self) -> None:
        """Begin anew with what is said of rewards: another function scores from now on."""
        self.memory.forget_reward()
        for name in ABOUT_REWARDS:
            self._sounding.pop(name, None)

    def forget_announcements(self) -> None:
        """Announce anew what goes on: another run, or another process, begins to listen."""
        self._sounding.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain data."""
        return asdict(self.memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in state.items()}
        values["tens"] = [list(ten) for ten in values.get("tens", ())]  # none in checkpoints of version 0.1
        self.memory = Memory(**values)
        self.forget_announcements()

    def _listen(self, found: Mapping[str, Level]) -> None:
        """A level rises at once, and falls after QUIET steps in a row that did not reach it."""
        for name in {*found, *self._sounding}:
            level, below = self._sounding.get(name, (None, QUIET))
            now = found.get(name)
            below = 0 if now == level or now == "red" else below + 1
            if now == "red" or (now is not None and below >= QUIET):
                level, below = now, 0
            if level is None or below >= QUIET:
                self._sounding.pop(name, None)
            else:
                self._sounding[name] = (level, below)

    def _begins(self, found: Finding, before: Level | None) -> bool:
        return self._sounding[found.name][0] == found.level != before


def alarm_of(run_id: str, step: int, found: Finding) -> Alarm:
    """Return the event that announces a finding."""
    return Alarm(
        run_id=run_id,
        step=step,
        name=found.name,
        level=found.level,
        message=found.message,
        remedy=found.remedy,
        rollouts=found.rollouts,
    )
