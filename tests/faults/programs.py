"""What is done with a training client while its server is killed, and what has come of it, to be compared."""

import random
from typing import Any

import tensafe_nb as tn
from tensafe_nb.events import (
    Event,
    OperationCancelled,
    OperationQueued,
    OperationStarted,
    Progress,
    StatusChanged,
)
from tensafe_nb.protocol.codec import encode

VOLATILE = {
    "artifact_id",
    "loaded_artifact_id",
    "content_hash",
    "size_bytes",
    "created_at",
    "encryption",
    "saved_by",
}


class Program:
    """A few steps of everything, in an order that a seed decides.

    Args:
        service: Whose training client does it.
        seed: What is done.
        steps: How much.
        cancelled: Which of the operations that a user cancels were cancelled, where that has been seen before.
    """

    def __init__(
        self, service: tn.ServiceClient, seed: int, steps: int, cancelled: list[bool] | None = None
    ) -> None:
        self.seed, self.steps, self._seen = seed, steps, cancelled
        self.cancelled: list[bool] = []
        self.handles: list[Any] = []
        self.saved: list[str] = []
        self.tc = service.create_training_client(
            lora_config=tn.LoRAConfig(rank=2, dropout=0.1), optimizer={"learning_rate": 1e-2}, seed=seed
        )

    def batch(self, rng: random.Random) -> tn.BatchData:
        return tn.BatchData([[rng.randrange(3, 200) for _ in range(7)] for _ in range(3)])

    def run(self) -> None:
        """Do it, wait for what a user would wait for, and for everything in the end."""
        rng, keep = random.Random(self.seed), self.handles.append
        for number in range(self.steps):
            match rng.choice(
                ("steps", "steps", "steps", "fails", "cancels", "saves", "loads", "samples", "scores")
            ):
                case "steps":
                    for _ in range(rng.randint(1, 3)):
                        keep(self.tc.forward_backward(self.batch(rng)))
                case "fails":
                    keep(self.tc.forward_backward(self.batch(rng)))
                    keep(self.tc.forward_backward(tn.BatchData([[5, 90_000, 7]])))
                    keep(self.tc.optim_step())
                    keep(self.tc.forward_backward(tn.BatchData([[5, 90_001, 7]])))
                    self.handles[-1].exception()  # who was told, and goes on, begins anew
                    keep(self.tc.forward_backward(self.batch(rng)))
                case "cancels":
                    keep(self.tc.sample("abc", max_new_tokens=60))
                    self.cancel(self.tc.forward_backward(self.batch(rng)))
                    keep(self.tc.forward_backward(self.batch(rng)))
                case "saves":
                    handle = self.tc.save_state(name=f"{self.seed}-{number}")
                    keep(handle)
                    if rng.random() < 0.5:
                        self.saved.append(handle.result().artifact_id)
                case "loads" if self.saved:
                    keep(self.tc.load_state(rng.choice(self.saved)))
                    keep(self.tc.forward_backward(self.batch(rng)))
                case "samples":
                    keep(self.tc.sample(["abc", "de"], max_new_tokens=8))
                    keep(self.tc.forward_backward(self.batch(rng)))
                case _:
                    keep(self.tc.compute_logprobs(self.batch(rng)))
                    keep(self.tc.forward_backward(self.batch(rng)))
            keep(self.tc.optim_step())
            if rng.random() < 0.4:
                self.handles[-1].exception()
        for handle in self.handles:
            handle.exception()
        keep(self.tc.compute_logprobs(tn.BatchData([[5, 6, 7, 8, 9]])))
        keep(self.tc.sample("the end", max_new_tokens=12))
        self.handles[-1].result()

    def cancel(self, handle: Any) -> None:
        self.handles.append(handle)
        number = len(self.cancelled)
        wanted = self._seen is None or self._seen[number]
        self.cancelled.append(handle.cancel() if wanted else False)

    def outcomes(self) -> list[Any]:
        """Return how each operation ended: its result, or what its error says."""
        return [self._outcome(handle) for handle in self.handles]

    def _outcome(self, handle: Any) -> Any:
        error = handle.exception()
        if error is not None:
            words = str(error)
            for number, other in enumerate(self.handles):
                words = words.replace(other.future_id, f"operation {number}")
            return handle.operation, error.code, words
        result = encode(handle.result())
        return handle.operation, {name: value for name, value in result.items() if name not in VOLATILE}

    def history(self) -> list[Any]:
        """Return what the log tells, but for the clock, and for when it tells of what was queued or cancelled.

        Whether an operation had started when it was cancelled is a matter of the moment, too.
        """
        numbers = {handle.future_id: number for number, handle in enumerate(self.handles)}
        told = list(self.tc.history.events())
        cancelled = {event.future_id for event in told if isinstance(event, OperationCancelled)}
        events = [
            event
            for event in told
            if not (isinstance(event, OperationStarted) and event.future_id in cancelled)
        ]
        at_any_time = OperationQueued | OperationCancelled
        in_order = [
            event for event in events if not isinstance(event, at_any_time | Progress | StatusChanged)
        ]
        found = [plain(event, numbers) for event in in_order]
        others = [plain(event, numbers) for event in events if isinstance(event, at_any_time)]
        return found + sorted(others, key=lambda record: (record["$"], record["future_id"]))

    def curves(self) -> dict[str, Any]:
        history = self.tc.history
        return {name: [array.tolist() for array in history.series(name)] for name in history.names}


def plain(event: Event, numbers: dict[str, int]) -> Any:
    record = encode(event)
    gone = {
        "seq",
        "time",
        "duration",
        "artifact_id",
        "content_hash",
        "size_bytes",
        "training_client_id",
        "message",
    }
    kept = {name: value for name, value in record.items() if name not in gone}
    if "future_id" in kept:
        kept["future_id"] = numbers[kept["future_id"]]
    return kept


def same(one: Program, other: Program) -> None:
    """Two programs have come to the same, bit for bit."""
    assert len(one.handles) == len(other.handles)
    for number, (here, there) in enumerate(zip(one.outcomes(), other.outcomes(), strict=True)):
        assert here == there, f"operation {number}: {here} and {there}"
    assert one.curves() == other.curves()
    for number, (mine, its) in enumerate(zip(one.history(), other.history(), strict=True)):
        assert mine == its, f"event {number}: {mine} and {its}"
