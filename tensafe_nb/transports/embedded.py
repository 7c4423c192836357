"""The core in the same process: each training client is a Worker with a thread of its own."""

import atexit
import uuid

from tensafe_nb.config import TrainingConfig
from tensafe_nb.engine.worker import Worker
from tensafe_nb.events import ClientCreated, EventBus
from tensafe_nb.losses import resolve_loss
from tensafe_nb.plain import to_plain
from tensafe_nb.store import home
from tensafe_nb.transports.base import Channel


class EmbeddedTransport:
    """Training clients of this process."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        atexit.register(self.close)  # a script that just ends leaves no thread inside torch

    def create(self, config: TrainingConfig) -> Channel:
        loss = resolve_loss(config.loss.type, **config.loss.kwargs)
        training_client_id = f"tc-{uuid.uuid4().hex[:12]}"
        created = ClientCreated(training_client_id=training_client_id, config=to_plain(config))
        bus = EventBus(home.event_log(training_client_id))
        bus.publish(created)
        worker = Worker(training_client_id, config, bus, loss)
        self._workers[training_client_id] = worker
        return worker

    def channels(self) -> list[Channel]:
        return [worker for worker in self._workers.values() if worker.info().status != "TERMINATED"]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
            worker.bus.close()
        self._workers.clear()
        atexit.unregister(self.close)
