"""What came of a comparison: each arm's mean over the seeds, each pair's difference, and the words for both."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensafe_nb.comparing.statistics import FEWEST, LEVEL, Interval, cannot_win, interval_of, paired
from tensafe_nb.display import listing, visible
from tensafe_nb.history.figures import aligned, draw_means
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.protocol.batch import Array

UNKNOWN = float("nan")


@dataclass(frozen=True, slots=True)
class Measure:
    """What is compared.

    Attributes:
        metric: By its name in panel and events.
        window: The value of a run is the mean over so many steps, up to the one that is looked at; None takes what was
            measured last, as for evaluations.
        higher: Whether a greater value is better.
        planned: Steps that each run is to take; None where only its data knows.
    """

    metric: str
    window: int | None
    higher: bool
    planned: int | None

    @property
    def words(self) -> str:
        """How a run's value comes about."""
        if self.window is None:
            return f"{self.metric}, as last measured"
        steps = "the last step" if self.window == 1 else f"the mean of the last {self.window} steps"
        return f"{self.metric}, {steps}"


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """What one arm has done with one seed, so far.

    Attributes:
        arm: The arm's name.
        seed: The seed.
        run_id: Its run; None where there is none yet, or none could be started.
        state: "waiting", or that of the run.
        done: Steps taken.
        reason: Why it failed or did not go as planned.
        steps: Where the metric was measured, counted from the run's beginning, (points,).
        values: What was measured there, (points,).
        epsilon: What its training has spent; None without differential privacy.
        delta: At which epsilon is stated.
    """

    arm: str
    seed: int
    run_id: str | None = None
    state: str = "waiting"
    done: int = 0
    reason: str | None = None
    steps: Array = field(default_factory=lambda: np.zeros(0))
    values: Array = field(default_factory=lambda: np.zeros(0))
    epsilon: float | None = None
    delta: float | None = None

    @property
    def failed(self) -> bool:
        """Whether it has failed by itself, and not because the whole comparison was interrupted."""
        return self.state == "FAILED"

    def value(self, measure: Measure, at: float = math.inf) -> float:
        """Return its value at a step; NaN where there is none, or where what was measured is no number."""
        if self.failed:
            return UNKNOWN
        told = self.steps <= at
        if measure.window is not None:
            told &= self.steps > min(at, float(self.done)) - measure.window
        values = self.values[told] if measure.window is not None else self.values[told][-1:]
        return float(values.mean()) if len(values) and np.isfinite(values).all() else UNKNOWN


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What came of one arm.

    Attributes:
        name: What it is called.
        varied: What is different about it.
        value: Its mean over the seeds, with an interval of its own.
        step: Where it was looked at.
        by_seed: The value of each seed; None where it has none.
        failed: The seeds that failed, and why.
        given_up: Why it was stopped early; None where it was not.
        epsilon: The largest that one of its trainings has spent; None without differential privacy.
    """

    name: str
    varied: Mapping[str, Any]
    value: Interval
    step: int
    by_seed: Mapping[int, float | None]
    failed: Mapping[int, str]
    given_up: str | None = None
    epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one arm is above another, seed by seed.

    Attributes:
        one: The arm that did better on average.
        other: The arm that it is compared with.
        by: Mean difference of the seeds that both have, and where the true one may lie; 0 or more where the better arm
            is named first.
        step: Where both were looked at.
        higher: Whether a greater value is better.
        seeds: How many each was given.
    """

    one: str
    other: str
    by: Interval
    step: int
    higher: bool
    seeds: int

    @property
    def seen(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.by.excludes_zero

    def __str__(self) -> str:
        over = "over" if self.higher else "below"
        if self.by.mean is None:
            return f"{self.one} and {self.other}: no seed in which both have a value"
        of = f" of {self.seeds}" if self.by.seeds < self.seeds else ""
        counted = f"paired, {self.by.seeds}{of} {'seed' if self.by.seeds == 1 and not of else 'seeds'}"
        by, within = told(self.by, self.sign)
        if self.by.seeds < FEWEST:
            return (
                f"{self.one} {over} {self.other} by {by} on average, {counted}: no interval can be had of fewer than "
                f"{FEWEST}"
            )
        if not within:
            return (
                f"no difference seen: {self.one} {over} {self.other} by {by} in each of {self.by.seeds} seeds, too few "
                f"to tell that from chance"
            )
        if self.seen:
            return f"{self.one} {over} {self.other} by {by} {within}, {counted}"
        return f"no difference seen between {self.one} and {self.other}: {by} {within}, {counted}"

    @property
    def sign(self) -> int:
        """-1 where the better arm has the lower values, so that "below by" is told as a positive number."""
        return 1 if self.higher else -1


@dataclass(frozen=True, slots=True, eq=False)
class Standings:
    """All that a comparison is judged by: what is compared, by which measure, and what each run has measured.

    Attributes:
        name: The comparison's.
        measure: What is compared; None before anything is measured.
        arms: By name: what is different about each.
        tracks: What each arm has done with each seed.
        state: Of the comparison.
        baseline: The arm that the others are compared with; None takes the best.
        given_up: By arm: the step at which it was stopped early, and the words for it.
        parents: By arm that was forked: the arm it came from, and the step.
        reason: Why it ended as it did.
    """

    name: str
    measure: Measure | None
    arms: Mapping[str, Mapping[str, Any]]
    tracks: Sequence[Track]
    state: str
    baseline: str | None = None
    given_up: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    parents: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    reason: str | None = None

    @property
    def seeds(self) -> list[int]:
        """The seeds, in their order."""
        return list(dict.fromkeys(track.seed for track in self.tracks))

    @property
    def family(self) -> int:
        """In how many comparisons at once the level holds: each pair that could have been looked at."""
        others = len(self.arms) - 1
        pairs = others if self.baseline is not None else others * (others + 1) // 2
        more = sum(self.baseline not in (None, arm, parent) for arm, (parent, _) in self.parents.items())
        return max(1, pairs + more)

    @property
    def step(self) -> int:
        """The step at which the arms are looked at: the last that enough seeds have reached in every arm."""
        reached: dict[int, int] = {}
        for track in self.tracks:
            if track.arm not in self.given_up and not track.failed and track.state != "waiting":
                reached[track.seed] = min(track.done, reached.get(track.seed, track.done))
        steps = sorted(reached.values(), reverse=True)
        return steps[min(FEWEST, len(steps)) - 1] if steps else 0

    def values(self, arm: str, at: float) -> Array:
        """Return what an arm gave at a step, (seeds,) in their order; NaN where there is nothing."""
        assert self.measure is not None
        found = {
            track.seed: track.value(self.measure, at)
            for track in self.tracks
            if track.arm == arm and track.done >= at
        }
        return np.array([found.get(seed, UNKNOWN) for seed in self.seeds])

    def who_cannot_win(self, now: int, before: int) -> dict[str, str]:
        """Return the arms that are far behind the leader at two looks in a row, and no nearer; with the words for it.

        Args:
            now: The step that is looked at.
            before: That of the look before.
        """
        assert self.measure is not None
        sign = 1 if self.measure.higher else -1
        found = {arm: sign * self.values(arm, now) for arm in self.arms if arm not in self.given_up}
        means = {
            arm: float(values[known].mean())
            for arm, values in found.items()
            if (known := np.isfinite(values)).any()
        }
        leader = max(means, key=lambda arm: means[arm], default=None)
        if leader is None:
            return {}
        behind = {}
        for arm in means:
            deficit = found[leader] - found[arm]
            earlier = sign * (self.values(leader, before) - self.values(arm, before))
            anew = not np.array_equal(deficit, earlier, equal_nan=True)  # an evaluation in between
            if arm not in (leader, self.baseline) and anew and cannot_win(deficit, earlier, self.family):
                by = number(float(np.nanmean(deficit)))
                behind[arm] = (
                    f"given up at step {now}: behind {leader} by {by}, and no nearer than at step {before}"
                )
        return behind

    def result(self) -> "ComparisonResult":
        """Return what may be said of it."""
        if self.measure is None:
            return ComparisonResult(self, (), (), None, 0)
        step = self.step
        at = {arm: self.given_up[arm][0] if arm in self.given_up else step for arm in self.arms}
        means = {arm: interval_of(self.values(arm, at[arm])) for arm in self.arms}
        arms = tuple(self._arm(arm, means[arm], at[arm]) for arm in self.arms)
        best = self._best(means)
        against = self.baseline or best
        pairs = [] if against is None else [(against, arm) for arm in self.arms if arm != against]
        for arm, (parent, _) in self.parents.items():
            if against not in (arm, parent):
                pairs.append((parent, arm))
        differences = tuple(self._difference(one, other, min(at[one], at[other])) for one, other in pairs)
        return ComparisonResult(self, arms, differences, best, step)

    def _arm(self, arm: str, value: Interval, step: int) -> ArmResult:
        measure = self.measure
        assert measure is not None
        tracks = [track for track in self.tracks if track.arm == arm]
        spent = [track.epsilon for track in tracks if track.epsilon is not None]
        return ArmResult(
            arm,
            self.arms[arm],
            value,
            step,
            {track.seed: known(track.value(measure, step)) for track in tracks},
            {track.seed: track.reason or "it failed" for track in tracks if track.failed},
            self.given_up[arm][1] if arm in self.given_up else None,
            max(spent, default=None),
        )

    def _best(self, means: Mapping[str, Interval]) -> str | None:
        """Return the arm with the best mean, of those that were not given up."""
        assert self.measure is not None
        sign = 1 if self.measure.higher else -1
        known = {arm: m.mean for arm, m in means.items() if m.mean is not None and arm not in self.given_up}
        return max(known, key=lambda arm: sign * known[arm], default=None)

    def _difference(self, one: str, other: str, step: int) -> Difference:
        assert self.measure is not None
        by = paired(self.values(one, step), self.values(other, step), self.family)
        better = (by.mean or 0.0) >= 0 if self.measure.higher else (by.mean or 0.0) <= 0
        if not better:
            one, other, by = other, one, turned(by)
        return Difference(one, other, by, step, self.measure.higher, len(self.seeds))

    def curve(self, arm: str) -> tuple[Array, Array, Array]:
        """Return where an arm was measured, its mean over the seeds there, and how far the interval reaches.

        Each is (points,). Where fewer than three seeds were measured, the reach is NaN.
        """
        tracks = [t for t in self.tracks if t.arm == arm and not t.failed and len(t.steps)]
        if not tracks:
            return np.zeros(0), np.zeros(0), np.zeros(0)
        at, values = aligned([(t.steps, t.values) for t in tracks], exact=True)  # (seeds, points)
        finite = np.isfinite(values)
        at, values = at[finite.any(axis=0)], values[:, finite.any(axis=0)]
        spans = [interval_of(column) for column in values.T]
        mean = np.array([span.mean for span in spans], dtype=float)
        reach = np.array(
            [UNKNOWN if s.high is None or s.low is None else (s.high - s.low) / 2 for s in spans]
        )
        return at, mean, reach


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonResult(Tabular):
    """What may be said of the arms of a comparison: printed, or as a table.

    Attributes:
        standings: What it is judged by.
        arms: What came of each.
        differences: Of each arm to the best, or to the baseline; of a forked arm to the one it came from as well.
        best: The arm with the best mean; whether it is better than another, the differences say.
        step: Where the arms were looked at.

    Example:
        >>> result = comparison.result()
        >>> print(result)
        >>> result.to_csv("comparison.csv")
    """

    standings: Standings
    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    best: str | None
    step: int

    def __getitem__(self, arm: str) -> ArmResult:
        return next(one for one in self.arms if one.name == arm)

    @property
    def private(self) -> bool:
        """Whether it tells of private training data."""
        return any(track.epsilon is not None for track in self.standings.tracks)

    def table(self) -> Table:
        """Return one row for each arm: its mean, and its difference to the arm that it is compared with."""
        against = {
            d.other if d.one == self.against else d.one: d for d in self.differences[: len(self.arms) - 1]
        }
        return Table.of_rows([self._row(arm, against.get(arm.name)) for arm in self.arms], self.private)

    @property
    def against(self) -> str | None:
        """The arm that the others are compared with."""
        return self.standings.baseline or self.best

    def _row(self, arm: ArmResult, difference: Difference | None) -> dict[str, Any]:
        measure = self.standings.measure
        row: dict[str, Any] = {
            "arm": arm.name,
            **{
                f"varied: {name}" if name in ("arm", "step") else name: plain(v)
                for name, v in arm.varied.items()
            },
            measure.metric if measure else "value": arm.value.mean,
            "low": arm.value.low,
            "high": arm.value.high,
            "seeds": arm.value.seeds,
            "step": arm.step,
            "against": self.against if difference else None,
            "difference": None,
            "difference low": None,
            "difference high": None,
            "p": None,
            "seen": None,
        }
        if difference is not None:
            by = difference.by if difference.one == arm.name else turned(difference.by)
            row |= {"difference": by.mean, "difference low": by.low, "difference high": by.high, "p": by.p}
            row["seen"] = difference.seen
        row["note"] = "; ".join(self._notes_of(arm)) or None
        if self.private:
            row["epsilon"] = arm.epsilon
        return row

    @staticmethod
    def _notes_of(arm: ArmResult) -> Iterator[str]:
        if arm.given_up:
            yield arm.given_up
        for why in dict.fromkeys(arm.failed.values()):
            seeds = [str(seed) for seed, other in arm.failed.items() if other == why]
            yield f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)} failed: {why.rstrip('.')}"

    def seeds(self) -> Table:
        """Return one row for each arm and seed: its value, its run, and how that stands."""
        measure = self.standings.measure
        at = {arm.name: arm.step for arm in self.arms}
        values = {
            t: None if measure is None else known(t.value(measure, at[t.arm])) for t in self.standings.tracks
        }
        rows = [
            {
                "arm": track.arm,
                "seed": track.seed,
                measure.metric if measure else "value": values[track],
                "state": track.state,
                "steps": track.done,
                "run": track.run_id,
                "reason": track.reason,
                **({"epsilon": track.epsilon} if self.private else {}),
            }
            for track in self.standings.tracks
        ]  # fmt: skip
        return Table.of_rows(rows, self.private)

    def curves(self) -> Table:
        """Return the curves of the chart: for each arm and step the mean over the seeds, and its interval."""
        rows = [
            {"arm": arm, "step": int(at), "mean": float(mean), "low": known(mean - reach), "high": known(mean + reach)}
            for arm in self.standings.arms
            for at, mean, reach in zip(*self.standings.curve(arm), strict=True)
        ]  # fmt: skip
        return Table.of_rows(rows, self.private)

    def plot(self, axes: Any = None) -> Any:
        """Draw each arm's mean over the seeds with its interval, and return the matplotlib figure.

        The intervals are those of single arms. Whether two differ is told by the pairs, which are closer together than
        their curves look: seeds that are hard for one arm are hard for all.

        Args:
            axes: Your own axes to draw into.

        Raises:
            ValidationError: Nothing has been measured yet, or axes that do not fit.
        """
        curves = {arm: self.standings.curve(arm) for arm in self.standings.arms}
        metric = self.standings.measure.metric if self.standings.measure else ""
        return draw_means(curves, metric, private=self.private, axes=axes)

    @property
    def headline(self) -> str:
        """How it stands, in one line."""
        told = self.standings
        planned = told.measure.planned if told.measure is not None else None
        of = f" of {planned}" if planned else ""
        arms, seeds = len(told.arms), len(told.seeds)
        size = f"{arms} {'arm' if arms == 1 else 'arms'} × {seeds} {'seed' if seeds == 1 else 'seeds'}"
        return f"{told.name}: {told.state.lower()}, step {self.step}{of}, {size}"

    def verdicts(self) -> list[str]:
        """Return what is said of each pair, in one line each."""
        return [str(difference) for difference in self.differences]

    def notes(self) -> list[str]:
        """Return what has to be known to read the verdicts: how values come about, and what limits them."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        standings = self.standings
        if standings.measure is None:
            yield "Nothing has been measured yet."
            return
        better = "higher" if standings.measure.higher else "lower"
        yield (
            f"Each run's value: {standings.measure.words}; {better} is better. Intervals: Student's t over the seeds, "
            f"{100 * LEVEL:g} %."
        )
        if standings.family > 1:
            yield f"Differences hold together: intervals are widened for {standings.family} comparisons (Bonferroni)."
        if standings.state in ("RUNNING", "PAUSED"):
            yield (
                f"So far, at step {self.step}: these intervals are for one look. Whoever ends the race when one looks "
                f"good makes differences out of chance."
            )
        if standings.state == "INTERRUPTED":
            yield (
                f"Its process ended in the middle: this is how it stood at step {self.step}. compare(…, "
                f"resume_from={standings.name!r}) goes on with it."
            )
        if standings.state == "STOPPED":
            yield (
                f"Stopped by hand at step {self.step}: if what the chart showed was the reason, the intervals are too "
                f"narrow."
            )
        if len(standings.seeds) < FEWEST:
            count = "one seed" if len(standings.seeds) == 1 else "two seeds"
            yield f"Of {count} no interval can be had: the curves are all there is. It takes {FEWEST} seeds, better 5."
        for arm in self.arms:
            yield from (f"{arm.name}: {note}." for note in self._notes_of(arm))
            if arm.value.constant:
                yield (
                    f"{arm.name}: all seeds gave the very same value. If its training should depend on the seed, see "
                    f"that the arm hands it on: TrainingConfig(seed=seed), RLVRTrainer(…, seed=seed)."
                )
        if any(arm.failed for arm in self.arms):
            yield "A seed that failed has no value and counts in no pair: it is not taken for a bad one."
        for name, (parent, step) in standings.parents.items():
            yield f"{name} left {parent} at step {step}, in mid-race: against {parent} it is a fair race from there on."
        if self.private:
            yield from self._privacy()

    def _privacy(self) -> Iterator[str]:
        spent = [(t.epsilon, t.delta) for t in self.standings.tracks if t.epsilon is not None]
        epsilon, delta = sum(e for e, _ in spent), sum(d or 0.0 for _, d in spent)
        yield (
            f"{len(spent)} private trainings. If they used the same rows, together they have spent ε {number(epsilon)} "
            f"at δ = {delta:g} (basic composition): that, not the ε of its own training, is the price of a model that "
            f"is chosen by looking at all of them."
        )
        yield "Operator view: what is measured on private rows is not covered by ε, and neither is a choice made by it."

    def __repr__(self) -> str:
        width = max((len(arm.name) for arm in self.arms), default=0)
        return "\n".join(
            [
                self.headline,
                *(f"  {arm.name:{width}s}  {words_of(arm)}" for arm in self.arms),
                *self.verdicts(),
                *self.notes(),
            ]
        )

    def _repr_html_(self) -> str:
        standings = self.standings
        rows = [{"arm": arm.name, **facts_of(arm, private=self.private)} for arm in self.arms]
        lines = [*self.verdicts(), *self.notes()]
        if standings.reason:
            lines.append(standings.reason)
        return listing(self.headline, rows) + "".join(
            f"<p>{html.escape(visible(line))}</p>" for line in lines
        )


def facts_of(arm: ArmResult, *, private: bool) -> dict[str, Any]:
    """Return what a table in a notebook says of an arm."""
    value = arm.value
    mean, interval = told(value)
    facts: dict[str, Any] = {
        "mean": None if value.mean is None else mean,
        "interval": interval or None,
        "seeds": f"{value.seeds} of {len(arm.by_seed)}"
        if value.seeds < len(arm.by_seed)
        else str(value.seeds),
        "step": arm.step,
    }
    if private:
        facts["ε"] = arm.epsilon
    facts["note"] = arm.given_up or (f"{len(arm.failed)} failed" if arm.failed else None)
    return facts


def words_of(arm: ArmResult) -> str:
    """Return what came of an arm, in one line."""
    facts = facts_of(arm, private=arm.epsilon is not None)
    interval = f" {facts['interval']}" if facts["interval"] else ""
    spent = f", ε {number(arm.epsilon)}" if arm.epsilon is not None else ""
    noted = f" ({facts['note']})" if facts["note"] else ""
    return f"{facts['mean'] or 'no value'}{interval}, {facts['seeds']} seeds{spent}{noted}"


def turned(by: Interval) -> Interval:
    """Return the difference as the other arm has it."""
    return Interval(
        None if by.mean is None else -by.mean,
        None if by.high is None else -by.high,
        None if by.low is None else -by.low,
        by.seeds,
        by.p,
        by.constant,
    )


def told(by: Interval, sign: int = 1) -> tuple[str, str]:
    """Return a mean and its interval in words, both to as many decimals as two digits of the interval's reach need."""
    mean = sign * (by.mean or 0.0)
    if by.low is None or by.high is None:
        return number(mean), ""
    low, high = sorted((sign * by.low, sign * by.high))
    decimals = 3 if high == low else max(0, 1 - math.floor(math.log10((high - low) / 2)))
    if decimals > 6:
        return number(mean), f"[{number(low)}, {number(high)}]"
    words = [f"{round(value, decimals) + 0.0:.{decimals}f}" for value in (mean, low, high)]  # no -0.00
    return words[0], f"[{words[1]}, {words[2]}]"


def number(value: float) -> str:
    """Return a number as people read it: three digits, and no 0.30000000000000004."""
    return f"{value:.3g}"


def known(value: float) -> float | None:
    """Return a number, None for NaN: what is not known is empty, never 0."""
    return float(value) if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Return a varied value as a cell of a table."""
    return getattr(value, "__name__", None) or (
        value if isinstance(value, str | int | float | bool | None) else str(value)
    )
