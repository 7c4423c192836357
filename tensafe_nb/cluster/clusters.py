"""Clusters, as a user names them: where the replicas of a training client live, and how many there are."""

import os
import re
import sys
import threading
import weakref
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tensafe_nb.checks import checked
from tensafe_nb.config import TrainingConfig
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.store.home import Home

if TYPE_CHECKING:  # a cluster is named before torch is loaded
    from tensafe_nb.cluster.group import EngineGroup, ReplicaPlaces
    from tensafe_nb.cluster.ray_places import RayDriver
    from tensafe_nb.core.engines import Tell, Trains
    from tensafe_nb.engine.accumulation import Tick
    from tensafe_nb.rlvr.scoring.links import Inbox, Link

NOT_PRIVATELY = (
    "Private training runs in one process: how its noise and draws would be shared among replicas is not worked out. "
    "Make a client with dp_config by a ServiceClient() without cluster=."
)


class Cluster:
    """What all clusters have in common: they make groups of engines.

    Args:
        engines: Replicas of each training client.
        cpus: Cores for each.
        gpus: GPUs for each; without any it computes on the CPU.
    """

    def __init__(self, engines: int, cpus: int, gpus: int) -> None:
        for name, value, least in (("engines", engines, 1), ("cpus", cpus, 1), ("gpus", gpus, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValidationError(f"{name}={as_given(value)} must be a whole number, {least} or more.")
        self.engines, self.cpus, self.gpus = engines, cpus, gpus

    def check(self, config: TrainingConfig) -> None:
        """Refuse what a group of engines cannot train.

        Raises:
            ValidationError: Private training; a device that the engines do not have.
        """
        if config.dp_config is not None and config.dp_config.enabled:
            raise ValidationError(NOT_PRIVATELY)
        if config.device == "cuda" and not self.gpus:
            raise ValidationError(
                f'device="cuda": the engines of {self!r} have no GPU. Give each one: gpus=1.'
            )

    def make(
        self,
        config: TrainingConfig,
        home: Home,
        relative: "Trains | None",
        tell: "Tell",
        tick: "Tick",
        *,
        served: bool,
    ) -> "EngineGroup":
        """Start the replicas of a training client."""
        from tensafe_nb.cluster.group import EngineGroup

        return EngineGroup(config, self.places(home), self.engines, tell, tick)

    def places(self, home: Home) -> "ReplicaPlaces":
        """Return where the replicas of one training client live."""
        raise NotImplementedError

    def start_scoring(self, inbox: "Inbox") -> "Link":
        """Start a process that calls rewards or plays environments; see `ScoringCluster`."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the cluster; replicas end with their training clients."""


def cores_each(engines: int) -> int:
    """Return how many cores of this machine each of several engines has."""
    return max(1, (os.cpu_count() or 1) // engines) if isinstance(engines, int) and engines > 0 else 1


class LocalCluster(Cluster):
    """Replicas in processes of this machine.

    It pays where a model keeps a core busy by itself, or where there are several GPUs: docs/how-to/cluster.md says from
    which size on.

    Args:
        engines: Replicas of each training client.
        cpus: Cores for each; by default they share this machine's.
        gpus: GPUs for each; without any it computes on the CPU.

    Raises:
        ValidationError: A number that is none.

    Example:
        >>> service = ServiceClient(cluster=LocalCluster(engines=2))
        >>> tc = service.create_training_client(model_ref="builtin:tiny", lora_config={"rank": 8})
    """

    @checked
    def __init__(self, engines: int = 2, *, cpus: int | None = None, gpus: int = 0) -> None:
        super().__init__(engines, cores_each(engines) if cpus is None else cpus, gpus)

    def __repr__(self) -> str:
        return f"LocalCluster(engines={self.engines}, cpus={self.cpus}, gpus={self.gpus})"

    def places(self, home: Home) -> "ReplicaPlaces":
        """Return processes, each with its own GPUs."""
        from tensafe_nb.cluster.local_places import ProcessPlaces

        environment: list[dict[str, Any]] = [{"CUDA_VISIBLE_DEVICES": ""}]
        if self.gpus:
            environment = [
                {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first, first + self.gpus)))}
                for first in range(0, self.engines * self.gpus, self.gpus)
            ]
        return ProcessPlaces(self.cpus, home, environment)

    def start_scoring(self, inbox: "Inbox") -> "Link":
        """Start a process of this machine, as without a cluster."""
        from tensafe_nb.rlvr.scoring.links import ProcessLink

        return ProcessLink(inbox)


class RayCluster(Cluster):
    """Replicas as actors of a Ray cluster (https://docs.ray.io), on whichever of its machines has room.

    Needs `pip install "tensafe_nb[ray]"` here and on every machine of the cluster, in the same versions of Python, Ray
    and this package. A model is named as every machine knows it: a hub id, a built-in, or the full path of a folder
    that all of them see.

    Args:
        address: "auto" takes the cluster that this machine belongs to (RAY_ADDRESS, or `ray start` here); "local"
            starts one on this machine, which ends with the service; "host:port" names the head of another.
        engines: Replicas of each training client.
        cpus: Cores for each, 1 by default; on a Ray that is started here they share this machine's.
        gpus: GPUs for each; without any it computes on the CPU.

    Raises:
        ValidationError: Ray is not installed, an address of another kind, a number that is none.

    Example:
        >>> service = ServiceClient(cluster=RayCluster("auto", engines=4, gpus=1))
        >>> tc = service.create_training_client(model_ref="builtin:tiny", lora_config={"rank": 8})
    """

    @checked
    def __init__(
        self, address: str = "auto", *, engines: int = 2, cpus: int | None = None, gpus: int = 0
    ) -> None:
        usual = cores_each(engines) if address == "local" else 1
        super().__init__(engines, usual if cpus is None else cpus, gpus)
        if address not in ("auto", "local") and not re.fullmatch(
            r"[\w.\-]+:\d+|\[[\da-fA-F:]+\]:\d+", address
        ):
            raise ValidationError(
                f'RayCluster({as_given(address)}): give "auto", "local", or "host:port" of the head (`ray start '
                f"--head` prints it). Addresses that begin with ray:// are Ray Client's, which is not used."
            )
        if find_spec("ray") is None:
            raise ValidationError('RayCluster needs Ray: pip install "tensafe_nb[ray]"')
        if sys.platform == "win32":
            raise ValidationError("RayCluster works on Linux and macOS. Here, take LocalCluster.")
        self.address = address
        self._driver: RayDriver | None = None
        self._joining = threading.Lock()

    def __repr__(self) -> str:
        return f"RayCluster({self.address!r}, engines={self.engines}, cpus={self.cpus}, gpus={self.gpus})"

    def places(self, home: Home) -> "ReplicaPlaces":
        """Return actors of the cluster."""
        from tensafe_nb.cluster.ray_places import RayPlaces

        return RayPlaces(self._joined(), self.cpus, self.gpus, home if self.address == "local" else None)

    def start_scoring(self, inbox: "Inbox") -> "Link":
        """Start a process beside an actor of the cluster, which has one core."""
        from tensafe_nb.cluster.ray_places import RayLink

        return RayLink(self._joined(), inbox)

    def _joined(self) -> "RayDriver":
        """Return the process that is connected to the cluster; another one, if that was gone."""
        from tensafe_nb.cluster.ray_places import RayDriver

        with self._joining:
            if self._driver is None or self._driver.gone:
                self._driver = RayDriver(self.address)
                weakref.finalize(self, self._driver.leave)
            return self._driver

    def close(self) -> None:
        """Leave the cluster, unless another service has replicas there; a Ray that was started here ends."""
        with self._joining:
            if self._driver is not None and self._driver.idle:
                self._driver.close()
                self._driver = None
