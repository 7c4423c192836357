"""What the buttons do: the calls a user could type, and nothing else. Every one returns at once or is run aside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from tensafe_nb.display import as_given
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.results import RunStatus, SaveStateResult
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.widgets.feed.feed import Feed

QUICK = ("pause", "resume", "stop")  # set a flag: answered without a detour


class Steered(Protocol):
    """What buttons need of a training client."""

    def save_state(self) -> FutureHandle[Any]: ...
    def load_state(self, artifact_id: str) -> FutureHandle[Any]: ...
    def fork(self, artifact_id: str | None = None) -> Any: ...
    def get_checkpoint(self, artifact_id: str) -> SaveStateResult: ...
    def delete_checkpoint(self, artifact_id: str) -> None: ...
    def export_checkpoint(self, artifact_id: str, path: Path) -> Path: ...
    def cancel_pending(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Obeyed:
    """What came of a command.

    Attributes:
        said: A line for whoever clicked.
        handle: What is still under way.
        child: The training client that was made.
    """

    said: str | None = None
    handle: FutureHandle[Any] | None = None
    child: Any = None


class Commands:
    """Carries out what a page asks for.

    Args:
        feed: Whose client and latest run it is done to.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def obey(self, command: str, content: Mapping[str, Any]) -> Obeyed:
        """Carry out a command.

        Raises:
            ValueError: There is no such command, or not now; says why.
        """
        if not self._feed.client.steerable:
            raise ValueError(
                "This training client was freed: there is nothing to steer any more."
                if self._feed.is_freed
                else "This is a recording: there is nothing to steer."
            )
        if command in QUICK:
            return self._turn(command)
        known: dict[str, Callable[[str], Obeyed]] = {
            "rollback": self._go_back,
            "branch": self._branch,
            "export": self._export,
            "delete": self._delete,
        }
        if command in known:
            return known[command](self._checkpoint_of(content))
        if command == "checkpoint":
            return self._save()
        if command == "cancel":
            return Obeyed(f"{self._client.cancel_pending()} waiting operations were cancelled.")
        raise ValueError(f"This panel does not know {as_given(command)}.")

    def facts_of(self, artifact_id: str) -> dict[str, Any]:
        """Look up what the events do not tell of a checkpoint: how it is sealed, and its metadata."""
        known = self._client.get_checkpoint(artifact_id)
        metadata = known.metadata
        return {
            "enc": known.encryption.algorithm,
            "meta": None if metadata is None else {str(name): str(value) for name, value in metadata.items()},
        }

    @property
    def _client(self) -> Steered:
        return cast(Steered, self._feed.client)

    @property
    def _run(self) -> TrainingRun | None:
        """The run under way."""
        run = self._feed.latest
        return None if run is None or run.state.ended else run

    def _turn(self, command: str) -> Obeyed:
        run = self._feed.latest
        if run is None:
            raise ValueError(f"There is no run to {command}.")
        if run.state.ended:
            raise ValueError(f"The run has ended: {RunStatus(run.state)}.")
        {"pause": run.pause, "resume": run.resume, "stop": run.stop}[command]()
        return Obeyed()

    def _checkpoint_of(self, content: Mapping[str, Any]) -> str:
        artifact_id = content.get("id")
        if artifact_id not in self._feed.landmarks.checkpoints:
            raise ValueError(f"There is no checkpoint {as_given(artifact_id)} of this client any more.")
        return str(artifact_id)

    def _save(self) -> Obeyed:
        handle = self._run.checkpoint() if self._run is not None else self._client.save_state()
        self._feed.count_saving(+1)
        handle.add_done_callback(lambda _: self._feed.count_saving(-1))
        return Obeyed(None, handle)

    def _go_back(self, artifact_id: str) -> Obeyed:
        run = self._run
        handle: FutureHandle[Any] = (
            self._client.load_state(artifact_id) if run is None else run.rollback(artifact_id)
        )
        return Obeyed(None, handle)

    def _branch(self, artifact_id: str) -> Obeyed:
        child = self._client.fork(artifact_id)
        said = f'Branch: tc2 = service.get_training_client("{child.training_client_id}")'
        return Obeyed(said, child=child)

    def _export(self, artifact_id: str) -> Obeyed:
        path = self._client.export_checkpoint(artifact_id, Path.cwd() / f"{artifact_id}-adapter")
        return Obeyed(f"Written in the clear, for plain PEFT: {path}")

    def _delete(self, artifact_id: str) -> Obeyed:
        self._client.delete_checkpoint(artifact_id)
        return Obeyed(f"{artifact_id} was deleted.")
