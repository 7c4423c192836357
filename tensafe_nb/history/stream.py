"""Events for whoever awaits them: an asynchronous iterator over what subscribers are told on other threads."""

import asyncio
from collections.abc import AsyncIterator, Callable

from tensafe_nb.events import Event, StatusChanged
from tensafe_nb.protocol.results import ClientStatus

Subscribe = Callable[[Callable[[Event], None], int | None], Callable[[], None]]


async def stream(subscribe: Subscribe, after: int) -> AsyncIterator[Event]:
    """Iterate over events as they come, until the training client is closed; see `TrainingClient.events`."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, event)

    unsubscribe = subscribe(put, after)
    try:
        while True:
            event = await queue.get()
            yield event
            if isinstance(event, StatusChanged) and event.status == ClientStatus.TERMINATED:
                return
    finally:
        unsubscribe()
