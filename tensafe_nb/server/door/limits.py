"""What a tenant may have at a time: its quotas, and how often it has asked within the last minute."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from tensafe_nb.errors import QueueFullError, StorageError, ValidationError, nearest

R = TypeVar("R")

MINUTE = 60.0  # s
AGAIN = 1.0  # s after which whoever found a queue full may ask again
ASIDE = 4  # questions of one tenant that may each hold a thread: there are some for the others


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tenant may have at a time.

    Attributes:
        clients: Training clients.
        queued: Operations that wait, of all its clients together.
        requests: A minute.
        encrypted: Connections for encrypted calls: each holds rotation keys and encoded adapters, up to 300 MB.
        stored_bytes: Of everything that it stores; None has no limit.
    """

    clients: int = 32
    queued: int = 4_000
    requests: int = 60_000
    encrypted: int = 8
    stored_bytes: int | None = None

    def with_those_of(self, given: Mapping[str, Any]) -> "Limits":
        """Return them with some replaced, as a file of tokens may say.

        Raises:
            ValidationError: A name that is none, or no number.
        """
        names = [field.name for field in fields(self)]
        for name, value in given.items():
            if name not in names:
                raise ValidationError(f"There is no limit {name!r}.{nearest(name, names)}")
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
                raise ValidationError(f"The limit {name} is a whole number, not {value!r}.")
        return replace(self, **given)

    @property
    def named(self) -> dict[str, int]:
        """Those that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Quotas:
    """The limits of each tenant, and what it has used of those that count by time.

    Args:
        usual: Of a tenant that has none of its own.
        own: Returns what is set for single tenants; asked anew each time.
    """

    def __init__(
        self, usual: Limits, own: Callable[[], Mapping[str, Mapping[str, Any]]] = lambda: {}
    ) -> None:
        self._usual, self._own = usual, own
        self._recent: dict[str, deque[float]] = {}
        self._aside: dict[str, asyncio.Semaphore] = {}
        self.rejected: dict[str, int] = {}  # requests that were refused, by the code they were refused with

    def of(self, tenant: str) -> Limits:
        """Return what a tenant may have."""
        given = self._own().get(tenant)
        return self._usual.with_those_of(given) if given else self._usual

    def seconds_to_wait(self, tenant: str) -> int:
        """Count a request of a tenant; return after how many seconds it may ask again, 0 if it may now."""
        now, recent = time.monotonic(), self._recent.setdefault(tenant, deque())
        while recent and recent[0] < now - MINUTE:
            recent.popleft()
        if len(recent) >= self.of(tenant).requests:
            return max(1, round(MINUTE - (now - recent[0]))) if recent else int(MINUTE)
        recent.append(now)
        return 0

    def note(self, code: str) -> None:
        """Count a request that is refused."""
        self.rejected[code] = self.rejected.get(code, 0) + 1

    async def aside(self, tenant: str, work: Callable[..., R], *arguments: Any) -> R:
        """Do on a thread what may take long; a tenant that asks for much waits for itself alone."""
        async with self._aside.setdefault(tenant, asyncio.Semaphore(ASIDE)):
            return await asyncio.to_thread(work, *arguments)


def too_many_clients(there: int) -> QueueFullError:
    """Say that a tenant has all the training clients it may."""
    return QueueFullError(
        f"This tenant has {there} training clients, as many as it may. Close one: tc.close().",
        code="too_many",
    )


def too_many_connections(there: int) -> QueueFullError:
    """Say that a tenant can have no further encrypted connection."""
    return QueueFullError(
        f"There are {there} encrypted connections already, as many as this tenant may have at a time. Close some: "
        f"he.close(). Those that nobody uses are dropped after a while.",
        code="too_many",
    )


def too_many_waiting(most: int) -> QueueFullError:
    """Say that nothing more of a tenant can wait just now: whoever submits waits instead, and asks again."""
    return QueueFullError(
        f"{most:,} operations of this tenant are waiting, as many as may. Ask again in {AGAIN:g} s.",
        code="too_many_waiting",
        details={"retry_after": AGAIN},
    )


def too_much_stored(stored: Mapping[str, int], most: int) -> StorageError:
    """Say that a tenant's share of the disk is full, with what, and what frees some of it."""
    there = ", ".join(f"{name} {count:,}" for name, count in stored.items())
    return StorageError(
        f"This tenant stores {sum(stored.values()):,} bytes of the {most:,} that it may ({there}). Delete checkpoints: "
        f"service.delete_artifact(…). Close training clients that you need no more: tc.close() removes their journals "
        f"and automatic checkpoints. Logs and records are for whoever runs the server to remove.",
        details={"stored": dict(stored), "limit": most},
    )
