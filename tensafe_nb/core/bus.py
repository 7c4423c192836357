"""The event bus of a training client: the core numbers its events."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tensafe_nb.events import UNRECORDED, Event
from tensafe_nb.history.recorder import Recorder


class EventBus(Recorder):
    """Numbers, records and hands out the events of one training client.

    Args:
        path: The log; created with its folder, readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._seq = self.history.last_seq

    def publish(self, event: Event) -> Event:
        """Give an event its number and time, record it, and tell the subscribers.

        What is not recorded bears the number of the event before it: a number that was told, and is not in the log,
        would be given out again for something else after the process was killed.
        """
        with self._lock:
            self._seq += not isinstance(event, UNRECORDED)
            event = event.numbered(self._seq, time.time())
            self.record(event)
        return event

    def publish_all(self, events: Sequence[Event], before: Callable[[int], object]) -> int:
        """Publish several, with numbers one behind the other, and return the last.

        Args:
            events: What to publish.
            before: Called with the number that the first will have, before anything of them is on record.
        """
        with self._lock:
            before(self._seq + 1)
            for event in events:
                self.publish(event)
            return self._seq
