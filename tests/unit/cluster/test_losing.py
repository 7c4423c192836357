"""A group that loses replicas: in verbs of which one answer is enough, all at once, and while they come."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.cluster.group import EngineGroup, Inbox
from tensafe_nb.cluster.local_places import ThreadPlace
from tensafe_nb.config import SamplingConfig, TrainingConfig
from tensafe_nb.engine.accumulation import no_tick
from tensafe_nb.engine.engine import Engine
from tensafe_nb.events import ReplicasChanged
from tensafe_nb.losses import resolve_loss
from tests.unit.cluster.groups import CONFIG, WatchedPlaces

LOSS = resolve_loss("token_ce")
Told = list[ReplicasChanged]
Grouped = Callable[..., tuple[EngineGroup, Told]]


def batch(rows: int = 6, seed: int = 0) -> tn.BatchData:
    return tn.BatchData(np.random.default_rng(seed).integers(3, 200, (rows, 9)))


@pytest.fixture
def grouped() -> Iterator[Grouped]:
    """Makes groups of threads."""
    groups = []

    def make(places: WatchedPlaces, size: int = 2) -> tuple[EngineGroup, Told]:
        told: Told = []
        groups.append(EngineGroup(TrainingConfig(**CONFIG), places, size, told.append, no_tick))  # type: ignore[arg-type]
        return groups[-1], told

    yield make
    for group in groups:
        group.close()


def changes(told: Told) -> list[tuple[str, int]]:
    return [(event.change, event.replicas) for event in told]


def awaited(group: EngineGroup, places: WatchedPlaces, replicas: int) -> None:
    """Wait until so many have loaded since the last time, and let the group take them in."""
    for _ in range(replicas):
        places.there.acquire()
    group.streams()


def stepped(engine: Any, seed: int = 1) -> list[float]:
    loss = engine.forward_backward(batch(seed=seed), LOSS, no_tick)
    taken = engine.optim_step(True)
    return [loss.loss, loss.grad_norm, taken.grad_norm, taken.param_delta_norm]


def other_adapter(engine: Any) -> int:
    tensors = {
        name: array + np.float32(0.01) for name, array in sorted(engine.read_adapter().tensors.items())
    }
    return int(engine.load_adapter(tensors).policy_version)


def streams_again(engine: Any) -> int:
    engine.restore_streams(engine.streams() | {"samples_drawn": 4})
    return int(engine.samples_drawn)


FURTHER: dict[str, Callable[[Any], Any]] = {
    "read_adapter": lambda e: float(sum(np.abs(a).sum() for a in e.read_adapter().tensors.values())),
    "load_adapter": other_adapter,
    "factors": lambda e: len(e.factors([0], None).matrices),
    "estimate": lambda e: e.estimate(4, 9).batch_size,
    "streams": lambda e: e.streams()["samples_drawn"],
    "restore_streams": streams_again,
    "discard_gradients": lambda e: e.discard_gradients() or e.window.batches,
}


def test_verbs_that_one_replica_answers_or_all_follow_lose_nothing_with_one_and_nothing_when_it_is_replaced(
    grouped: Grouped,
) -> None:
    """One group through all of them: it loses a replica in each, and goes on with the one that comes."""
    places = WatchedPlaces()
    group, told = grouped(places)
    awaited(group, places, 2)
    alone = Engine(group.config)
    for method, verb in FURTHER.items():
        places.lose_at(method)
        assert verb(group) == pytest.approx(verb(alone), rel=1e-6), method
        places.gone.acquire()
        group.streams()  # hears of it
        awaited(group, places, 1)
        assert changes(told)[-2:] == [("LOST", 1), ("JOINED", 2)], method
    assert stepped(group) == pytest.approx(stepped(alone), rel=1e-6)


ALL_LOST: dict[str, Callable[[EngineGroup], object]] = {
    "contribute": stepped,
    "absorb": stepped,
    "sample": lambda g: g.sample(["a", "b"], SamplingConfig(), no_tick),
    "restore": lambda g: g.restore(g.capture(True)),
}


@pytest.mark.parametrize("method", ALL_LOST)
def test_all_replicas_lost_within_an_operation_end_it_with_how_to_go_on(
    grouped: Grouped, method: str
) -> None:
    places = WatchedPlaces()
    group, told = grouped(places)
    places.lose_at(method, most=2)
    with pytest.raises(tn.ClusterError, match=r"All replicas .* service\.restore"):
        ALL_LOST[method](group)
    assert changes(told)[-1] == ("LOST", 0)


class LosingWhileComing(WatchedPlaces):
    """Loses the second replica before or behind its loading, while the third is still at it."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.after = after

    def start(self, inbox: Inbox) -> ThreadPlace:
        place = super().start(inbox)
        if len(self.places) == 2:
            losing = lambda *_: (place.lose(), self.gone.release())  # noqa: E731
            place.watch, place.behind = (None, losing) if self.after else (losing, None)
        elif len(self.places) == 3:
            place.watch = lambda _, method: self.gone.acquire() if method == "load" else None
        return place


@pytest.mark.parametrize("after", [False, True], ids=["before it has loaded", "behind that"])
def test_a_replica_lost_while_the_group_begins_is_replaced_by_another(grouped: Grouped, after: bool) -> None:
    places = LosingWhileComing(after)
    group, told = grouped(places, 3)
    awaited(group, places, 3)
    assert changes(told)[-1] == ("JOINED", 3)
    assert stepped(group) == pytest.approx(stepped(Engine(group.config)), rel=1e-6)


def test_a_newcomer_that_is_lost_before_or_while_it_takes_over_is_followed_by_another(
    grouped: Grouped,
) -> None:
    places = WatchedPlaces()
    group, told = grouped(places)
    awaited(group, places, 2)
    places.living[0].lose()
    group.streams()
    places.there.acquire()
    places.living[-1].lose()  # it has loaded, and is gone before anybody has asked it
    group.streams()
    places.there.acquire()
    newcomer = places.living[-1]
    places.living[0].watch = lambda _, method: newcomer.lose() if method == "capture" else None
    group.streams()  # gone while another says what it is to take over
    places.there.acquire()
    places.lose_at("adopt")  # gone while it takes over
    group.streams()
    places.gone.acquire()
    group.streams()
    assert changes(told) == [("STARTED", 2), ("LOST", 1), ("MISSING", 1)]  # three in a row: that is enough
    stepped(group)
    assert changes(told)[-1] == ("MISSING", 1)


class Strange(WatchedPlaces):
    """Who comes later has trained on something else."""

    def start(self, inbox: Inbox) -> ThreadPlace:
        place = super().start(inbox)
        replica = place._replica
        if len(self.places) > 2:
            adopt = replica.adopt

            def other(state: Any) -> Any:
                adopt(state)
                with_another_bit = replica._engine.parameters[0]
                with_another_bit.data.view(-1)[0] += 1.0
                replica._digest = (-1, "")
                return replica._standing()

            replica.adopt = other  # type: ignore[method-assign]
        return place


def test_a_newcomer_that_computes_other_numbers_is_not_let_in(grouped: Grouped) -> None:
    places = Strange()
    group, told = grouped(places)
    awaited(group, places, 2)
    places.living[0].lose()
    group.streams()
    for _ in range(3):
        awaited(group, places, 1)
    assert changes(told) == [("STARTED", 2), ("LOST", 1), ("MISSING", 1)]
    assert told[-1].reason == "it computes other numbers than the rest"
    assert len(places.living) == 1


class Full(WatchedPlaces):
    """A machine on which nothing more can be started."""

    def start(self, inbox: Inbox) -> ThreadPlace:
        if len(self.places) == 2:
            raise OSError("no processes left")
        return super().start(inbox)


def test_a_place_that_cannot_be_started_is_told_and_the_rest_goes_on(grouped: Grouped) -> None:
    places = Full()
    group, told = grouped(places)
    places.living[0].lose()
    stepped(group)
    assert changes(told) == [("STARTED", 2), ("LOST", 1), ("MISSING", 1)]
    assert told[-1].reason == "no processes left"


def test_a_step_that_is_refused_leaves_the_group_where_its_replicas_are(grouped: Grouped) -> None:
    """So that who comes next is not taken for another."""
    places = WatchedPlaces()
    group, told = grouped(places)
    awaited(group, places, 2)
    nothing = tn.BatchData([[5, 6, 7]] * 4, labels=[[5] * 3] * 4)
    group.forward_backward(nothing, resolve_loss("token_ce", ignore_index=5), no_tick)
    with pytest.raises(tn.ValidationError, match="no mean gradient"):
        group.optim_step()
    assert group.window.batches == 0
    places.living[0].lose()
    group.streams()
    awaited(group, places, 1)
    assert changes(told)[-1] == ("JOINED", 2)


def test_what_is_cancelled_while_a_replica_is_lost_is_cancelled_and_leaves_nothing_behind(
    grouped: Grouped,
) -> None:
    places = WatchedPlaces()
    group, _ = grouped(places, 3)
    awaited(group, places, 3)
    places.lose_at("contribute")

    def cancelling(done: int, total: int) -> None:
        if any(place.lost for place in places.places):
            raise tn.FutureCancelledError("cancelled while running")

    with pytest.raises(tn.FutureCancelledError):
        group.forward_backward(batch(rows=24), LOSS, cancelling)
    assert group.window.batches == 0
    assert stepped(group) == pytest.approx(stepped(Engine(group.config)), rel=1e-6)
