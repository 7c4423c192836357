"""The race: runs of all arms and seeds advance in step, so that there is something to compare from early on.

All runs that fit into memory are there at once, and take turns of a few steps; so many of them at a time as there are
cores. What an arm does with a seed is an ordinary run: the race only tells it `step(n)`, and waits for its pause.
"""

import logging
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from tensafe_nb import lifetimes
from tensafe_nb.comparing.arms import Arm
from tensafe_nb.comparing.results import Measure, Standings, Track
from tensafe_nb.comparing.statistics import FEWEST, LOOKS
from tensafe_nb.errors import ArtifactNotFoundError, TGTinkerError, ValidationError, nearest
from tensafe_nb.events import RunState
from tensafe_nb.futures import HEARTBEAT
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.registry import load_dotted
from tensafe_nb.runs.checkpoints import checkpoint_of, small_is_good
from tensafe_nb.runs.record import load_run
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.service import ServiceClient
from tensafe_nb.widgets.still.words import current_of

logger = logging.getLogger(__name__)

ROUNDS = 20  # in which a race is run
MOST_LOADED = 40  # runs that are in memory at a time
SIDE_BY_SIDE = 4  # at most: more runs at once than that, each with threads of its own, are not faster
LEAST_COST = 16 << 20  # bytes that a run is taken to need at least
NOTHING_LEFT: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class Left:
    """What a race that ended in the middle has left of an arm with a seed.

    Attributes:
        track: What it had measured: all of it, or, where it goes on, what leads up to the checkpoint.
        begun_at: The client's step before the first run's first.
        earlier: The runs that have measured it, each with the client's step up to which.
        checkpoint: Where it goes on; None where it had ended.
    """

    track: Track
    begun_at: int
    earlier: tuple[tuple[str, int], ...] = ()
    checkpoint: str | None = None


class Lane:
    """One arm with one seed: its run, and what is known of it when that is over.

    Args:
        arm: The arm.
        seed: The seed.
        wake: Called when the run turns to something else.
        left: What there is of it from an earlier race.
    """

    def __init__(self, arm: Arm, seed: int, wake: Callable[[], None], left: Left | None = None) -> None:
        self.arm, self.seed, self._wake, self._left = arm, seed, wake, left
        self.run: TrainingRun | None = None
        self.run_id: str | None = None
        self.begun_at = 0  # the client's step before the run's first
        self.earlier: tuple[tuple[str, int], ...] = ()
        self.over = left is not None and left.checkpoint is None
        self._forget: Callable[[], None] = lambda: None
        self._error: BaseException | None = None
        self._ends_with_us = False  # whether the arm has made a client for it
        self._last = Track(arm.name, seed)
        if left is not None:
            self._last, self.begun_at, self.earlier = left.track, left.begun_at, left.earlier
            self.run_id = left.track.run_id

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.run is None and not self.over

    @property
    def live(self) -> bool:
        """Whether its run is under way."""
        return self.run is not None

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._last.done if self.run is None else self.run.steps_done

    @property
    def settled(self) -> bool:
        """Whether its run has come to a pause or to its end."""
        return self.run is None or self.run.done() or self.run.at_rest

    def start(
        self,
        service: ServiceClient,
        tags: Sequence[str],
        resume_from: str | None = None,
        begun_at: int | None = None,
    ) -> None:
        """Start the run, and let it pause as soon as it can; whatever that raises is how this lane ends.

        Args:
            service: Where its client is made.
            tags: Of the run.
            resume_from: Where it goes on.
            begun_at: The client's step before the first step of the run that it goes on with.
        """
        if self._left is not None:
            resume_from, begun_at = self._left.checkpoint, self._left.begun_at
        try:
            before = {info.training_client_id for info in service.list_training_clients()}
            run = self.run = self.arm.start(service, self.seed, resume_from)
            run.pause()
            self.run_id, client = run.run_id, run.client
            self._ends_with_us = client.training_client_id not in before
            self._forget = client.subscribe(lambda e: self._wake() if isinstance(e, RunState) else None)
            name = run.name or f"{self.arm.name} · seed {self.seed}"[:200]
            run.describe(name=name, tags=list(dict.fromkeys([*run.tags, *tags])))
            told = run.history.state.runs.get(run.run_id)
            self.begun_at = begun_at if begun_at is not None else 0 if told is None else told.begun_at
        except Exception as error:  # noqa: BLE001  # the arm is the user's: it may raise anything
            if self.run is not None:
                self.run.stop()
            self.end(error)

    def go(self, target: int) -> None:
        """Take the steps that are missing to `target`; at the last one planned, end."""
        assert self.run is not None
        planned = self.run.planned_steps
        if planned is not None and target >= planned:
            self.run.resume()
        else:
            self.run.step(max(1, target - self.run.steps_done))

    def track(self, measure: Measure | None) -> Track:
        """Return what it has done so far."""
        run = self.run
        if run is None:
            return self._last
        found = replace(
            self._last,
            run_id=self.run_id,
            state=str(run.state),
            done=max(0, run.steps_done),
        )
        return measured(found, run.history, measure, self.begun_at, self._left)

    def end(self, error: BaseException | None = None, measure: Measure | None = None) -> None:
        """Keep what is known of it, and let go of its run and of the client that was made for it."""
        track, run = self.track(measure), self.run
        reason, state = track.reason, track.state
        if run is not None and error is None:
            try:
                reason = run.result(timeout=0).reason
            except Exception as failure:  # noqa: BLE001  # how it ended is told, whatever it was
                error = failure
        if error is not None:
            reason, state = f"{type(error).__name__}: {error}", str(RunStatus.FAILED)
        if state == RunStatus.INTERRUPTED:  # another client took over
            state = str(RunStatus.FAILED)
        self._last = replace(track, state=state, reason=reason)
        self._error, self.over, self.run = error, True, None
        self._forget()
        if run is not None and self._ends_with_us:
            with_client: Any = run.client
            with_client.close()

    @property
    def error(self) -> BaseException | None:
        """What made it fail."""
        return self._error


def measured(
    track: Track, history: RunHistory, measure: Measure | None, begun_at: int, left: Left | None = None
) -> Track:
    """Return a track with what its client has measured since its run began, and what its training has spent.

    Args:
        track: What is known of it besides.
        history: Of the client.
        measure: What is compared.
        begun_at: The client's step before the run's first.
        left: What earlier runs have measured of it.
    """
    if measure is not None:
        at, values = current_of(history, measure.metric)
        before = begun_at if left is None else left.earlier[-1][1]
        at_once = left is None and measure.metric.startswith("eval/")  # evaluated before the first step
        own = at >= before if at_once else at > before
        steps, values = at[own] - begun_at, values[own]
        if left is not None:
            steps = np.concatenate([left.track.steps, steps])
            values = np.concatenate([left.track.values, values])
        track = replace(track, steps=steps, values=values)
    privacy = history.state.privacy
    if privacy is not None:
        return replace(track, epsilon=privacy.total_epsilon, delta=privacy.delta)
    return replace(track, epsilon=0.0) if history.is_private else track


class Race:
    """Runs arms over seeds, in step. `run` is called once, on the thread of a comparison.

    Args:
        name: The comparison's.
        tags: Those of its runs.
        arms: What is compared.
        seeds: Common to all arms.
        service: Where training clients are made.
        metric: What is measured; None takes the run's own curve, on held-out data where there is some.
        window: See `Measure`; None decides by the metric.
        higher: Whether a greater value is better; None decides by the metric.
        steps: After how many to stop runs that would go on.
        pace: Steps of a round; None takes a twentieth of what is planned.
        side_by_side: Runs that are under way at the same moment.
        early_stop: Whether to give up arms that are far behind.
        baseline: The arm that others are compared with, never given up.
        tell: Called after every round.
        left: By arm and seed: what there is from an earlier race; nothing where it begins anew.
        measure: Settled by that race.
        given_up: The arms that it gave up.
    """

    def __init__(
        self,
        name: str,
        tags: list[str],
        arms: list[Arm],
        seeds: list[int],
        service: ServiceClient,
        *,
        metric: str | None,
        window: int | None,
        higher: bool | None,
        steps: int | None,
        pace: int | None,
        side_by_side: int | None,
        early_stop: bool,
        baseline: str | None,
        tell: Callable[[], None],
        left: Mapping[tuple[str, int], Left] = NOTHING_LEFT,
        measure: Measure | None = None,
        given_up: Mapping[str, tuple[int, str]] = NOTHING_LEFT,
    ) -> None:
        self.name, self.tags, self.arms, self.seeds, self.baseline = name, tags, arms, seeds, baseline
        self._service, self._tell = service, tell
        self._metric, self._window, self._higher = metric, window, higher
        self.steps, self._pace, self._early_stop = steps, pace, early_stop
        self._side_by_side = side_by_side or max(1, min(SIDE_BY_SIDE, os.cpu_count() or 1))
        self.measure = measure
        self.given_up = dict(given_up)
        self.wants_pause = self.wants_stop = self.paused = False
        self._news = threading.Event()  # no lock: what wakes us may hold a run's
        self.lanes = [
            Lane(arm, seed, self.wake, left.get((arm.name, seed))) for seed in seeds for arm in arms
        ]
        self._target = 0
        self._looked = 0  # looks taken
        self._left_after_first: int | None = None  # bytes
        self._forks: deque[Arm] = deque()  # asked for, not yet in the race

    def wake(self) -> None:
        """Look again: something has changed."""
        self._news.set()

    def _rest(self) -> None:
        """Wait until something may have changed."""
        self._news.wait(HEARTBEAT)
        self._news.clear()

    def standings(self, state: str, reason: str | None = None) -> Standings:
        """Return how the arms stand."""
        return Standings(
            self.name,
            self.measure,
            {arm.name: arm.varied for arm in self.arms},
            [lane.track(self.measure) for lane in tuple(self.lanes)],
            state,
            self.baseline,
            dict(self.given_up),
            {arm.name: arm.parent for arm in self.arms if arm.parent is not None},
            reason,
        )

    def run(self) -> None:
        """Run it to its end, or until it is stopped.

        Raises:
            ValidationError: No run has measured what is to be compared.
        """
        try:
            while not self._is_stopped():
                self._enter_forks()
                self._fork_those_due()
                self._admit()
                if not self._live():
                    if any(lane.waits for lane in self.lanes):
                        self._target = (
                            0  # those that are left had to wait for memory: they race by themselves
                        )
                        continue
                    if self._forks:
                        continue
                    break
                self._target = self._next_target()
                self._advance_all()
                self._find_measure()
                self._give_up_who_cannot_win()
                self._tell()
        finally:
            self._wind_up()
        self._find_measure(at_the_end=True)

    def _live(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.live]

    def _is_stopped(self) -> bool:
        """Wait while paused; then say whether to stop."""
        while self.wants_pause and not self.wants_stop:
            if not self.paused:
                self.paused = True
                self._tell()
            self._rest()
        self.paused = False
        return self.wants_stop

    # who is in the race

    def _admit(self) -> None:
        """Start the runs of as many further seeds as there is room for; of one, where nobody races."""
        waiting = [
            seed for seed in self.seeds if any(lane.waits and lane.seed == seed for lane in self.lanes)
        ]
        room = self._room()
        for number, seed in enumerate(waiting):
            lanes = [
                lane for lane in self.lanes if lane.seed == seed and lane.waits and lane.arm.parent is None
            ]
            if (number or self._live()) and room < len(lanes):
                return
            room -= len(lanes)
            for lane in lanes:
                if self._is_stopped():
                    return
                if lane.arm.name in self.given_up:
                    lane.end(ValidationError("The arm was given up before this seed began."))
                    continue
                lane.start(self._service, self.tags)
                self._wait_for([lane])
                if self._left_after_first is None:
                    self._left_after_first = bytes_left()
                self._tell()

    def _room(self) -> int:
        """Return how many runs more may be loaded: half of what memory is left, at what one has been seen to take."""
        loaded = len(self._live())
        if not self._target:
            return 0  # after the first round it is known
        cost, left = LEAST_COST, bytes_left()
        if left is None or self._left_after_first is None:
            return MOST_LOADED - loaded
        if loaded > 1:
            cost = max(cost, (self._left_after_first - left) // (loaded - 1))
        return min(MOST_LOADED - loaded, left // 2 // cost)

    def _next_target(self) -> int:
        """Return where all are to be after the next round."""
        planned = self._planned()
        pace = self._pace or (1 if planned is None else max(1, round(planned / ROUNDS)))
        return self._target + pace if planned is None else min(self._target + pace, planned)

    def _planned(self) -> int | None:
        """Return how many steps the runs are to take; the most, where they differ."""
        known = [lane.run.planned_steps for lane in self.lanes if lane.run is not None]
        most = max((steps for steps in known if steps is not None), default=None)
        return most if self.steps is None else min(most or self.steps, self.steps)

    # steps

    def _advance_all(self) -> None:
        """Bring every run to where all are to be; those that others are forked from halt on the way."""
        while not self.wants_stop:
            for lane in self._live():
                self._end_if_over(lane)  # short runs may end before their first pause
            self._advance([lane for lane in self._live() if lane.done < self._goal_of(lane)])
            forked = self._fork_those_due()
            if not forked and not any(lane.done < self._goal_of(lane) for lane in self._live()):
                return
            if self._is_stopped():
                return

    def _goal_of(self, lane: Lane) -> int:
        waiting = [other.arm.parent for other in self.lanes if other.waits and other.seed == lane.seed]
        halts = [parent[1] for parent in waiting if parent is not None and parent[0] == lane.arm.name]
        return min([self._target, *(step for step in halts if step >= lane.done)])

    def _advance(self, lanes: list[Lane]) -> None:
        """Let runs take their steps, so many of them at a time; return when all have come to a rest."""
        queue, under_way = deque(lanes), list[Lane]()
        while (queue or under_way) and not self.wants_stop:
            if self._is_stopped():
                break
            while queue and len(under_way) < self._side_by_side:
                lane = queue.popleft()
                lane.go(self._goal_of(lane))
                under_way.append(lane)
            self._rest()
            if self.wants_pause and not self.wants_stop:
                for lane in under_way:
                    if lane.run is not None:
                        lane.run.pause()
                self._wait_for(under_way)
            for lane in [lane for lane in under_way if lane.settled]:
                under_way.remove(lane)
                self._arrive(lane, queue)

    def _arrive(self, lane: Lane, queue: "deque[Lane]") -> None:
        """Take note of where a run has come to a rest."""
        run = lane.run
        if run is None:
            return
        if not run.done() and lane.done < self._goal_of(lane):
            if self.wants_pause:
                queue.appendleft(lane)
                return
            alarm = next(reversed(run.history.state.alarms), None)
            why = f": {alarm.message}" if alarm is not None else ""
            run.stop()
            self._wait_for([lane])
            lane.end(ValidationError(f"The run paused itself at step {lane.done}{why}"), self.measure)
            return
        self._end_if_over(lane)

    def _end_if_over(self, lane: Lane) -> None:
        """Let go of a run that has ended; stop one that would take more steps than it is to."""
        if lane.run is None:
            return
        enough = self.steps is not None and lane.done >= self.steps
        if enough and not lane.run.done():
            lane.run.stop()
        if enough or lane.run.done():
            self._end(lane)

    def _end(self, lane: Lane) -> None:
        """Wait for the end of a run that ends, and keep what is known of it."""
        if lane.run is not None:
            while not lane.run.done():
                self._rest()
            self._find_measure()
            lane.end(None, self.measure)

    def _wait_for(self, lanes: list[Lane]) -> None:
        """Wait until runs have come to a rest; one that has ended is over."""
        while not all(lane.settled for lane in lanes):
            self._rest()
            for run in [lane.run for lane in lanes if self.wants_stop and lane.run is not None]:
                run.stop()

    def _wind_up(self) -> None:
        """Stop what is still under way, and let go of everything."""
        live = self._live()
        for lane in live:
            if lane.run is not None:
                lane.run.stop()
        for lane in live:
            self._end(lane)
        self._enter_forks()  # those that came too late are named, too
        for lane in self.lanes:
            if lane.waits:
                lane.end(None)
        lifetimes.collect()  # runs and their clients refer to each other

    # what is measured

    def _find_measure(self, *, at_the_end: bool = False) -> None:
        """Settle what is compared, once a run has measured something.

        Raises:
            ValidationError: The metric is never measured; says the nearest.
        """
        if self.measure is not None:
            if at_the_end and not any(len(lane.track(self.measure).values) for lane in self.lanes):
                raise ValidationError(self._never_measured(self._names()))
            return
        names = self._names()
        if not names:
            return
        curve = next((lane.run.curve for lane in self._live() if lane.run is not None), "loss")
        metric = self._metric or (f"eval/{curve}" if f"eval/{curve}" in names else curve)
        if metric not in names:
            if at_the_end or "Did you mean" in nearest(metric, names):
                raise ValidationError(self._never_measured(names))
            return
        planned = self._planned()
        window = self._window
        if window is None and not metric.startswith("eval/"):
            window = max(1, (planned or 10) // 10)
        higher = not small_is_good(metric) if self._higher is None else self._higher
        self.measure = Measure(metric, window, higher, planned)

    def _names(self) -> set[str]:
        """Return the metrics that any run has measured."""
        names: set[str] = set()
        for lane in self.lanes:
            if lane.run is not None:
                names |= set(lane.run.history.names)
            elif lane.run_id is not None and not self._live():
                names |= set(load_run(lane.run_id).history.names)
        return names

    def _never_measured(self, names: set[str]) -> str:
        return f"compare: metric={self._metric!r} was measured in no run.{nearest(str(self._metric), names)}"

    def _give_up_who_cannot_win(self) -> None:
        """At a quarter, half and three quarters: stop the arms that are far behind, and fall back further."""
        planned = self._planned()
        if self.measure is None or planned is None or not self._early_stop or self._looked >= len(LOOKS):
            return
        if self._target < LOOKS[self._looked] * planned:
            return
        if any(lane.waits for lane in self.lanes) or len(self.seeds) < FEWEST:
            return
        before, now = math.ceil(LOOKS[self._looked - 1] * planned), self._target
        self._looked += 1
        if self._looked == 1:
            return
        for arm, why in self.standings("RUNNING").who_cannot_win(now, before).items():
            self.given_up[arm] = (now, why)
            self._stop_arm(arm)

    def _stop_arm(self, arm: str) -> None:
        lanes = [lane for lane in self._live() if lane.arm.name == arm]
        for lane in lanes:
            if lane.run is not None:
                lane.run.stop()
        for lane in lanes:
            self._end(lane)

    # forks

    def fork(self, arm: Arm) -> None:
        """Have an arm join that goes on from another's state; from any thread."""
        self._forks.append(arm)

    def _enter_forks(self) -> None:
        while self._forks:
            arm = self._forks.popleft()
            assert arm.parent is not None
            name, step = arm.parent
            reached = max((lane.done for lane in self.lanes if lane.arm.name == name), default=0)
            arm = replace(arm, parent=(name, max(reached, self._target) if step < 0 else step))
            self.arms.append(arm)
            self.lanes += [Lane(arm, seed, self.wake) for seed in self.seeds]

    def _fork_those_due(self) -> bool:
        """Start every forked run whose parent stands where it branches off, or has a checkpoint of there."""
        any_due = False
        for lane in [lane for lane in self.lanes if lane.waits and lane.arm.parent is not None]:
            assert lane.arm.parent is not None
            name, step = lane.arm.parent
            parent = next(one for one in self.lanes if one.arm.name == name and one.seed == lane.seed)
            if parent.waits or (parent.live and parent.done < step):
                continue
            any_due = True
            try:
                lane.start(self._service, self.tags, state_of(parent, step), parent.begun_at)
            except TGTinkerError as error:
                lane.end(error)
            self._wait_for([lane])
        return any_due


def state_of(lane: Lane, step: int) -> str:
    """Return the artifact of a run's state at a step of its own.

    Raises:
        ValidationError: The run is past it and has no checkpoint of there.
    """
    if lane.run is not None and lane.done == step:
        return lane.run.checkpoint(reason="fork").result().artifact_id
    if lane.run_id is None:
        raise ValidationError(f"{lane.arm.name}, seed {lane.seed}, never began: there is nothing to fork.")
    history = lane.run.history if lane.run is not None else load_run(lane.run_id).history
    try:
        return checkpoint_of(lane.begun_at + step, history)
    except (ValidationError, ArtifactNotFoundError) as error:
        raise ValidationError(
            f"{lane.arm.name}, seed {lane.seed}, is at step {lane.done}, past {step}: {error} Fork it where it stands, "
            f"or have its runs save by themselves (checkpoint_every)."
        ) from error


def bytes_left() -> int | None:
    """Return what memory is left here; None where that is not known, or where the models are elsewhere."""
    if "torch" not in sys.modules:
        return None
    left: int | None = load_dotted("tensafe_nb.engine.models.memory:left_on_machine")()
    inside: int | None = load_dotted("tensafe_nb.engine.models.memory:left_in_container")()
    known = [value for value in (left, inside) if value is not None]
    return min(known, default=None)
