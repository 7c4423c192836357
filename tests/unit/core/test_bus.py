import asyncio
import gc
import stat
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import tensafe_nb as tn
from tensafe_nb.core.bus import EventBus
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Event, LineChanged, Metrics, OperationStarted, Progress
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.stream import Subscriptions, stream
from tensafe_nb.locks import is_being_written


@pytest.fixture
def bus(tmp_path: Path) -> EventBus:
    return EventBus(tmp_path / "run" / "events.jsonl")


def metrics(step: int, **values: float) -> Metrics:
    return Metrics(step=step, values=values)


def test_events_are_numbered_in_order_and_persisted_readable_by_their_owner_only(bus: EventBus) -> None:
    for step in range(3):
        bus.publish(metrics(step, loss=1.0 / (step + 1)))
    bus.close()
    assert stat.S_IMODE(bus.history.path.stat().st_mode) == 0o600
    again = RunHistory.load(bus.history.path)
    assert [event.seq for event in again.events()] == [1, 2, 3]
    assert again["loss"].tolist() == bus.history["loss"].tolist() == [1.0, 0.5, 1 / 3]


def test_what_one_log_has_numbered_another_numbers_anew(bus: EventBus, tmp_path: Path) -> None:
    other = EventBus(tmp_path / "other" / "events.jsonl")
    other.publish(metrics(0, loss=1.0))
    told = [log.publish(event) for event in [metrics(1, loss=0.5)] for log in (bus, other, bus)]
    assert [event.seq for event in told] == [1, 2, 2]
    assert [event.seq for log in (bus, other) for event in log.history.events()] == [1, 2, 1, 2]
    bus.close()
    other.close()


def test_progress_is_shown_and_not_persisted(bus: EventBus) -> None:
    seen: list[object] = []
    bus.subscribe(seen.append)
    bus.publish(Progress(future_id="f", done=1, total=2))
    bus.publish(OperationStarted(future_id="f", operation="sample"))
    assert [type(event).__name__ for event in seen] == ["Progress", "OperationStarted"]
    assert [type(event).__name__ for event in bus.history.events()] == ["OperationStarted"]
    bus.close()


def test_a_line_that_broke_off_is_told_and_not_persisted(bus: EventBus) -> None:
    seen: list[Event] = []
    bus.subscribe(seen.append)
    bus.record(LineChanged(state="RECONNECTING", reason="nobody answers"))
    assert seen == [bus.history.state.line] and list(bus.history.events()) == []
    with pytest.raises(ValidationError, match="none of OPEN, RECONNECTING, LOST"):
        LineChanged(state="GONE")
    bus.close()


def test_a_late_subscriber_gets_the_whole_history_and_then_what_comes(bus: EventBus) -> None:
    for step in range(5):
        bus.publish(metrics(step, loss=0.0))
    seen: list[int] = []
    unsubscribe = bus.subscribe(lambda event: seen.append(event.seq), after=2)
    bus.publish(metrics(5, loss=0.0))
    unsubscribe()
    bus.publish(metrics(6, loss=0.0))
    assert seen == [3, 4, 5, 6]
    bus.close()


def test_a_torn_last_line_is_ignored(bus: EventBus) -> None:
    bus.publish(metrics(0, loss=1.0))
    bus.close()
    with bus.history.path.open("a") as log:
        log.write('{"$": "Metrics", "st')
    assert len(list(RunHistory.load(bus.history.path).events())) == 1


def test_non_finite_values_survive_the_log(bus: EventBus) -> None:
    bus.publish(metrics(0, loss=float("nan"), grad_norm=float("inf")))
    bus.close()
    history = RunHistory.load(bus.history.path)
    assert str(history["loss"]) == "[nan]"
    assert str(history["grad_norm"]) == "[inf]"


def test_a_log_that_is_being_written_can_be_told_from_one_that_is_not(bus: EventBus) -> None:
    bus.publish(metrics(0, loss=1.0))
    assert is_being_written(bus.history.path)
    bus.close()
    assert not is_being_written(bus.history.path)


def test_the_clients_events_end_when_it_is_closed(service: tn.ServiceClient) -> None:
    tc = service.create_training_client()

    async def main() -> list[str]:
        await tc.ready()
        tc.close()
        return [type(event).__name__ async for event in tc.events()]

    assert asyncio.run(main()) == ["ClientCreated", "StatusChanged", "StatusChanged"]


def test_a_metric_that_is_no_number_is_refused_before_it_is_written(bus: EventBus) -> None:
    with pytest.raises(tn.ValidationError, match="the value of 'loss' is 'low'"):
        bus.publish(Metrics(step=1, values={"loss": "low"}))
    assert list(bus.history.events()) == []
    bus.close()


def test_a_subscriber_that_fails_is_reported_once_and_told_no_more(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def tracker(event: Event) -> None:
        seen.append(event.seq)
        raise ConnectionError("no route to the tracking server")

    bus.subscribe(tracker)
    for step in range(20):
        bus.publish(Metrics(step=step, values={"loss": 1.0}))
    assert seen == [1]
    (record,) = [found for found in caplog.records if found.levelname == "ERROR"]
    assert "tracker" in record.getMessage() and "after=0" in record.getMessage()
    assert "no route to the tracking server" in caplog.text


@pytest.mark.parametrize("subscriber", ["print", None])
def test_what_cannot_be_called_is_no_subscriber(bus: EventBus, subscriber: Any) -> None:
    with pytest.raises(ValidationError, match="plain function of one event"):
        bus.subscribe(subscriber)


def test_a_coroutine_function_is_sent_to_the_iterator(bus: EventBus) -> None:
    async def tracker(event: Event) -> None: ...

    with pytest.raises(ValidationError, match=r"async for event in tc\.events"):
        bus.subscribe(tracker)


def test_subscriptions_end_with_their_owner(bus: EventBus) -> None:
    seen: list[int] = []
    owner = Subscriptions(bus.subscribe)
    end = owner.add(lambda event: seen.append(event.seq))
    owner.add(lambda event, owner=owner: None)  # refers to its owner, and does not keep it
    bus.publish(Metrics(step=1, values={"loss": 1.0}))
    end()
    bus.publish(Metrics(step=2, values={"loss": 1.0}))
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None and seen == [1]


def test_a_loop_is_woken_once_for_events_that_come_together(bus: EventBus) -> None:
    async def follow() -> tuple[list[int], int]:
        events = stream(bus.subscribe, bus.history.last_seq)
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)  # it has subscribed
        loop = asyncio.get_running_loop()
        with patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as woken:
            for _ in range(50):
                bus.publish(metrics(1, loss=1.0))
            seen = [(await first).seq] + [(await anext(events)).seq for _ in range(49)]
            woken_before = woken.call_count
            bus.publish(metrics(1, loss=1.0))
            seen.append((await anext(events)).seq)
        await events.aclose()
        return seen, woken_before

    seen, woken = asyncio.run(follow())
    assert (woken, seen) == (1, sorted(seen)) and len(set(seen)) == 51
