"""A cluster of Ray, as far as the notebook knows it: the pipe to a driver, here to a program that stands in for one."""

import argparse
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.cli.server import cluster_of
from tensafe_nb.cluster import clusters, group, ray_places
from tensafe_nb.cluster.group import Inbox
from tensafe_nb.cluster.local_places import ShippedOnce, ThreadPlace
from tensafe_nb.cluster.ray_places import RayDriver, RayLink, RayPlace
from tensafe_nb.events import Alarm, ReplicasChanged
from tensafe_nb.store.home import Home
from tests.unit.cluster.groups import CONFIG, Threads

# Says what its address is, and of each replica that it is told of what is done with it; a call of "die" ends it.
STAND_IN = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[4])
import cloudpickle
from tensafe_nb.cluster.frames import read_frame, write_frame
from tensafe_nb.rlvr.scoring.shipping import arrived, shipped
requests, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb")
tell = lambda *message: write_frame(answers, cloudpickle.dumps(message))
if sys.argv[2] == "deaf:1":
    time.sleep(600)
if sys.argv[2] == "full:1":
    tell("refused", "Connection refused")
    sys.exit()
tell("connected", "2.0")
while (frame := read_frame(requests)) is not None:
    order, number, *arguments = cloudpickle.loads(frame)
    if order == "start":
        tell(number, ("at", f"here, {arguments}"))
        tell(number, ("waiting", "it wants 4 CPU"))
    elif order == "call" and len(arguments) == 2:
        for n in range(arguments[1]):
            tell(number, json.dumps([n, None]).encode())
    elif order == "call":
        call, method, blob = arguments
        if method == "die":
            print("the head is gone", file=sys.stderr, flush=True)
            os._exit(3)
        tell(number, shipped(("answer", call, arrived(blob))))
    else:
        tell(1, shipped((order, number)))
"""


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], RayDriver]]:
    monkeypatch.setattr(ray_places, "PROGRAM", STAND_IN)
    made: list[RayDriver] = []

    def make(address: str) -> RayDriver:
        made.append(RayDriver(address))
        return made[-1]

    yield make
    for driver in made:
        driver.close()
        assert driver._process.returncode is not None
        assert not os.path.exists(driver._folder)  # noqa: PTH110


def test_what_a_driver_says_of_an_actor_comes_to_its_place_alone(
    drivers: Callable[[str], RayDriver],
) -> None:
    driver = drivers("auto")
    one, other, once = queue.SimpleQueue[Any](), queue.SimpleQueue[Any](), ShippedOnce()
    first, second = RayPlace(driver, 2, 0, one, once), RayPlace(driver, 1, 1, other, once)
    assert one.get() == (first, ("waiting", "it wants 4 CPU"))
    second.send(7, "capture", (True,))
    assert [other.get(), other.get()][1] == (second, ("answer", 7, (True,)))
    assert (first.name, second.name) == (
        "replica 1 (here, ['replica', 2, 0])",
        "replica 2 (here, ['replica', 1, 1])",
    )
    second.interrupt()
    second.end()
    second.end()
    assert [one.get(), one.get()] == [(first, ("interrupt", 2)), (first, ("end", 2))]
    assert other.empty() and not driver.idle
    first.end()
    assert driver.idle


def test_what_a_driver_says_of_a_process_that_scores_comes_as_that_of_one_here(
    drivers: Callable[[str], RayDriver],
) -> None:
    driver, inbox = drivers("auto"), queue.SimpleQueue[Any]()
    link = RayLink(driver, inbox)
    link.load(0, b"")
    assert inbox.get() == (link, [0, None])
    assert link.lack == "it wants 4 CPU"
    link.run(0, 3, [[1], [2]])
    assert [inbox.get(), inbox.get()] == [(link, [0, None]), (link, [1, None])]
    with pytest.raises(TypeError):  # what cannot be sent is known at once
        link.run(0, 0, [[threading.Lock()]])
    dies = RayPlace(driver, 1, 0, queue.SimpleQueue(), ShippedOnce())
    dies.send(1, "die", ())
    here, reason = inbox.get()
    assert here is link and "the head is gone" in reason
    link.kill()
    with pytest.raises(tn.ClusterError, match="is gone"):
        RayLink(driver, inbox)


def test_a_driver_that_ends_takes_all_its_replicas_with_it_and_says_why(
    drivers: Callable[[str], RayDriver],
) -> None:
    driver = drivers("auto")
    inbox = queue.SimpleQueue[Any]()
    places = [RayPlace(driver, 1, 0, inbox, ShippedOnce()) for _ in range(2)]
    places[0].send(1, "die", ())
    heard = [inbox.get() for _ in range(4)]
    lost = [(place, reason) for place, (kind, reason) in heard if kind == "lost"]
    assert [place for place, _ in lost] == places
    assert "status 3" in lost[0][1] and "the head is gone" in lost[0][1]
    with pytest.raises(tn.ClusterError, match="is gone"):
        RayPlace(driver, 1, 0, inbox, ShippedOnce())


def test_the_folder_of_a_process_that_ended_while_its_driver_was_connecting_is_removed_by_the_next(
    drivers: Callable[[str], RayDriver], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_places, "FOLDERS", tmp_path)
    left = tmp_path / "tsnb-ray-left"
    (left / "session").mkdir(parents=True)
    (left / "held").touch()
    first, second = drivers("auto"), drivers("auto")
    assert {first._folder, second._folder} == set(map(str, tmp_path.iterdir()))


def test_a_cluster_that_is_not_there_is_named_with_what_to_do(drivers: Callable[[str], RayDriver]) -> None:
    inbox = queue.SimpleQueue[Any]()
    RayPlace(drivers("full:1"), 1, 0, inbox, ShippedOnce())
    _, (kind, reason) = inbox.get()
    assert kind == "lost" and "'full:1': Connection refused. Start one with `ray start" in reason


def test_a_driver_that_is_still_looking_for_its_cluster_ends_at_once(
    drivers: Callable[[str], RayDriver],
) -> None:
    drivers("deaf:1").close()


def test_a_cluster_joins_once_and_again_when_what_it_had_joined_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_places, "PROGRAM", STAND_IN)
    cluster = tn.RayCluster("auto", engines=3, gpus=1)
    home = Home.of_environment()
    one, other = cluster.places(home), cluster.places(home)
    assert one._driver is other._driver
    place = one.start(queue.SimpleQueue())
    cluster.close()  # one of two services that share it
    assert one._driver.gone == ""
    place.end()
    cluster.close()
    assert one._driver.gone
    cluster.close()
    again = cluster.places(home)
    assert again._driver is not one._driver
    cluster.close()


class Full(Threads):
    """A cluster with room for a few replicas; the others wait."""

    def __init__(self, engines: int, room: int) -> None:
        super().__init__(engines)
        self.room = room

    def places(self, home: Home) -> Any:
        places = super().places(home)
        start = places.start

        def begin(inbox: Inbox) -> ThreadPlace:
            place = start(inbox)
            if len(places.places) > self.room:
                inbox.put((place, ("waiting", "it wants 8 CPU; free in the whole cluster: 0 of 2 CPU")))
                place.send = lambda *_: None  # type: ignore[method-assign]
            return place

        places.start = begin  # type: ignore[method-assign]
        return places


def test_a_replica_that_waits_for_room_is_named_and_closing_waits_for_none() -> None:
    with tn.ServiceClient(cluster=Full(2, room=0)) as service:
        tc = service.create_training_client(**CONFIG)
        told = queue.SimpleQueue[Any]()
        tc.subscribe(told.put, after=0)
        while not isinstance(alarm := told.get(), Alarm):
            pass
        assert "replica 1 is not there yet: it wants 8 CPU" in alarm.message
        changed = tc.history.state.replicas
        assert changed is not None and (changed.change, changed.replicas, changed.wanted) == ("WAITING", 0, 2)
        assert tc.status is tn.ClientStatus.INITIALIZING
    assert tc.status is tn.ClientStatus.TERMINATED
    with pytest.raises(tn.ClientClosedError):
        tc.ready().result()


def test_a_group_begins_with_those_that_found_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "FOR_THE_OTHERS", 0.0)
    with tn.ServiceClient(cluster=Full(2, room=1)) as service:
        tc = service.create_training_client(**CONFIG)
        tc.ready().result()
        told = [
            (event.change, event.name, event.reason) for event in tc.history.events(kinds=[ReplicasChanged])
        ]
    (waiting, started) = told
    assert waiting[:2] == ("WAITING", "replica 2")
    assert started[0] == "STARTED" and "0 of 2 CPU" in started[2]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: tn.RayCluster("ray://head:10001"), "ray://"),
        (lambda: tn.RayCluster("head"), "host:port"),
        (lambda: tn.RayCluster(engines=0), "engines=0"),
    ],
)
def test_an_address_that_is_none_is_refused(made: Callable[[], Any], says: str) -> None:
    with pytest.raises(tn.ValidationError, match=says):
        made()


def test_where_ray_is_missing_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    with pytest.raises(tn.ValidationError, match=r"pip install .tensafe_nb\[ray\]"):
        tn.RayCluster("local")


@pytest.mark.parametrize(
    ("where", "cluster"),
    [
        ("auto", "RayCluster('auto', engines=4, cpus=1, gpus=1)"),
        ("head:6379", "RayCluster('head:6379', engines=4, cpus=1, gpus=1)"),
        ("processes", "LocalCluster(engines=4, cpus=1, gpus=1)"),
    ],
)
def test_a_server_is_told_its_cluster_in_one_word(where: str, cluster: str) -> None:
    chosen = argparse.Namespace(cluster=where, engines=4, engine_cpus=1, engine_gpus=1)
    assert repr(cluster_of(chosen)) == cluster
