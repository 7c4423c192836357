"""A service whose training clients are groups of replicas in threads: all of a cluster but the machines."""

import threading
from collections.abc import Callable
from typing import Any

import tensafe_nb as tn
from tensafe_nb.cluster.clusters import Cluster
from tensafe_nb.cluster.group import Inbox, ReplicaPlace
from tensafe_nb.cluster.local_places import ThreadPlace, ThreadPlaces
from tensafe_nb.store.home import Home


class WatchedPlaces(ThreadPlaces):
    """Threads of which a test can end single ones.

    Attributes:
        there: Counts the replicas that have loaded.
        gone: Counts those that `lose_at` has lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.there, self.gone = threading.Semaphore(0), threading.Semaphore(0)

    def start(self, inbox: Inbox) -> ThreadPlace:
        place = super().start(inbox)
        place.behind = lambda _, method: self.there.release() if method == "load" and not place.lost else None
        return place

    @property
    def living(self) -> list[ThreadPlace]:
        return [place for place in self.places if not place.lost]

    def lose_at(self, method: str, *, after: bool = False, most: int = 1) -> None:
        """Let the first places that are to carry out a call of this method be gone, before or behind it."""
        done: list[ReplicaPlace] = []

        def watch(place: ThreadPlace, called: str) -> None:
            if called == method and len(done) < most:
                done.append(place)
                place.lose()
                self.gone.release()

        for place in self.living:
            if after:
                place.behind = watch
            else:
                place.watch = watch


class Threads(Cluster):
    """A cluster in this process."""

    def __init__(self, engines: int) -> None:
        super().__init__(engines, 1, 0)
        self.made: list[WatchedPlaces] = []

    def places(self, home: Home) -> WatchedPlaces:
        self.made.append(WatchedPlaces())
        return self.made[-1]

    @property
    def living(self) -> list[ThreadPlace]:
        return [place for places in self.made for place in places.living]

    def lose_one_at(self, method: str, *, after: bool = False) -> None:
        """Let the first place that is to carry out a call of this method be gone, before or behind it."""
        (places,) = self.made
        places.lose_at(method, after=after)


CONFIG: dict[str, Any] = {
    "lora_config": tn.LoRAConfig(rank=4),
    "optimizer": {"learning_rate": 1e-2},
    "device": "cpu",
    "dtype": "float32",
}
Made = Callable[..., tn.TrainingClient]
