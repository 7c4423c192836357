"""A service whose training clients are groups of replicas in threads: all of a cluster but the machines."""

from collections.abc import Callable
from typing import Any

import tensafe_nb as tn
from tensafe_nb.cluster.clusters import Cluster
from tensafe_nb.cluster.group import ReplicaPlace
from tensafe_nb.cluster.local_places import ThreadPlace, ThreadPlaces
from tensafe_nb.store.home import Home


class Threads(Cluster):
    """A cluster in this process, of which a test can end single places."""

    def __init__(self, engines: int) -> None:
        super().__init__(engines, 1, 0)
        self.made: list[ThreadPlaces] = []

    def places(self, home: Home) -> ThreadPlaces:
        self.made.append(ThreadPlaces())
        return self.made[-1]

    @property
    def living(self) -> list[ThreadPlace]:
        return [place for places in self.made for place in places.places if not place.lost]

    def lose_one_at(self, method: str, *, after: bool = False) -> None:
        """Let the first place that is to carry out a call of this method be gone, before or behind it."""
        done: list[ReplicaPlace] = []

        def watch(place: ThreadPlace, called: str) -> None:
            if called == method and not done:
                done.append(place)
                place.lose()

        for place in self.living:
            if after:
                place.behind = watch
            else:
                place.watch = watch


CONFIG: dict[str, Any] = {
    "lora_config": tn.LoRAConfig(rank=4),
    "optimizer": {"learning_rate": 1e-2},
    "device": "cpu",
    "dtype": "float32",
}
Made = Callable[..., tn.TrainingClient]
