"""The parts of a panel beside its curves, gathered from the state: checkpoints, alarms, privacy, rollouts."""

from collections.abc import Mapping
from typing import Any, Literal

from tensafe_nb.events import (
    Alarm,
    ArtifactDeleted,
    CheckpointSaved,
    Event,
    Forked,
    PrivacySpent,
    Rollouts,
    StateLoaded,
)
from tensafe_nb.history.state import ClientState

Part = Literal["marks", "alarms", "privacy", "rows", "rollouts"]
MOST = 200  # marks, rows
SHOWN_ALARMS = 8
NEWS: Mapping[Part, tuple[type[Event], ...]] = {  # the events after which a part of a panel is another
    "marks": (CheckpointSaved, ArtifactDeleted, Forked),
    "alarms": (Alarm,),
    "privacy": (PrivacySpent,),
    "rows": (CheckpointSaved, ArtifactDeleted, StateLoaded),
    "rollouts": (Rollouts,),
}


class Annotations:
    """The parts of a panel besides its curves, as messages.

    Args:
        state: Of the client that is shown.

    Attributes:
        details: Of checkpoints, as far as they were looked up: no event tells how they are sealed.
        saving: Checkpoints that a button asked for and that are not written yet.
        learned: How often one of these two has changed.
    """

    def __init__(self, state: ClientState) -> None:
        self._state = state
        self.details: dict[str, Mapping[str, Any]] = {}
        self.saving = self.learned = 0

    def version(self, part: Part) -> int:
        """Return a number that grows whenever there is news for a part."""
        news = sum(self._state.counts[kind] for kind in NEWS[part])
        beside = {"marks": len(self._state.rewards[1:]), "rows": self.learned}
        return news + beside.get(part, 0)

    def marks(self) -> list[tuple[int, str, str]]:
        """Return (step, kind, what) of what is marked on the curves: "c" checkpoint, "f" fork, "v" reward version."""
        state = self._state
        # Lists are copied first: events come on other threads while this one reads.
        saved = [(saved.step, "c", saved.artifact_id) for saved in list(state.checkpoints.values())]
        forks = [
            (
                fork.step,
                "f",
                f"to {fork.child}" if fork.parent == state.training_client_id else f"from {fork.parent}",
            )
            for fork in list(state.forks)
        ]
        rewards = [(step, "v", f"{number:.0f}") for step, number in state.rewards[1:]]
        return [*saved[-MOST:], *forks[-MOST:], *rewards[-MOST:]]

    def alarms(self) -> list[dict[str, Any]]:
        """Return the latest alarms, oldest first."""
        return [
            {
                "name": alarm.name,
                "level": alarm.level,
                "text": alarm.message,
                "remedy": alarm.remedy,
                "step": alarm.step,
                "seq": alarm.seq,
            }
            for alarm in list(self._state.alarms)[-SHOWN_ALARMS:]
        ]

    def not_looked_up(self) -> list[str]:
        """Return the checkpoints of which no more is known than events tell."""
        return [
            artifact_id for artifact_id in list(self._state.checkpoints) if artifact_id not in self.details
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return the checkpoints there are, newest first."""
        return [
            {
                "id": saved.artifact_id,
                "step": saved.step,
                "at": round(saved.time),
                "size": saved.size_bytes,
                "hash": saved.content_hash.rpartition(":")[2],
                "name": saved.name,
                "run": saved.run_id and saved.run_id.rpartition("/")[2],
                **self.details.get(saved.artifact_id, {}),
            }
            for saved in list(self._state.checkpoints.values())[: -MOST - 1 : -1]
        ]

    def privacy(self) -> dict[str, Any]:
        """Return the privacy account; nothing before a step under differential privacy."""
        spent = self._state.privacy
        if spent is None:
            return {}
        return {
            "spent": _json(spent.total_epsilon),
            "target": None if spent.target_epsilon is None else _json(spent.target_epsilon),
            "delta": spent.delta,
            "accountant": spent.accountant,
            "adjacency": spent.adjacency,
            "projected": spent.projected_step,
            "refused": spent.step if spent.refused else None,
            "void": spent.void,
        }

    def evaluated(self) -> list[int]:
        """Return the steps at which held-out prompts were answered, the latest of them."""
        return sorted(self._state.held_out)[-MOST:]

    def newest_rollouts(self) -> Rollouts | None:
        """Return where the rollouts are that were scored last."""
        return max(list(self._state.rollouts.values()), key=lambda rollouts: rollouts.seq, default=None)


def _json(value: float) -> float | str:
    return value if abs(value) < float("inf") else "∞"
