"""Commands of the panel's buttons: the calls a user could type, and nothing else. None of them waits for training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from tensafe_nb.display import as_given
from tensafe_nb.errors import TGTinkerError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.results import SaveStateResult
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.live import neighbours

QUICK = ("pause", "resume", "stop")  # set a flag: answered without a detour
OF_A_CHECKPOINT = ("rollback", "branch", "export", "delete")


class Steered(Protocol):
    """A training client as buttons need it."""

    @property
    def runs(self) -> Sequence[TrainingRun]: ...
    def save_state(self) -> FutureHandle[Any]: ...
    def load_state(self, artifact_id: str) -> FutureHandle[Any]: ...
    def fork(self, artifact_id: str | None = None) -> Any: ...
    def get_checkpoint(self, artifact_id: str) -> SaveStateResult: ...
    def delete_checkpoint(self, artifact_id: str) -> None: ...
    def export_checkpoint(self, artifact_id: str, path: Path) -> Path: ...
    def cancel_pending(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Obeyed:
    """The outcome of a command.

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
            return self.turn(command)
        if command in OF_A_CHECKPOINT:
            artifact_id = content.get("id")
            if artifact_id not in self._feed.state.checkpoints:
                raise ValueError(f"There is no checkpoint {as_given(artifact_id)} of this client any more.")
            return self.use_checkpoint(command, str(artifact_id))
        if command == "checkpoint":
            return self.save()
        if command == "shutdown":
            return Obeyed(neighbours.shut_down(content.get("id")))
        if command == "cancel":
            return Obeyed(f"{self._client.cancel_pending()} waiting operations were cancelled.")
        raise ValueError(f"This panel does not know {as_given(command)}.")

    @property
    def is_foreign(self) -> bool:
        """Whether another client drives the run under way: only there it can be paused and stopped."""
        latest = self._feed.latest
        under_way = latest is not None and not latest.state.ended
        return under_way and self._feed.client.steerable and self._run is None

    def turn(self, command: str) -> Obeyed:
        """Pause, resume or stop the latest run."""
        latest, run = self._feed.latest, self._run
        if latest is None:
            raise ValueError(f"There is no run to {command}.")
        if latest.state.ended:
            raise ValueError(f"The run has ended: {latest.state}.")
        if run is None:
            raise ValueError(
                f"Another client of {self._feed.client_id} has started this run: {command} it there."
            )
        {"pause": run.pause, "resume": run.resume, "stop": run.stop}[command]()
        return Obeyed()

    def save(self) -> Obeyed:
        """Save a checkpoint: by the run under way, so that it can go on from there, or of the client."""
        run = self._run
        handle = self._client.save_state() if run is None else run.checkpoint()
        self._feed.count_saving(+1)
        handle.add_done_callback(lambda _: self._feed.count_saving(-1))
        return Obeyed(None, handle)

    def use_checkpoint(self, command: str, artifact_id: str) -> Obeyed:
        """Go back to a checkpoint, start a branch from it, export it or delete it."""
        client, run = self._client, self._run
        match command:
            case "rollback":
                return Obeyed(
                    handle=client.load_state(artifact_id) if run is None else run.rollback(artifact_id)
                )
            case "branch":
                child = client.fork(artifact_id)
                said = f'Branch: tc2 = service.get_training_client("{child.training_client_id}")'
                return Obeyed(said, child=child)
            case "export":
                path = client.export_checkpoint(artifact_id, Path.cwd() / f"{artifact_id}-adapter")
                return Obeyed(f"Written in the clear, for plain PEFT: {path}")
            case _:
                client.delete_checkpoint(artifact_id)
                return Obeyed(f"{artifact_id} was deleted.")

    def look_up(self, artifact_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Look up what the events do not tell of checkpoints: how they are sealed, and their metadata."""
        details: dict[str, dict[str, Any]] = {}
        for artifact_id in artifact_ids:
            try:
                found = self._client.get_checkpoint(artifact_id)
            except TGTinkerError as error:
                details[artifact_id] = {"enc": f"cannot be read: {error}"}
            else:
                metadata = {str(name): str(value) for name, value in (found.metadata or {}).items()}
                sealed = found.encryption.algorithm
                details[artifact_id] = {
                    "enc": sealed, "meta": None if found.metadata is None else metadata,
                }  # fmt: skip
        return details

    @property
    def _client(self) -> Steered:
        return cast(Steered, self._feed.client)

    @property
    def _run(self) -> TrainingRun | None:
        """The run under way, if this client has started it."""
        latest = self._feed.latest
        if latest is None or latest.state.ended:
            return None
        return next((run for run in self._client.runs if run.run_id == latest.run_id), None)
