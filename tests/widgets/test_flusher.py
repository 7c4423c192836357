"""The one thread that sends."""

import logging
import threading
from collections.abc import Iterator

import pytest

from tensafe_nb.widgets.feed.flusher import PERIOD, Flusher

PATIENCE = 250.0  # seconds: the hang guard speaks before


class Lamp:
    """A member that notes on which thread it was flushed, and how often."""

    def __init__(self, again: float | None = None) -> None:
        self.live = True
        self.busy = False
        self.again = again
        self.flushed = threading.Semaphore(0)
        self.threads: set[str] = set()
        self.flushes = 0

    def flush(self) -> float | None:
        self.threads.add(threading.current_thread().name)
        self.flushes += 1
        self.flushed.release()
        return self.again


class Broken(Lamp):
    def flush(self) -> float | None:
        super().flush()
        raise RuntimeError("broken")


@pytest.fixture
def flusher() -> Iterator[Flusher]:
    flusher = Flusher()
    yield flusher
    flusher.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tsnb-view"]


def test_a_woken_member_is_flushed_on_the_views_thread(flusher: Flusher) -> None:
    lamp = Lamp()
    flusher.wake(lamp)
    assert lamp.flushed.acquire(timeout=PATIENCE)
    assert lamp.threads == {"tsnb-view"}


def test_many_wakes_are_one_flush(flusher: Flusher) -> None:
    lamp = Lamp()
    flusher.wake(lamp)
    assert lamp.flushed.acquire(timeout=PATIENCE)
    for _ in range(1_000):
        flusher.wake(lamp)
    assert lamp.flushed.acquire(timeout=PATIENCE)
    assert lamp.flushes <= 3


def test_an_urgent_wake_does_not_wait_for_its_turn() -> None:
    flusher = Flusher()
    flusher.now = lambda: 50.0  # type: ignore[method-assign]  # time stands still: no period ever ends
    flusher._flushed_at = 50.0
    lamp = Lamp()
    flusher._due[lamp] = None
    flusher._woken = True
    assert flusher.seconds_to_wait() == pytest.approx(PERIOD)
    flusher._urgent = True
    assert flusher.seconds_to_wait() == 0.0


def test_a_member_may_ask_to_be_called_again(flusher: Flusher) -> None:
    lamp = Lamp(again=0.0)
    flusher.wake(lamp)
    for _ in range(3):
        assert lamp.flushed.acquire(timeout=PATIENCE)


def test_the_thread_ends_with_the_last_live_member_and_comes_back_when_woken(flusher: Flusher) -> None:
    lamp = Lamp()
    flusher.wake(lamp)
    assert lamp.flushed.acquire(timeout=PATIENCE)
    lamp.live = False
    flusher.wake(lamp)
    assert flusher.settle([lamp], PATIENCE)
    assert flusher._thread is None
    flusher.wake(lamp, urgent=True)
    assert flusher.settle([lamp], PATIENCE)
    assert lamp.flushes >= 3


def test_settling_does_not_wait_for_members_that_live_on(flusher: Flusher) -> None:
    ended, living = Lamp(), Lamp()
    ended.live = False
    flusher.wake(living)
    flusher.wake(ended)
    assert flusher.settle([ended], PATIENCE)


def test_settling_waits_for_the_next_flush_of_who_lives_on_and_for_who_is_busy(flusher: Flusher) -> None:
    living, painting = Lamp(again=0.0), Lamp(again=0.0)
    painting.busy = True
    flusher.wake(living)
    flusher.wake(painting)
    flushed = living.flushes
    assert flusher.settle([living], PATIENCE)
    assert living.flushes > flushed
    assert not flusher.settle([painting], 0.3)
    painting.busy = False
    assert flusher.settle([painting], PATIENCE)


def test_a_broken_member_does_not_silence_the_others(
    flusher: Flusher, caplog: pytest.LogCaptureFixture
) -> None:
    broken, lamp = Broken(), Lamp()
    with caplog.at_level(logging.CRITICAL):
        flusher.wake(broken)
        flusher.wake(lamp)
        assert lamp.flushed.acquire(timeout=PATIENCE)
        flusher.wake(lamp)
        assert lamp.flushed.acquire(timeout=PATIENCE)


def test_a_closed_view_starts_no_thread() -> None:
    flusher = Flusher()
    flusher.close()
    flusher.wake(Lamp())
    assert flusher._thread is None


def test_a_forked_child_starts_anew() -> None:
    flusher = Flusher()
    flusher.close()
    flusher.start_anew()
    lamp = Lamp()
    flusher.wake(lamp)
    assert lamp.flushed.acquire(timeout=PATIENCE)
    flusher.close()
