"""What a run leaves along its curves: checkpoints, forks, changed rewards, alarms, privacy spent, rollouts."""

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, Literal

from tensafe_nb.events import (
    Alarm,
    ArtifactDeleted,
    CheckpointSaved,
    Event,
    Forked,
    Metrics,
    MockTookPart,
    PrivacySpent,
    Rollouts,
    StateLoaded,
)
from tensafe_nb.history.log import RunHistory

Part = Literal["marks", "alarms", "privacy", "rows", "rollouts"]
KINDS = (
    CheckpointSaved, ArtifactDeleted, StateLoaded, Forked, Alarm, PrivacySpent, Rollouts, MockTookPart,
)  # fmt: skip
MOST = 200  # marks, rows
SHOWN_ALARMS = 8
REWARD_VERSION = "reward_version"


class Landmarks:
    """Takes in events; `changes` counts, for each part of a panel, how often there was news for it."""

    def __init__(self) -> None:
        self.checkpoints: dict[str, CheckpointSaved] = {}
        self.details: dict[str, Mapping[str, Any]] = {}  # of checkpoints, as far as they were looked up
        self.saving = 0  # checkpoints that a button asked for and that are not written yet
        self.forks: list[Forked] = []
        self.alarms: deque[Alarm] = deque(maxlen=SHOWN_ALARMS)
        self.privacy: PrivacySpent | None = None
        self.refused_at: int | None = None
        self.rollouts: dict[int, Rollouts] = {}
        self.mocked = False
        self.changes: Counter[Part] = Counter()
        self._reward_version: float | None = None

    def note(self, event: Event) -> None:
        """Take in an event, in whatever order their kinds come."""
        match event:
            case Metrics(values=values) if REWARD_VERSION in values:
                if self._reward_version not in (None, values[REWARD_VERSION]):
                    self.changes["marks"] += 1
                self._reward_version = values[REWARD_VERSION]
            case CheckpointSaved():
                self.checkpoints[event.artifact_id] = event
                self.changes.update(("marks", "rows"))
            case ArtifactDeleted():
                self.checkpoints.pop(event.artifact_id, None)
                self.changes.update(("marks", "rows"))
            case StateLoaded():
                self.changes["rows"] += 1
            case Forked():
                self.forks.append(event)
                self.changes["marks"] += 1
            case Alarm():
                self.alarms.append(event)
                self.changes["alarms"] += 1
            case PrivacySpent():
                self._note_privacy(event)
            case Rollouts():
                self.rollouts[event.step] = event
                self.changes["rollouts"] += 1
            case MockTookPart():
                self.mocked = True

    def _note_privacy(self, event: PrivacySpent) -> None:
        """What was spent stays spent: neither a rollback nor a refused step moves it back."""
        self.privacy = event
        self.refused_at = event.step if event.refused else None
        self.changes["privacy"] += 1

    def marks(self, history: RunHistory, client_id: str) -> list[tuple[int, str, str]]:
        """Return (step, kind, what) of what is marked on the curves: "c" checkpoint, "f" fork, "v" reward version."""
        saved = [(saved.step, "c", saved.artifact_id) for saved in self.checkpoints.values()]
        forks = [
            (fork.step, "f", f"to {fork.child}" if fork.parent == client_id else f"from {fork.parent}")
            for fork in self.forks
        ]
        return [*saved[-MOST:], *forks[-MOST:], *versions(history)[-MOST:]]

    def rows(self) -> list[dict[str, Any]]:
        """Return the checkpoints there are, newest first."""
        return [self._row(saved) for saved in list(self.checkpoints.values())[: -MOST - 1 : -1]]

    def _row(self, saved: CheckpointSaved) -> dict[str, Any]:
        return {
            "id": saved.artifact_id,
            "step": saved.step,
            "at": round(saved.time),
            "size": saved.size_bytes,
            "hash": saved.content_hash.rpartition(":")[2],
            "name": saved.name,
            "run": saved.run_id and saved.run_id.rpartition("/")[2],
            **self.details.get(saved.artifact_id, {}),
        }


def versions(history: RunHistory) -> list[tuple[int, str, str]]:
    """Return where the reward became another one: its number, at the first step that it scored."""
    steps, numbers = history.series(REWARD_VERSION)
    changed = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]]
    return [(int(steps[i]), "v", f"{numbers[i]:.0f}") for i in changed]
