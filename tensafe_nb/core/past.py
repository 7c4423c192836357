"""What a training client brings along from a process that has ended, and who keeps it for the next one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tensafe_nb.core.bus import EventBus
from tensafe_nb.errors import TGTinkerError
from tensafe_nb.events import Event
from tensafe_nb.protocol.results import FutureStatus, TrainingClientInfo
from tensafe_nb.store.artifacts.artifacts import ArtifactStore

if TYPE_CHECKING:
    from tensafe_nb.core.queue import Job


@dataclass(frozen=True, slots=True)
class Past:
    """How an operation ended in an earlier process.

    Attributes:
        state: COMPLETED, FAILED or CANCELLED.
        started: Whether it had its turn.
        streams: Where the random streams stood behind it, if it was carried out and did not complete: then it cannot
            be repeated, and what follows goes on from there. See `Engine.streams`.
    """

    state: FutureStatus
    started: bool = True
    streams: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """A training client as an earlier process has left it.

    Attributes:
        info: How it stood, as far as that is known without its model.
        jobs: Its operations since `base`, in order, those that had ended with their `past`.
        base: The automatic checkpoint that they follow; None where they are all there were.
        told: Of each operation that ran as the process ended, what the log holds of it, beside that it was queued.
        draws: How many Poisson draws were made for it, and what a unit of the last one is.
        failure: Why it cannot be brought back.
    """

    info: TrainingClientInfo
    jobs: "Sequence[Job]" = ()
    base: str | None = None
    told: Mapping[str, Mapping[type[Event], int]] = field(default_factory=dict)
    draws: tuple[int, str] = (0, "")
    failure: TGTinkerError | None = None


class Keeper(Protocol):
    """Keeps a training client for a process to come; told of everything before anybody else is."""

    @property
    def states(self) -> ArtifactStore:
        """Where its automatic checkpoints are: none of the artifacts that users see."""

    def ended(
        self,
        job: "Job",
        outcome: object,
        *,
        duration: float,
        streams: Mapping[str, Any] | None,
        base: str | None,
        info: TrainingClientInfo,
    ) -> None:
        """Keep how an operation ended: with its result, its error, or None where it was cancelled.

        Args:
            job: The operation.
            outcome: How it ended.
            duration: In seconds.
            streams: See `Past`.
            base: The checkpoint of the state behind it, where one had to be made.
            info: How the training client stands.
        """

    def is_due(self, *, whole: bool) -> bool:
        """Whether an automatic checkpoint should be made now; `whole` says that no window is open."""

    def kept(self, base: str, through: str | None, info: TrainingClientInfo) -> None:
        """Take note of an automatic checkpoint.

        Args:
            base: Its id.
            through: The last operation that it holds.
            info: How the training client stands there.
        """


class Told:
    """The bus, as an operation sees it that is carried out a second time: what the log holds already is not told again.

    Args:
        bus: The bus.

    Attributes:
        before: The events of the operation that are on record.
        silent: Everything it tells is on record.
    """

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self.before: dict[type[Event], int] = {}
        self.silent = False

    def begin(self, before: Mapping[type[Event], int] | None = None) -> None:
        """Take note of what is on record of the operation that tells from now on."""
        self.before = dict(before or {})

    def publish(self, event: Event) -> None:
        """Publish an event, unless that was done before."""
        if self.silent:
            return
        if self.before.get(type(event), 0) > 0:
            self.before[type(event)] -= 1
            return
        self._bus.publish(event)

    def sync(self) -> None:
        """Put every recorded event on the disk."""
        self._bus.sync()
