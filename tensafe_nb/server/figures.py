"""What a server tells Prometheus: figures of the whole, and nothing of single tenants."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from tensafe_nb.engine.models.bases import BASES
from tensafe_nb.events import Event, OperationCancelled, OperationFailed, OperationFinished
from tensafe_nb.server.clients import ServedClient

BOUNDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)  # s
ENDS: dict[type[Event], str] = {
    OperationFinished: "finished",
    OperationFailed: "failed",
    OperationCancelled: "cancelled",
}


class Figures:
    """What has become of operations since the server began: sums that only grow, as Prometheus wants them."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter(dict.fromkeys(ENDS.values(), 0))
        self._counts: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._encrypted = Counter({"answered": 0, "refused": 0})
        self._encrypted_bytes = Counter({"up": 0, "down": 0})
        self._encrypted_seconds = 0.0

    def count(self, event: Event) -> None:
        """Take in an event of any training client."""
        outcome = ENDS.get(type(event))
        if outcome is not None:
            self._outcomes[outcome] += 1
        if isinstance(event, OperationFinished):
            counts = self._counts.setdefault(event.operation, [0] * (len(BOUNDS) + 1))
            counts[bisect_left(BOUNDS, event.duration)] += 1
            seconds = self._seconds.get(event.operation, 0.0)
            self._seconds[event.operation] = seconds + event.duration

    def count_encrypted(self, up: int, down: int, seconds: float) -> None:
        """Take in an encrypted call: the bytes of its request and of its reply, which has none where it was refused."""
        self._encrypted["answered" if down else "refused"] += 1
        self._encrypted_bytes.update({"up": up, "down": down})
        self._encrypted_seconds += seconds

    def text(
        self, clients: Iterable[ServedClient], rejected: Mapping[str, int], stored: Mapping[str, int]
    ) -> str:
        """Return what Prometheus reads.

        Args:
            clients: Every training client that is not closed.
            rejected: Requests that were refused, by code.
            stored: Bytes of all tenants, by kind.
        """
        clients = list(clients)
        lags, bases = [lag for client in clients for lag in client.lags], BASES.all()
        lines: list[str] = []

        def add(name: str, kind: str, words: str, *values: tuple[str, Any]) -> None:
            lines.append(f"# HELP tensafe_nb_{name} {words}")
            lines.append(f"# TYPE tensafe_nb_{name} {kind}")
            lines.extend(f"tensafe_nb_{name}{label} {value}" for label, value in values)

        add("training_clients", "gauge", "Training clients that are not closed.", ("", len(clients)))
        depth = sum(client.channel.info().queue_depth for client in clients)
        add("queue_depth", "gauge", "Operations that wait or run.", ("", depth))
        held = sum(client.held for client in clients)
        add("held_submissions", "gauge", "Submissions that wait for one before them.", ("", held))
        add("streams", "gauge", "Streams that are read.", ("", len(lags)))
        slowest = max(lags, default=0)
        add("stream_lag_events", "gauge", "Events that the slowest reader is behind.", ("", slowest))
        add("base_models", "gauge", "Models whose frozen weights are loaded to be shared.", ("", len(bases)))
        references = sum(base.references for base in bases)
        add("base_references", "gauge", "Training clients that share one of them.", ("", references))
        kept = sum(client.journal.size for client in clients)
        add("journal_bytes", "gauge", "Bytes of journals and automatic checkpoints on the disk.", ("", kept))
        of_kind = [(f'{{kind="{kind}"}}', count) for kind, count in stored.items()]
        add("stored_bytes", "gauge", "Bytes that all tenants store, as they were counted last.", *of_kind)
        outcomes = [(f'{{outcome="{name}"}}', value) for name, value in sorted(self._outcomes.items())]
        add("operations_total", "counter", "Operations that have ended.", *outcomes)
        codes = [(f'{{code="{code}"}}', value) for code, value in sorted(rejected.items())]
        add("rejected_requests_total", "counter", "Requests refused at the door, or for a quota.", *codes)
        there = sum(len(client.channel.connections.open) for client in clients)
        add("encrypted_connections", "gauge", "Connections for encrypted calls that are open.", ("", there))
        calls = [(f'{{outcome="{name}"}}', value) for name, value in sorted(self._encrypted.items())]
        add("encrypted_calls_total", "counter", "Encrypted calls that have ended.", *calls)
        sizes = [(f'{{direction="{name}"}}', value) for name, value in sorted(self._encrypted_bytes.items())]
        add("encrypted_bytes_total", "counter", "Bytes of encrypted calls.", *sizes)
        taken = f"{self._encrypted_seconds:.6f}"
        add("encrypted_seconds_total", "counter", "How long encrypted calls took.", ("", taken))
        lines.append("# HELP tensafe_nb_operation_seconds How long operations took that were carried out.")
        lines.append("# TYPE tensafe_nb_operation_seconds histogram")
        for verb, counts in sorted(self._counts.items()):
            below = list(accumulate(counts))
            bounds = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")
            name = "tensafe_nb_operation_seconds"
            lines += [
                f'{name}_bucket{{verb="{verb}",le="{b}"}} {n}' for b, n in zip(bounds, below, strict=True)
            ]
            lines.append(f'{name}_sum{{verb="{verb}"}} {self._seconds[verb]:.6f}')
            lines.append(f'{name}_count{{verb="{verb}"}} {below[-1]}')
        return "\n".join(lines) + "\n"
