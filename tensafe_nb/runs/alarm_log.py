"""The alarm log of a run: what a rule finds becomes an event once, and again only when it has been over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tensafe_nb.events import Alarm

Level: TypeAlias = Literal["amber", "red"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule has to say about a step: the trouble, its cause, and what helps."""

    name: str
    level: Level
    message: str
    remedy: str
    rollouts: tuple[int, ...] = ()  # numbers of those it is about

    def alarm(self, run_id: str, step: int) -> Alarm:
        """Return the event that announces it."""
        return Alarm(
            run_id=run_id,
            step=step,
            name=self.name,
            level=self.level,
            message=self.message,
            remedy=self.remedy,
            rollouts=self.rollouts,
        )


class AlarmLog:
    """The troubles that go on, each announced when it begins or changes its level, not at every step.

    A level rises at once, and falls after some steps in a row that did not reach it; then the trouble is forgotten,
    and would be announced anew.

    Args:
        quiet: How many such steps.
    """

    def __init__(self, quiet: int) -> None:
        self._quiet = quiet
        self._sounding: dict[str, tuple[Level, int]] = {}  # name → level, steps since the last sign of it

    def announce(self, run_id: str, step: int, found: Sequence[Finding]) -> list[Alarm]:
        """Take what the rules found in a step, and return what of it is news."""
        before = {name: level for name, (level, _) in self._sounding.items()}
        levels = {finding.name: finding.level for finding in found}
        for name in {*levels, *before}:
            self._take(name, levels.get(name))
        return [finding.alarm(run_id, step) for finding in found if self._is_news(finding, before)]

    def forget(self, names: Sequence[str] | None = None) -> None:
        """Announce these troubles anew if they go on; all of them when None: somebody else begins to listen."""
        for name in [*self._sounding] if names is None else names:
            self._sounding.pop(name, None)

    def _take(self, name: str, now: Level | None) -> None:
        level, below = self._sounding.get(name, (None, self._quiet))
        below = 0 if now == level or now == "red" else below + 1
        if now == "red" or (now is not None and below >= self._quiet):
            level, below = now, 0
        if level is None or below >= self._quiet:
            self._sounding.pop(name, None)
        else:
            self._sounding[name] = (level, below)

    def _is_news(self, found: Finding, before: dict[str, Level]) -> bool:
        level, _ = self._sounding[found.name]
        return level == found.level != before.get(found.name)
