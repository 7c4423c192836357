"""A training client that only publishes, a flusher whose time is turned by hand, a widget whose messages are kept."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.config import LoRAConfig, TrainingConfig
from tensafe_nb.core.bus import EventBus
from tensafe_nb.events import (
    ArtifactDeleted,
    CheckpointSaved,
    ClientCreated,
    Event,
    Metrics,
    RunState,
    RunStep,
    StatusChanged,
)
from tensafe_nb.futures import FutureHandle, Promise, handle_of
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.results import (
    Encryption,
    LoadStateResult,
    RunStatus,
    SaveStateResult,
)
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.feed.flusher import Flusher, Member
from tensafe_nb.widgets.live import comparison, dashboard
from tensafe_nb.widgets.still import race, snapshot, transcript

PLANNED = 10


class HandFlusher(Flusher):
    """A flusher without a thread: `pass_time` moves its clock, `flush` does what the thread would."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 100.0
        self.woken: list[Member] = []

    def wake(self, member: Member, *, urgent: bool = False) -> None:
        self.woken.append(member)

    def aside(self, work: Callable[[], None]) -> None:
        work()

    def now(self) -> float:
        return self.time


@dataclass
class FakeRun:
    """A run that changes state when told, and notes what it was told."""

    run_id: str = "tc-1/1"
    planned_steps: int | None = PLANNED
    steps_done: int = 0
    started_at: float = field(default_factory=time.time)
    curve: str | None = None
    state: RunStatus = RunStatus.RUNNING
    told: list[str] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)

    def pause(self) -> None:
        self._note("pause")

    def resume(self) -> None:
        self._note("resume")

    def stop(self) -> None:
        self._note("stop")

    def done(self) -> bool:
        return self.state.ended

    def _note(self, what: str) -> None:
        self.told.append(what)
        self.threads.append(threading.current_thread().name)


class FakeClient:
    """A training client without a core: its events are published by the test."""

    training_client_id = "tc-1"
    tokenizer: Any = None
    config = TrainingConfig(lora_config=LoRAConfig(rank=8))
    marks: tuple[str, ...] = ()
    steerable = True

    def __init__(self, log: Path) -> None:
        self.bus = EventBus(log)
        self.runs: tuple[Any, ...] = ()
        self.step = 0
        self.history, self.subscribe = self.bus.history, self.bus.subscribe
        self.watch = self.bus.subscribe
        self.publish(ClientCreated(training_client_id=self.training_client_id, config=encode(self.config)))
        self.publish(StatusChanged(status="READY"))
        self.told: list[str] = []
        self.promises: list[Promise[Any]] = []
        self.children: list[FakeClient] = []

    def publish(self, event: Event) -> None:
        self.bus.publish(event)

    def start(self, run: FakeRun | None = None) -> FakeRun:
        run = run or FakeRun()
        self.runs = (*self.runs, run)
        self.turn(run, RunStatus.RUNNING)
        return run

    def turn(self, run: FakeRun, state: RunStatus, reason: str | None = None) -> None:
        run.state = state
        self.publish(
            RunState(
                run_id=run.run_id,
                state=str(state),
                step=self.step,
                planned_steps=run.planned_steps,
                reason=reason,
                done=run.steps_done,
                curve=run.curve,
            )
        )

    def measure(self, **values: float) -> None:
        """Publish one step's metrics; `eval_loss` stands for `eval/loss`."""
        self.step += 1
        self.publish(
            Metrics(step=self.step, values={name.replace("_", "/"): value for name, value in values.items()})
        )

    def advance(self, run: FakeRun, loss: float = 1.0, duration: float = 2.0) -> None:
        self.measure(loss=loss)
        run.steps_done += 1
        self.publish(RunStep(run_id=run.run_id, done=run.steps_done, duration=duration))

    def save(self, artifact_id: str, step: int = 0) -> None:
        """Publish that a checkpoint was written."""
        digest = f"sha256:{artifact_id[-1] * 64}"
        self.publish(
            CheckpointSaved(artifact_id=artifact_id, step=step, size_bytes=2_000, content_hash=digest)
        )

    def get_checkpoint(self, artifact_id: str) -> SaveStateResult:
        return SaveStateResult(
            artifact_id, "checkpoint", 2_000, "sha256:0", Encryption("AES-256-GCM", "key-1"), {"note": "<b>"}, 0.0,
            None, 0, "builtin:tiny", "tc-1",
        )  # fmt: skip

    def cancel_pending(self) -> int:
        return 3

    def save_state(self) -> FutureHandle[Any]:
        return self._promise("save_state", SaveStateResult)

    def load_state(self, artifact_id: str) -> FutureHandle[Any]:
        return self._promise(f"load_state {artifact_id}", LoadStateResult)

    def delete_checkpoint(self, artifact_id: str) -> None:
        self.told.append(f"delete {artifact_id}")
        self.publish(ArtifactDeleted(artifact_id=artifact_id))

    def export_checkpoint(self, artifact_id: str, path: Path) -> Path:
        self.told.append(f"export {artifact_id}")
        return path

    def fork(self, artifact_id: str | None = None) -> "FakeClient":
        child = FakeClient(self.bus.history.path.with_name("child.jsonl"))
        child.training_client_id = "tc-2"
        self.children.append(child)
        return child

    def _promise(self, what: str, result_type: type) -> FutureHandle[Any]:
        self.told.append(what)
        self.promises.append(Promise())
        return handle_of(self.promises[-1], what.split()[0], "tc-1", result_type)

    def close(self) -> None:
        self.publish(StatusChanged(status="TERMINATED"))
        self.bus.close()


@dataclass
class Output:
    """An output of a cell."""

    data: dict[str, Any]
    metadata: dict[str, Any]
    display_id: str | None
    update: bool


@pytest.fixture
def client(tmp_path: Path) -> Iterator[FakeClient]:
    client = FakeClient(tmp_path / "events.jsonl")
    yield client
    client.bus.close()
    for child in client.children:
        child.bus.close()


@pytest.fixture
def flusher() -> HandFlusher:
    return HandFlusher()


@pytest.fixture
def feed(client: FakeClient, flusher: HandFlusher) -> Feed:
    return Feed(client, flusher)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """What cells were given to show, in order."""
    shown: list[Output] = []

    def publish(data: Any, metadata: Any, display_id: str | None = None, *, update: bool = False) -> None:
        shown.append(Output(data, metadata, display_id, update))

    monkeypatch.setattr(snapshot, "publish", publish)
    for module in (dashboard, comparison, race, transcript):
        monkeypatch.setattr(module, "publish", publish)
    return shown


class Wire:
    """The line of one widget: what it sent, and a page at the other end."""

    def __init__(self, widget: Any) -> None:
        self.widget = widget
        self.sent: list[tuple[dict[str, Any], list[bytes]]] = []
        self.loads = 0
        widget.send = lambda content, buffers=None: self.sent.append((content, buffers or []))

    def page_says(self, **content: Any) -> None:
        self.widget._handle_custom_msg(content, [])

    def load(self) -> None:
        """Load a page that shows it: each has a name of its own."""
        self.loads += 1
        self.page_says(t="hello", v=1, n=0, mount=f"page {self.loads}")

    def mount(self) -> None:
        self.load()
        self.flush()

    def flush(self) -> list[dict[str, Any]]:
        """Flush once and return what was sent."""
        self.sent.clear()
        self.again = self.widget.flush()
        return [content for content, _ in self.sent]

    def flush_kind(self, kind: str) -> list[dict[str, Any]]:
        return [content for content in self.flush() if content["t"] == kind]


@pytest.fixture
def wire(feed: Feed) -> Iterator[Wire]:
    widget = dashboard.Dashboard(feed)
    yield Wire(widget)
    widget.close()
