"""An audit log, and ways to write to it, read it and alter it."""

import json
from pathlib import Path
from typing import Any

from tensafe_nb.protocol.results import AuditLogEntry
from tensafe_nb.store.audit import chain
from tensafe_nb.store.audit.log import AuditLog
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import canonical

CLIENTS = ("tc-1", "tc-2")


VERBS = ("forward_backward", "optim_step", "save_state")


RECORDS = 7  # the first one is the log's own


def quiet_keys(folder: Path) -> Keys:
    return Keys(folder, "file", announce=lambda _: None)


def put(log: AuditLog, number: int = 0, **more: Any) -> AuditLogEntry:
    given_fields: dict[str, Any] = {
        "operation": VERBS[number % 3],
        "training_client_id": CLIENTS[number % 2],
        "request": [b"request", bytes([number])],
        "started_at": 100.0 + number,
        "completed_at": 100.5 + number,
    }
    log.append(**given_fields | more)
    return log.entries(limit=1)[0]


def made(folder: Path) -> AuditLog:
    log = AuditLog(folder / "audit" / "local", quiet_keys(folder / "keys"))
    for number in range(RECORDS - 1):
        put(log, number)
    return log


def again(log: AuditLog) -> AuditLog:
    """The same log as another process finds it."""
    return AuditLog(log.path.parent, quiet_keys(log.path.parents[2] / "keys"))


def key_file(log: AuditLog) -> Path:
    return log.path.with_suffix(".key")


def records(log: AuditLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_bytes().splitlines()]


def write(log: AuditLog, changed: list[dict[str, Any]]) -> None:
    log.path.write_bytes(b"".join(canonical(record) + b"\n" for record in changed))


def cut_after(log: AuditLog, count: int) -> None:
    write(log, records(log)[:count])


def rehashed(changed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chain records anew, as anybody can who has no key: numbers, links and hashes fit, MACs are what they were."""
    head = chain.ZEROS
    for number, record in enumerate(changed):
        record |= {"seq": number, "prev_hash": head}
        head = record["record_hash"] = chain.record_hash(record)
    return changed


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return ("1" if value[:1] != "1" else "2") + value[1:]
        case list():
            return [*value, "art-9"]
    return "something"


class Died(BaseException):
    pass


def die(*_: Any) -> None:
    raise Died
