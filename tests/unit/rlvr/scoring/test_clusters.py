"""Rewards and environments in processes of a cluster: a machine that is lost costs no call."""

import queue
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import pytest

import tensafe_nb as tn
from tensafe_nb import rlvr
from tensafe_nb.rlvr.environments.hosts import ProcessHost, host_of
from tensafe_nb.rlvr.rollouts.trajectories import Trajectory
from tensafe_nb.rlvr.scoring.links import Inbox, Link, ScoringCluster, Unit, calling, loading
from tensafe_nb.rlvr.scoring.processes import crew_of
from tensafe_nb.rlvr.scoring.scorer import Scorer
from tensafe_nb.rlvr.scoring.shipping import arrived
from tests.unit.rlvr.environments.test_hosts import begin, say, speaks
from tests.unit.rlvr.functions import length, rollouts
from tests.unit.rlvr.trainers import CONFIG, SMALL, SUMS


class Machine:
    """A machine that answers what it is asked at once, as a process there would, until it is lost."""

    patience = 60.0

    def __init__(self, inbox: Inbox, calls: float) -> None:
        self._inbox, self._left = inbox, calls  # it is lost under the call after so many
        self.lack = ""

    def load(self, key: int, blob: bytes) -> None:
        kind, _, sent = cloudpickle.loads(loading(key, blob))
        assert kind == "load"
        self._callee = arrived(sent)
        self._say(["loaded", None] if self._left >= 0 else "node 7 has died")

    def run(self, key: int, first: int, units: Sequence[Unit]) -> None:
        first, units = arrived(cloudpickle.loads(calling(key, first, units))[2])
        for index, unit in enumerate(units, first):
            self._left -= 1
            if self._left < 0:
                self._say("node 7 has died")
                return
            self._say([index, self._callee.answered(unit)])

    def kill(self) -> None:
        self._say(None)  # whoever has let go of it hears nothing more

    def _say(self, message: Any) -> None:
        self._inbox.put((self, message))


class Full(Machine):
    """A machine that is not there yet."""

    patience = 0.0

    def load(self, key: int, blob: bytes) -> None:
        self.lack = "it wants 1 CPU; free in the whole cluster: 0 of 2 CPU"


class Machines:
    """A cluster whose machines are lost after so many calls, one after the other; the last one lasts."""

    def __init__(self, *calls: float) -> None:
        self._calls, self.started = list(calls), 0

    def start_scoring(self, inbox: Inbox) -> Link:
        self.started += 1
        return Machine(inbox, self._calls.pop(0) if len(self._calls) > 1 else self._calls[0])


FOREVER = float("inf")


def scored(cluster: ScoringCluster, responses: Sequence[str], processes: int) -> list[Trajectory]:
    calls = rollouts(*responses)
    with Scorer(length, processes=processes, cluster=cluster) as scorer:
        scorer.score(calls)
    return calls


def test_what_was_called_on_a_machine_that_is_lost_is_called_again_on_another() -> None:
    cluster = Machines(2, 0, FOREVER)
    calls = scored(cluster, ["x" * n for n in range(9)], 1)
    assert [call.reward for call in calls] == list(range(9))
    assert not any(call.reward_error for call in calls) and cluster.started == 3


def test_a_conversation_whose_machine_is_lost_is_played_again_on_another() -> None:
    here = host_of(speaks, None)
    host = host_of(speaks, 60.0, crew_of("", 2, Machines(7, FOREVER)))
    assert isinstance(host, ProcessHost)
    for cues in (begin(6), say(*"abcdef"), say("a", "raise", "b", "x", "y", "end"), say("last")):
        assert host.play(cues) == here.play(cues)
    host.close()


@pytest.mark.parametrize("calls", [-1, 0], ids=["before it has begun", "under its first call"])
def test_a_cluster_that_loses_every_machine_is_an_error_that_says_so(calls: float) -> None:
    says = (
        r"6 processes in a row were lost.*node 7 has died\. Look at the cluster, or leave reward_cluster out"
    )
    with pytest.raises(tn.RewardError, match=says):
        scored(Machines(calls), ["a", "b"], 2)
    host = host_of(speaks, 60.0, crew_of("", 2, Machines(calls)))
    with pytest.raises(tn.RewardError, match=says):
        host.play(begin(2))
    host.close()


class Crowded(Machines):
    """A cluster with room for so many."""

    def __init__(self, room: int) -> None:
        super().__init__(FOREVER)
        self._room = room

    def start_scoring(self, inbox: Inbox) -> Link:
        return super().start_scoring(inbox) if self.started < self._room else Full(inbox, FOREVER)


def test_a_process_that_waits_for_room_holds_up_nobody_and_is_named_where_there_is_no_other() -> None:
    calls = scored(Crowded(1), "abcdefgh", 2)
    assert [call.reward for call in calls] == [1.0] * 8
    says = r"not loaded after 0 s\. Its process has not begun: it wants 1 CPU; free in the whole"
    with pytest.raises(tn.RewardError, match=f"The reward function was {says}"):
        scored(Crowded(0), "ab", 2)
    host = host_of(speaks, 60.0, crew_of("", 2, Crowded(1)))
    with pytest.raises(tn.RewardError, match=f"The environment was {says}"):
        host.play(begin(2))
    host.close()


def test_a_trainer_calls_its_reward_on_the_cluster_and_learns_the_same() -> None:
    cluster, rows = Machines(FOREVER), []
    with tn.ServiceClient() as service:
        for where in (None, cluster):
            tc = service.create_training_client(CONFIG)
            trainer = rlvr.RLVRTrainer(
                tc, SUMS, length, **SMALL, reward_timeout=60, reward_processes=1, reward_cluster=where
            )
            run = trainer.run(steps=1, show=False)
            run.result()
            rows.append([run.history["reward"].tolist(), run.history["rewards/length/errors"].tolist()])
            if where is not None:
                assert cluster.started == 1
                assert trainer.rescore().errors == 0 and cluster.started == 2
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda **how: Scorer(length, **how),
        lambda **how: rlvr.EnvironmentSampler(None, speaks, **how),  # type: ignore[arg-type]
        lambda **how: rlvr.rescore(rlvr.TrajectoryBatch([], tn.SamplingConfig()), length, **how),
    ],
)
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"processes": 0}, "processes=0 must be at least 1"),
        ({"cluster": "auto"}, r"cluster='auto': give RayCluster\(\"auto\"\), or None"),
        ({"cluster": tn.RayCluster}, "or None for processes of this machine"),
    ],
)
def test_what_is_no_cluster_is_refused(make: Callable[..., Any], how: dict[str, Any], says: str) -> None:
    with pytest.raises(tn.ValidationError, match=says):
        make(**how)


def test_on_a_local_cluster_rewards_are_called_as_without_one() -> None:
    inbox: Inbox = queue.SimpleQueue()
    link = tn.LocalCluster().start_scoring(inbox)
    link.kill()
    assert inbox.get() == (link, None)
