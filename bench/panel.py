"""What the panel costs the training: bytes on the wire, steps a second, CPU of the picture, memory."""

import json
import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, Row, Taken, Target, fresh_process, paired
from tensafe_nb.config import TrainingConfig
from tensafe_nb.core.bus import EventBus
from tensafe_nb.events import Event, Metrics
from tensafe_nb.history.log import RunHistory
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.feed.flusher import Flusher
from tensafe_nb.widgets.live.chat import ChatPanel
from tensafe_nb.widgets.live.dashboard import Dashboard
from tensafe_nb.widgets.still.snapshot import Snapshot

STEPS = 30
PICTURES = 8


class Source:
    """A training client without a core, whose history is made up."""

    training_client_id = "tc-bench"
    config = TrainingConfig()
    marks: tuple[str, ...] = ()
    steerable = True
    step = 0

    def __init__(self, folder: str) -> None:
        self.bus = EventBus(Path(folder) / "events.jsonl")

    @property
    def history(self) -> RunHistory:
        return self.bus.history

    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        return self.bus.subscribe(subscriber)

    def measure(self) -> None:
        self.step += 1
        values = {"loss": 2.345678, "eval/loss": 2.5, "grad_norm": 1.234567}
        self.bus.publish(Metrics(step=self.step, values=values))


class Idle(Flusher):
    """A view that never flushes by itself."""

    def wake(self, member: Any, *, urgent: bool = False) -> None: ...


@contextmanager
def _mounted() -> Iterator[tuple[Source, Dashboard, list[int]]]:
    """Yield a source, a panel whose page is there, and the bytes of its messages."""
    with tempfile.TemporaryDirectory() as folder:
        source = Source(folder)
        panel = Dashboard(Feed(source, Idle()))
        sizes: list[int] = []
        panel.send = lambda content, buffers=None: sizes.append(  # type: ignore[method-assign]
            len(json.dumps(content, separators=(",", ":"))) + sum(len(part) for part in buffers or ())
        )
        source.measure()
        panel.receive(panel, {"t": "hello", "v": 1, "n": 0, "mount": True}, None)
        panel.flush()
        yield source, panel, sizes
        panel.close()
        source.bus.close()


def bytes_per_update() -> Row:
    """Issue 7: content of at most 200 B for three series; here with the axis of time, which makes a fourth."""
    with _mounted() as (source, panel, sizes):
        taken = []
        for _ in range(1_000):
            sizes.clear()
            source.measure()
            panel.flush()
            taken.append(sizes[0] / 1024)
    return Row(
        what="content of the message that tells a page of one step",
        peer="",
        sizes="loss, held-out loss, gradient norm, and the time of the step",
        unit="KiB",
        taken=Taken(taken),
        target=Target("≤", 200 / 1024, "ours"),
    )


def first_piece() -> Row:
    """Issue 25: at most 0.3 s from what somebody types to the first of the answer, on the built-in model."""
    told: queue.SimpleQueue[float] = queue.SimpleQueue()

    def take(content: dict[str, Any], buffers: object = None) -> None:
        if content["t"] == "said" and content["o"] == 0 and content["p"]:
            told.put(time.perf_counter())

    with tn.ServiceClient() as service:
        tc = workload.tiny_client(service)
        chat = tc.chat(max_new_tokens=16, ignore_end=True)
        panel = ChatPanel(chat)
        panel.send = take  # type: ignore[method-assign]
        panel.receive(panel, {"t": "hello", "v": 1, "n": 0, "mount": "page"}, None)
        chat.say("abs(x, /)").result()
        taken = []
        for number in range(40):
            chat.clear()
            while not told.empty():
                told.get()
            started = time.perf_counter()
            panel.receive(panel, {"t": "do", "do": "say", "n": number, "text": "abs(x, /)"}, None)
            taken.append(told.get(timeout=60) - started)
            while chat.is_under_way:
                time.sleep(0.01)
        panel.close()
    return Row(
        what="chat: from the message of a page to the first piece of the answer that is sent to it",
        peer="",
        precision="fp32",
        sizes=f"{workload.MODEL}, a first message of 9 characters",
        taken=Taken(taken),
        target=Target("≤", 0.3, "ours"),
    )


def slow_down() -> Row:
    """Issue 7: at most 3 %."""
    batch = workload.full(8, 64)
    with tn.ServiceClient() as service:
        plain, shown = workload.tiny_client(service), workload.tiny_client(service)
        panel = Dashboard(shown)
        panel.send = lambda content, buffers=None: json.dumps(content)  # type: ignore[method-assign]
        panel.receive(panel, {"t": "hello", "v": 1, "n": 0, "mount": True}, None)
        taken = paired(lambda: _train(shown, batch), lambda: _train(plain, batch), seconds=0, warmup=1)
    return Row(
        what=f"{STEPS} steps with an open panel, whose messages are made and written as JSON",
        peer="the same client without a panel",
        precision="fp32",
        sizes=f"{workload.MODEL}, 8×64",
        taken=taken,
        compares=LARGER,
        target=Target("≤", 1.03),
    )


def _train(client: tn.TrainingClient, batch: tn.BatchData) -> None:
    client.fit([batch], steps=STEPS, show=False).result()


def static_part() -> Row:
    """Issue 7: at most 250 ms of CPU."""
    cpu, _ = _static()
    return Row(
        what="CPU time of the picture and the table that stay in the file",
        peer="",
        sizes="10,000 steps",
        taken=Taken(cpu),
        target=Target("≤", 0.25, "ours"),
    )


def picture_size() -> Row:
    """Issue 7: at most 45 kB."""
    _, sizes = _static()
    return Row(
        what="size of that picture",
        peer="",
        sizes="10,000 steps",
        unit="KiB",
        taken=Taken(sizes),
        target=Target("≤", 45e3 / 1024, "ours"),
    )


def _static() -> tuple[list[float], list[float]]:
    cpu, sizes = [], []
    with _mounted() as (source, panel, _):
        for _ in range(10_000):
            source.measure()
        for _ in range(PICTURES + 1):
            started = time.process_time()
            snapshot = Snapshot.take(panel.feed, None)
            snapshot.table()
            drawn = snapshot.picture()
            cpu.append(time.process_time() - started)
            sizes.append(len(drawn[0]["image/png"]) / 1024 if drawn is not None else 0.0)
    return cpu[1:], sizes[1:]  # the first loads matplotlib


def memory() -> Row:
    """Issue 7: at most 8 MB more over 10,000 updates."""
    grown = [fresh_process("from bench.panel import grown; print(grown())") for _ in range(2)]
    return Row(
        what="resident memory that 10,000 updates of an open panel add to the kernel",
        peer="",
        sizes="three series",
        unit="MiB",
        taken=Taken(grown),
        target=Target("≤", 8e6 / 2**20, "ours"),
    )


def grown() -> float:
    """Return the MiB that this process grows by over 10,000 updates, after the first 500."""
    with _mounted() as (source, panel, sizes):
        before = 0.0
        for update in range(10_500):
            if update == 500:
                before = _resident()
            sizes.clear()
            source.measure()
            panel.flush()
        return _resident() - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20
