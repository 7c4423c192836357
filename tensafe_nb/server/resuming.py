"""Bringing training clients back: what a server finds in a home folder when it begins, put together again."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tensafe_nb.config import TrainingConfig
from tensafe_nb.core.bus import EventBus
from tensafe_nb.core.past import Resumed
from tensafe_nb.core.queue import Job
from tensafe_nb.errors import (
    DecryptionError,
    FutureFailedError,
    KeyUnavailableError,
    StorageError,
    TGTinkerError,
    error_of_code,
)
from tensafe_nb.events import (
    CheckpointSaved,
    ClientCreated,
    Event,
    Metrics,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationQueued,
    PrivacySpent,
    StateLoaded,
)
from tensafe_nb.history.log import RunHistory
from tensafe_nb.losses import Loss, resolve_loss
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import decode
from tensafe_nb.protocol.operations import VERBS, ForwardBackward, Operation
from tensafe_nb.protocol.results import (
    FutureStatus,
    OptimStepResult,
    StateSource,
    TrainingClientInfo,
)
from tensafe_nb.server.clients import ServedClient, ended_job
from tensafe_nb.server.journal import Journal, Record, past_of
from tensafe_nb.store.home import Home
from tensafe_nb.transports.embedded import EmbeddedTransport

logger = logging.getLogger(__name__)

OF_AN_OPERATION = (Metrics, CheckpointSaved, StateLoaded, PrivacySpent)  # told while it runs


def journals_of(home: Home, transport: EmbeddedTransport) -> Iterator[Journal]:
    """Open the journals of a tenant's training clients; one that does not open is set aside, and another says so."""
    for folder in home.journals():
        keys = transport.vault.keys
        try:
            journal = Journal(folder, keys, home.tenant)
        except DecryptionError as error:
            created = next(RunHistory(folder.parent / "events.jsonl").events(kinds=(ClientCreated,)), None)
            if not isinstance(created, ClientCreated):
                continue
            aside = folder.with_name(f"journal-damaged-{round(time.time())}")
            folder.rename(aside)
            begun = {
                "training_client_id": created.training_client_id,
                "config": created.config,
                "source": None,
                "created_at": created.time,
                "key": None,
                "failure": f"Its journal was altered or is damaged, so it cannot go on ({error}). The journal is kept "
                f"as {aside.name} in its folder on the server; its saved checkpoints are intact: service.restore(…).",
            }
            journal = Journal(folder, keys, home.tenant, begun)
        except (StorageError, KeyUnavailableError) as error:
            logger.error("the training client %s cannot be brought back: %s", folder.parent.name, error)
            continue
        yield journal


def resume(journal: Journal, home: Home, transport: EmbeddedTransport) -> ServedClient | None:
    """Bring a training client back, as its journal and its log have it; None where it was closed."""
    begun = journal.begun
    bus = EventBus(home.event_log(begun["training_client_id"]))
    if bus.history.state.closed:
        bus.close()
        journal.remove()
        return None
    tell_what_is_owed(bus, journal)
    config = decode(begun["config"], TrainingConfig)
    source = None if begun["source"] is None else decode(begun["source"], StateSource)
    jobs: list[Job] = []
    try:
        if begun["failure"] is not None:
            raise FutureFailedError(begun["failure"])
        loss = resolve_loss(config.loss.type, **config.loss.kwargs)
        jobs = [job_of(name, journal, loss) for name in journal.waiting]
        resumed = Resumed(
            info_of(journal, bus, config, jobs), jobs, journal.base, interrupted(bus), journal.draws
        )
        worker = transport.resume(bus, config, source, journal, resumed)
    except TGTinkerError as error:  # it is there, and says why it cannot go on
        logger.error("%s cannot be brought back: %s", begun["training_client_id"], error)
        jobs, resumed = [], Resumed(info_of(journal, bus, config, []), failure=error)
        worker = transport.resume(bus, config.replace(loss={"type": "token_ce"}), None, None, resumed)
    client = ServedClient(worker, journal)
    for job in jobs:
        handle = client.keep(worker.remember(job))
        if job.past is None and journal.waiting[job.future_id].record["cancelled"]:
            handle.cancel()
    return client


def interrupted(bus: EventBus) -> dict[str, Counter[type[Event]]]:
    """Return the operations that ran as the process ended, and what the log holds of each: of samples, several ran."""
    running = bus.history.state.queue.running
    found = {name: Counter[type[Event]]((type(started),)) for name, started in running.items()}
    if len(running) == 1:  # who runs alone has told all that was told since
        ((name, started),) = running.items()
        since = bus.history.events(started.seq, OF_AN_OPERATION)
        found[name].update(type(event) for event in since if is_core(event))
    return found


def is_core(event: Event) -> bool:
    """Whether the core tells this, and no run."""
    return not isinstance(event, Metrics) or event.run_id is None


def tell_what_is_owed(bus: EventBus, journal: Journal) -> None:
    """Complete the log: what the journal has, and the process did not come to tell any more."""
    first, events = journal.owed
    for event in events[max(bus.history.last_seq + 1 - first, 0) :]:
        bus.publish(decode(event, Event))
    queued = dict(bus.history.state.queue.submitted)
    for name, verb in queued.items():
        ended = journal.results.get(name)
        if ended is not None:
            bus.publish(end_of(ended))
        elif (
            name not in journal.waiting
        ):  # a power cut has taken what was not on the disk yet, or all is damaged
            message = "The server has lost this operation: its journal does not have it. Submit it again."
            bus.publish(
                OperationFailed(future_id=name, operation=verb, code="future_failed", message=message)
            )
    for name, waiting in journal.waiting.items():
        if name not in queued and name not in journal.results:
            bus.publish(OperationQueued(future_id=name, operation=waiting.record["verb"]))


def end_of(ended: Record) -> Event:
    """Return the event that tells of an operation's end."""
    name, verb = ended["future_id"], ended["verb"]
    match FutureStatus(ended["state"]):
        case FutureStatus.COMPLETED:
            return OperationFinished(future_id=name, operation=verb, duration=ended["duration"])
        case FutureStatus.FAILED:
            error = ended["error"]
            return OperationFailed(
                future_id=name, operation=verb, code=error["code"], message=error["message"]
            )
        case _:
            return OperationCancelled(future_id=name, operation=verb)


def job_of(future_id: str, journal: Journal, loss: Loss) -> Job:
    """Return the job of an operation that came in after the last automatic checkpoint."""
    record, ended = journal.operation(future_id), journal.results.get(future_id)
    kind = VERBS[record["verb"]]
    if record["error"] is not None:
        job = Job(None, kind, refusal=error_of_code(**record["error"]))
    else:
        try:
            job = Job.of(wire.unpack(record["type"], record.body, Operation), loss)
        except TGTinkerError as error:  # a loss that is registered here no more
            if ended is not None and ended["state"] == FutureStatus.COMPLETED:
                raise
            job = Job(None, kind, refusal=error)
        job.artifact_id = record["artifact_id"]
    job.future_id = future_id
    if kind is ForwardBackward:
        job.knows_of = journal.known_to(future_id)
    if ended is not None:
        job.past = past_of(ended)
        ended_job(ended, job)
    return job


def info_of(journal: Journal, bus: EventBus, config: TrainingConfig, jobs: list[Job]) -> TrainingClientInfo:
    """Return how a training client stands, before its model is loaded."""
    state, begun = bus.history.state, journal.begun
    if journal.info is not None:
        info: TrainingClientInfo = decode(journal.info, TrainingClientInfo)
    else:
        info = TrainingClientInfo(
            begun["training_client_id"], config.model_ref, str(state.entered), 0, 0, begun["created_at"]
        )
    changes: dict[str, Any] = {"status": str(state.entered), "reason": state.reason, "step": state.step}
    for job in jobs:
        value = job.promise.value
        if isinstance(value, OptimStepResult):
            changes |= {"policy_version": value.policy_version, "dp_metrics": value.dp_metrics}
    return replace(info, **changes)
