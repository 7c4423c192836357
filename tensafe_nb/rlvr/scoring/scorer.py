"""The scorer gives rollouts their rewards: built-ins are called here, user functions in processes that can be killed.

A failure is kept as text and counted, never scored 0, and never ends a run.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given, shown
from tensafe_nb.errors import ClientClosedError, RewardError, ValidationError
from tensafe_nb.rlvr.rewards.composite import combined, named_parts
from tensafe_nb.rlvr.rewards.conventions import Call, RewardSample, TrainerState, Verdict, outcomes_of
from tensafe_nb.rlvr.rewards.identity import Identity
from tensafe_nb.rlvr.rewards.reward import Reward, resolve_reward
from tensafe_nb.rlvr.rollouts.trajectories import Trajectory, TrajectoryBatch, bessel_std, mean
from tensafe_nb.rlvr.scoring.coroutines import CoroutinePool
from tensafe_nb.rlvr.scoring.processes import NOTHING, CannotShip, Modules, RewardPool, crew_of

BEFORE = TrainerState()  # before any run
_NOTHING: dict[str, Any] = dict.fromkeys(
    ("reward", "reward_parts", "reward_error", "reward_version", "advantage")
)


@shown
@dataclass(frozen=True, slots=True)
class FunctionReport:
    """What one function, or one named part of what it returned, gave in a round of scoring.

    Attributes:
        mean: Over what it scored; NaN of nothing.
        std: Bessel's.
        errors: Calls that raised, returned no score, or ran out of time.
        timeouts: Those of them that ran out of time.
        counts: What the function itself counted meanwhile, by name: of a judge its calls, and what they cost.
    """

    mean: float
    std: float
    errors: int = 0
    timeouts: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)


@shown
@dataclass(frozen=True, slots=True)
class ScoreReport:
    """What came of a round of scoring.

    Attributes:
        scored: Rollouts with a reward.
        abstained: Rollouts for which the reward was None, by its own choice.
        errors: Rollouts with an error.
        timeouts: Those of them on which a function ran out of time.
        functions: One report for each function, and for each part it returned, as "function/part".
        version: The reward's version.
        true: The name of the part marked as the true aim.
    """

    scored: int
    abstained: int
    errors: int
    timeouts: int
    functions: Mapping[str, FunctionReport] = field(default_factory=dict)
    version: str = ""
    true: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of this round: `rewards/{function}/mean`, `/std`, `/errors`, `/timeouts`; NaN means none.

        Those of a judge have what it counted besides: `/calls`, `/cached`, …
        """
        values: dict[str, float] = {}
        for name, report in self.functions.items():
            values[f"rewards/{name}/mean"] = report.mean
            values[f"rewards/{name}/std"] = report.std
            values[f"rewards/{name}/errors"] = report.errors
            values[f"rewards/{name}/timeouts"] = report.timeouts
            values |= {f"rewards/{name}/{counted}": float(n) for counted, n in report.counts.items()}
        if self.true is not None and self.true in self.functions:
            values["rewards/true"] = self.functions[self.true].mean
        return values


class Caller(Protocol):
    """Makes the calls of some functions: here, in processes, on a thread, or on an event loop."""

    def add(self, call: Call, modules: Modules = NOTHING) -> int: ...
    def forget(self, key: int) -> None: ...
    def evaluate(self, key: int, samples: Sequence[RewardSample]) -> list[Verdict]: ...
    def close(self) -> None: ...


class CallsHere:
    """Calls functions in this thread, without a limit."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def add(self, call: Call, modules: Modules = NOTHING) -> int:
        self._calls.append(call)
        return len(self._calls) - 1

    def forget(self, key: int) -> None:
        """Keep what costs nothing."""

    def evaluate(self, key: int, samples: Sequence[RewardSample]) -> list[Verdict]:
        call = self._calls[key]
        return [outcome for unit in call.units(samples) for outcome in outcomes_of(call, unit)]

    def close(self) -> None:
        """End nothing: there is nothing to end."""


@dataclass(slots=True)
class Node:
    """A reward in the tree of a composite: its path in metrics, and who calls it, where it has no parts."""

    reward: Reward
    path: str
    caller: Caller
    key: int
    parts: "list[Node]"
    identity: Identity  # of what the caller calls

    def leaves(self) -> "Iterator[Node]":
        """Yield the nodes that are functions."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


class Scorer:
    """Scores rollouts with one reward, again and again; the processes it starts live until it is closed.

    Built-ins that cannot hang are called here. Other functions are called in processes: what they print goes to the
    error output of this process (in a notebook, under the running cell), and what they change in the notebook's
    variables stays there. Coroutine functions are awaited on a loop of its own, many at a time.

    Args:
        reward: What scores: a name, a function, or a resolved reward.
        timeout: Seconds a call may take; a call of a batch function takes all rollouts. None calls everything
            here, without a limit.
        processes: How many at most; one for each core, and no more than 4, when None. They start with the
            first rollouts.
        cluster: Where these processes are, if not on this machine: RayCluster("auto"), on whichever of its machines
            has a core free; then four at most, when `processes` is None. Packages that the function uses have to be
            installed there. One that is lost with its machine costs nothing: another calls the function again.

    Example:
        >>> with Scorer(my_function) as scorer:
        ...     report = scorer.score(batch)
        >>> report.errors
        0
    """

    @checked
    def __init__(
        self,
        reward: Any,
        timeout: float | None = 5.0,
        processes: int | None = None,
        cluster: Any = None,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ValidationError(
                f"Scorer: timeout={as_given(timeout)} must be more than 0 seconds, or None."
            )
        self.reward = resolve_reward(reward)
        self.timeout = timeout
        crew = crew_of("Scorer: ", processes, cluster)
        self.processes = crew.many
        self._version = self.reward.version
        self._closed = False
        limit = threading.TIMEOUT_MAX if timeout is None else timeout
        # Four ways to call a function; `_placed` chooses one for each. None starts anything before it has work.
        self._here = CallsHere()
        self._coroutines = CoroutinePool(limit)
        self._pool = RewardPool(limit, crew)
        self._threads = RewardPool(limit, None)
        self._root = self._node(self.reward, self.reward.name)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<Scorer {self.reward.name!r}, timeout={self.timeout}, processes={self.processes}{state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, trajectories: Sequence[Trajectory], state: TrainerState = BEFORE) -> ScoreReport:
        """Fill in `reward`, `reward_parts`, `reward_version`, and `reward_error` where a function failed.

        A function that returns None abstains: no reward, and no error either.

        Args:
            trajectories: What to score.
            state: Where the run stands, for functions that ask for `trainer_state`.

        Raises:
            ClientClosedError: The scorer was closed, before or meanwhile.
            RewardError: No process could be started, or the function brought its process down while loading.
            ClusterError: The cluster is gone.
            ValidationError: They are no rollouts.
        """
        if not isinstance(trajectories, Sequence | TrajectoryBatch) or not all(
            isinstance(one, Trajectory) for one in trajectories
        ):
            raise ValidationError(
                f"score: trajectories are rollouts, of a sampler or of run.rollouts(), not {as_given(trajectories)}."
            )
        if self._closed:
            raise ClientClosedError("The scorer is closed. Make a new Scorer to go on.")
        self.renew()
        samples = [
            RewardSample(t.prompt, t.response, t.meta, t.tokens, t.messages, state) for t in trajectories
        ]
        found: dict[str, list[Verdict]] = {}
        before = self.counts()
        outcomes = self._outcomes(self._root, samples, found)
        for trajectory, outcome in zip(trajectories, outcomes, strict=True):
            parts = outcome.parts if self.reward.parts else named_parts(self.reward.name, outcome)
            trajectory.reward, trajectory.reward_error = outcome.score, outcome.error
            trajectory.reward_parts, trajectory.reward_version = parts or None, self._version
        self.note_own_changes()
        functions: dict[str, FunctionReport] = {}
        for path, column in found.items():
            functions |= function_reports(path, column)
        for path, counts in self.counts().items():
            meanwhile = {name: n - before[path].get(name, 0) for name, n in counts.items()}
            functions[path] = replace(functions[path], counts=meanwhile)
        return ScoreReport(
            scored=sum(outcome.score is not None for outcome in outcomes),
            abstained=sum(outcome.score is None and outcome.error is None for outcome in outcomes),
            errors=sum(outcome.error is not None for outcome in outcomes),
            timeouts=sum(outcome.timed_out for outcome in outcomes),
            functions=functions,
            version=self._version,
            true=self.reward.true,
        )

    def close(self) -> None:
        """End all processes and threads. Again: nothing. A round under way ends with an error."""
        self._closed = True
        for caller in (self._pool, self._threads, self._coroutines):
            caller.close()

    def counts(self) -> dict[str, dict[str, int]]:
        """Return what the functions that count have counted since they were made, by their paths."""
        return {
            node.path: dict(node.reward.function.counts)
            for node in self._root.leaves()
            if node.reward.call is not None and node.reward.call.limits_itself
        }

    def _outcomes(
        self, node: Node, samples: Sequence[RewardSample], found: dict[str, list[Verdict]]
    ) -> list[Verdict]:
        """Return one outcome for each sample, and note those of every function under its path."""
        if node.parts:
            # one column per part, one row per rollout
            columns = [self._outcomes(part, samples, found) for part in node.parts]
            return [combined(node.reward.parts, row) for row in zip(*columns, strict=True)]
        try:
            outcomes = node.caller.evaluate(node.key, samples)
        except CannotShip as reason:
            assert node.reward.call is not None
            node.caller, node.key = self._threads, self._stay_here(node.reward, node.reward.call, reason)
            outcomes = node.caller.evaluate(node.key, samples)
        found[node.path] = outcomes
        return outcomes

    def renew(self) -> None:
        """Take on anew what has changed since it was taken on: what runs is what the notebook holds.

        A function can change in mid-run: its module is reloaded, a helper's cell is run again, a variable it reads is
        set. From this round on the new one scores, under a version of its own.
        """
        changed = False
        for node in self._root.leaves():
            if node.reward.inline:  # a built-in of ours
                continue
            identity = node.reward.identity
            if identity.digest != node.identity.digest and node.reward.call is not None:
                node.caller.forget(node.key)
                node.identity = identity
                node.caller, node.key = self._placed(node.reward, node.reward.call, identity)
                changed = True
        if changed:
            self._version = self.reward.version

    def note_own_changes(self) -> None:
        """Note values that a function called in this process has changed itself, such as a cache: no new version."""
        for node in self._root.leaves():
            if node.caller is not self._pool and not node.reward.inline:
                identity = node.reward.identity
                if identity.code == node.identity.code:
                    node.identity = identity

    def _node(self, reward: Reward, path: str) -> Node:
        above = "" if reward is self.reward else f"{path}/"
        parts = [self._node(part.reward, f"{above}{part.name}") for part in reward.parts]
        if reward.call is None:
            return Node(reward, path, self._here, -1, parts, reward.identity)
        identity = reward.identity
        caller, key = self._placed(reward, reward.call, identity)
        return Node(reward, path, caller, key, parts, identity)

    def _placed(self, reward: Reward, call: Call, identity: Identity) -> tuple[Caller, int]:
        """Choose who calls a function."""
        if call.asynchronous:
            return self._coroutines, self._coroutines.add(call)
        if reward.inline or self.timeout is None:
            return self._here, self._here.add(call)
        try:
            return self._pool, self._pool.add(call, identity.modules)
        except CannotShip as reason:
            return self._threads, self._stay_here(reward, call, reason)

    def _stay_here(self, reward: Reward, call: Call, reason: CannotShip) -> int:
        warnings.warn(
            f"The reward {as_given(reward.name)} cannot be sent to another process ({reason}), so it runs in a "
            f"thread of this one: a call that hangs is given up after {self.timeout:g} s but cannot be ended. Make "
            f"what cannot be pickled inside the function, at its first call, rather than before it.",
            stacklevel=2,
        )
        return self._threads.add(call)


def function_reports(path: str, outcomes: Sequence[Verdict]) -> dict[str, FunctionReport]:
    """Return the report of a function, and one of each part it returned beside its score."""
    scores = np.array([outcome.score for outcome in outcomes if outcome.score is not None])
    errors = sum(outcome.error is not None for outcome in outcomes)
    timeouts = sum(outcome.timed_out for outcome in outcomes)
    reports = {path: FunctionReport(mean(scores), bessel_std(scores), errors, timeouts)}
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.parts or ()):
        values = np.array([o.parts[name] for o in outcomes if o.parts and name in o.parts])
        reports[f"{path}/{name}"] = FunctionReport(mean(values), bessel_std(values))
    return reports


def report_of_rounds(reports: Sequence[ScoreReport], kept: Sequence[Trajectory]) -> ScoreReport:
    """Return the report of a step that was scored in several rounds: scores of what was kept, errors of all calls."""
    if len(reports) == 1:
        return reports[0]
    functions: dict[str, FunctionReport] = {}
    for name in dict.fromkeys(name for report in reports for name in report.functions):
        found = [(t.reward_parts or {}).get(name) for t in kept]
        values = np.array([value for value in found if value is not None], dtype=np.float64)
        calls = [report.functions[name] for report in reports if name in report.functions]
        counts: Counter[str] = Counter()
        for report in calls:
            counts.update(report.counts)
        functions[name] = FunctionReport(
            mean(values),
            bessel_std(values),
            sum(c.errors for c in calls),
            sum(c.timeouts for c in calls),
            counts,
        )
    return replace(
        reports[-1],
        scored=sum(t.reward is not None for t in kept),
        abstained=sum(t.reward is None and t.reward_error is None for t in kept),
        errors=sum(report.errors for report in reports),
        timeouts=sum(report.timeouts for report in reports),
        functions=functions,
    )


def score(trajectories: Sequence[Trajectory], reward: Reward) -> ScoreReport:
    """Score rollouts here and now, in this process and without a limit on time; see `Scorer.score`."""
    with Scorer(reward, timeout=None) as scorer:
        return scorer.score(trajectories)


class Judge(Protocol):
    """What gives rewards: a reward, or an environment."""

    @property
    def name(self) -> str: ...


def check_scored(trajectories: Sequence[Trajectory], reward: Judge) -> None:
    """Refuse a step of which nothing was scored.

    Raises:
        RewardError: Names the first error.
    """
    if any(trajectory.reward is not None for trajectory in trajectories):
        return
    errors = [trajectory for trajectory in trajectories if trajectory.reward_error is not None]
    cut = sum(trajectory.truncated for trajectory in trajectories)
    if not errors and cut and trajectories[0].turns is not None:
        raise RewardError(
            f"The environment {as_given(reward.name)} gave none of {len(trajectories)} rollouts a reward: {cut} were "
            f"cut before it came to an end. Raise max_new_tokens, or give a reward to those that are cut: catch "
            f"rlvr.RolloutEnded around the yield."
        )
    if not errors:
        raise RewardError(
            f"The reward {as_given(reward.name)} returned None for all {len(trajectories)} rollouts."
        )
    first = errors[0]
    raise RewardError(
        f"The reward {as_given(reward.name)} scored none of {len(trajectories)} rollouts. Its first error, on prompt "
        f"{as_given(first.prompt)} and response {as_given(first.response)}: {first.reward_error}. Fix the function "
        f"and run again; failed rewards are never counted as 0.",
        details={"errors": len(errors), "prompt": first.prompt, "response": first.response},
    )


def unscored(batch: TrajectoryBatch) -> TrajectoryBatch:
    """Return a copy whose rollouts have neither rewards nor advantages."""
    return replace(
        batch,
        groups=[
            replace(group, rollouts=[_unscored(rollout) for rollout in group.rollouts])
            for group in batch.groups
        ],
    )


def _unscored(rollout: Trajectory) -> Trajectory:
    turns = rollout.turns  # an environment gives its own reward to each
    fresh = None if turns is None else [replace(turn, reward=None, meta=dict(turn.meta)) for turn in turns]
    return replace(rollout, **_NOTHING, turns=fresh)
