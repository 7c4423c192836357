"""Events for whoever awaits them: an asynchronous iterator over what subscribers are told on other threads."""

import asyncio
import inspect
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Event, StatusChanged
from tensafe_nb.protocol.results import ClientStatus

Subscriber: TypeAlias = Callable[[Event], None]
Subscribe: TypeAlias = Callable[[Subscriber, int | None], Callable[[], None]]


async def stream(subscribe: Subscribe, after: int) -> AsyncIterator[Event]:
    """Iterate over events as they come, until the training client is closed; see `TrainingClient.events`."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    queue: deque[Event] = deque()
    asleep = threading.Event()  # the loop has not been told of what lies in the queue
    asleep.set()

    def put(event: Event) -> None:
        queue.append(event)
        if asleep.is_set() and not loop.is_closed():  # a notebook's loop may end before the training does
            asleep.clear()
            loop.call_soon_threadsafe(wake)  # once for all that come until the loop gets to it

    def wake() -> None:
        asleep.set()
        told.set()

    unsubscribe = subscribe(put, after)
    try:
        while True:
            await told.wait()
            told.clear()
            while queue:
                event = queue.popleft()
                yield event
                if isinstance(event, StatusChanged) and event.status == ClientStatus.TERMINATED:
                    return
    finally:
        unsubscribe()


class Subscriptions:
    """The subscribers of one owner; they end with their owner.

    The bus belongs to a thread, which nothing frees while it runs. Were a subscriber in its hands, so were all that
    the subscriber refers to, for instance the training client it belongs to: no client could ever be let go.

    Args:
        subscribe: Of a training client's core, which refers to none of them.
    """

    def __init__(self, subscribe: Subscribe) -> None:
        self._subscribe = subscribe
        self._subscribers: dict[object, Subscriber] = {}

    def add(self, subscriber: Subscriber, after: int | None = None) -> Callable[[], None]:
        """Subscribe; returns a function that ends the subscription. See `EventBus.subscribe`."""
        check_subscriber(subscriber)
        key, held_by = object(), weakref.ref(self)

        def forward(event: Event) -> None:
            owner = held_by()
            if owner is not None and key in owner._subscribers:
                owner._subscribers[key](event)

        def unsubscribe() -> None:
            owner = held_by()
            if owner is not None:
                owner._subscribers.pop(key, None)
            end()

        forward.__qualname__ = name_of_subscriber(subscriber)
        self._subscribers[key] = subscriber
        end = self._subscribe(forward, after)
        return unsubscribe


def check_subscriber(subscriber: object) -> None:
    if not callable(subscriber) or inspect.iscoroutinefunction(subscriber):
        raise ValidationError(
            f"A subscriber is a plain function of one event, called where it happens, not {as_given(subscriber)}. "
            f"To await events: async for event in tc.events()."
        )


def name_of_subscriber(subscriber: object) -> str:
    return getattr(subscriber, "__qualname__", None) or repr(subscriber)
