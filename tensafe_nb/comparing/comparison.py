"""`tn.compare`: two or more ideas over common seeds, and a handle that is there at once."""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from tensafe_nb import widgets
from tensafe_nb.checks import checked, is_whole
from tensafe_nb.comparing.arms import Arm, Vary, arms_of, name_parts
from tensafe_nb.comparing.racing import Race
from tensafe_nb.comparing.records import (
    ComparisonRecord,
    Kept,
    KeptLane,
    load_comparison,
    lock_of,
    what_is_left,
)
from tensafe_nb.comparing.results import ComparisonResult, Standings, plain
from tensafe_nb.comparing.showing import shown_of
from tensafe_nb.config import TrainingConfig
from tensafe_nb.display import as_given, visible
from tensafe_nb.errors import (
    FutureCancelledError,
    FutureTimeoutError,
    TGTinkerError,
    ValidationError,
    nearest,
)
from tensafe_nb.events import RunDescribed
from tensafe_nb.futures import Promise
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.locks import held
from tensafe_nb.recipes.recipe import Recipe
from tensafe_nb.runs.description import described
from tensafe_nb.runs.record import RunRecord, load_run
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.service import ServiceClient
from tensafe_nb.widgets.still.race import Shown

logger = logging.getLogger(__name__)

MOST_SEEDS = 1000
_numbers = itertools.count(1)

ArmSpec = Callable[..., Any] | Recipe | TrainingConfig | Mapping[str, Any] | str | Path


class Comparison(Tabular):
    """A race of arms over common seeds, under way on a thread of its own; made by `compare`.

    Await it, or call `result()`, when the end is needed; interrupting that wait does not stop the race. What stands so
    far is there at any time: `so_far()`, and the table of a handle is that of this moment.

    Example:
        >>> comparison = tn.compare(arm, seeds=5, vary={"learning_rate": [1e-3, 3e-3]})
        >>> print(await comparison)
    """

    def __init__(
        self,
        arms: list[Arm],
        seeds: list[int],
        service: ServiceClient | None,
        name: str | None,
        earlier: ComparisonRecord | None = None,
        **how: Any,
    ) -> None:
        self.comparison_id = f"cmp-{secrets.token_hex(3)}" if earlier is None else earlier.comparison_id
        self.name = name
        self.started_at = time.time() if earlier is None else earlier.kept.started_at
        self._own_service = None if service is not None else ServiceClient()
        self._service = service or self._own_service
        assert self._service is not None
        self._state = "RUNNING"
        self._reason: str | None = None
        self._promise: Promise[ComparisonResult] = Promise()
        self._watchers: list[Callable[[], None]] = []
        tags = [self.comparison_id, *([name] if name else [])]
        self._race = Race(
            name or self.comparison_id, tags, arms, seeds, self._service, tell=self._tell, **how
        )
        self._under_way = ExitStack()
        self._thread = threading.Thread(target=self._main, name=f"tsnb-compare-{next(_numbers)}", daemon=True)

    def start(self) -> "Comparison":
        """Begin; called once, by `compare`."""
        self._keep()
        self._under_way.enter_context(held(lock_of(self.comparison_id), exclusive=True, wait=False))
        self._thread.start()
        return self

    # what it is

    @property
    def state(self) -> str:
        """RUNNING, PAUSED, FINISHED, STOPPED, FAILED or CANCELLED."""
        return "PAUSED" if self._state == "RUNNING" and self._race.paused else self._state

    @property
    def arms(self) -> list[str]:
        """The names of what is compared, in the order of the table."""
        return [arm.name for arm in self._race.arms]

    @property
    def runs(self) -> dict[tuple[str, int], TrainingRun | RunRecord]:
        """The runs by arm and seed: under way, or, once they have ended, their records."""
        found: dict[tuple[str, int], TrainingRun | RunRecord] = {}
        for lane in tuple(self._race.lanes):
            run: TrainingRun | RunRecord | None = lane.run
            if run is None and lane.run_id is not None:
                run = load_run(lane.run_id)
            if run is not None:
                found[lane.arm.name, lane.seed] = run
        return found

    def standings(self) -> Standings:
        """Return how the arms stand, as plain data."""
        return self._race.standings(self.state, self._reason)

    def so_far(self) -> ComparisonResult:
        """Return what may be said at this moment."""
        return self.standings().result()

    def table(self) -> Table:
        """Return one row for each arm, as they stand; see `ComparisonResult.table`."""
        return self.so_far().table()

    def plot(self, axes: Any = None) -> Any:
        """Draw the curves as they stand; see `ComparisonResult.plot`."""
        return self.so_far().plot(axes)

    def __repr__(self) -> str:
        told = self.so_far()
        named = f" {visible(self.name)!r}" if self.name else ""
        planned = told.standings.measure.planned if told.standings.measure else None
        head = (
            f"<Comparison {self.comparison_id}{named} {self.state}, {len(self.arms)} arms × {len(self._race.seeds)} "
            f"seeds, step {told.step} of {planned or '?'}>"
        )
        return "\n".join([head, *told.verdicts()])

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return widgets.comparison_bundle(self)

    def _mime_(self) -> tuple[str, str]:
        """Return what marimo shows."""
        return widgets.comparison_mime(self)

    def shown(self) -> Shown:
        """Return what chart and table show of this moment."""
        return shown_of(
            self.so_far(), self.comparison_id, active=not self.done(), steer=True, reason=self._reason
        )

    def freeze(self) -> None:
        """Put a picture and the table of how it stands into the calling cell."""
        widgets.freeze_comparison(self)

    @checked
    def save_page(self, to: str | Path, title: str | None = None) -> Path:
        """Save its chart, table and words as one HTML file, for whoever has a browser and nothing else.

        The file loads nothing from anywhere. Of private trainings it is the operator's view, and says so.

        Args:
            to: The file; one that is there is replaced.
            title: The page's.

        Raises:
            ValidationError: It is still under way.
            StorageError: The file cannot be written.
        """
        page: Path = widgets.save_comparison(self, to, title)
        return page

    # waiting

    def done(self) -> bool:
        """Whether it has ended."""
        return self._promise.done

    @checked
    def result(self, timeout: float | None = None) -> ComparisonResult:
        """Wait for the end.

        Raises:
            FutureTimeoutError: Not there in time; the race goes on.
            FutureCancelledError: It was cancelled.
            TGTinkerError: What made it fail: no run could be started, or none measured what is compared.
        """
        if not self._promise.wait(timeout):
            raise FutureTimeoutError(
                f"The comparison {self.comparison_id} was not done after {timeout} s (step {self.so_far().step}). It "
                f"goes on: wait again, look at so_far(), or call stop()."
            )
        return self._outcome()

    def __await__(self) -> Generator[Any, None, ComparisonResult]:
        yield from self._promise.wait_async().__await__()
        return self._outcome()

    def _outcome(self) -> ComparisonResult:
        if self._state == "CANCELLED":
            raise FutureCancelledError(
                f"The comparison {self.comparison_id} was cancelled. Its runs are in "
                f"list_runs(tags={self.comparison_id!r}), and what stood is in so_far()."
            )
        return self._promise.outcome()

    # steering

    def pause(self) -> None:
        """Let every run pause after its step, until `resume()`."""
        self._race.wants_pause = True
        self._race.wake()

    def resume(self) -> None:
        """Go on after a pause."""
        self._race.wants_pause = False
        self._race.wake()

    def stop(self) -> None:
        """End every run after its step; the result is what stands then, and says so."""
        if not self.done():
            self._race.wants_stop = True
            self._race.wake()

    def cancel(self) -> bool:
        """End every run after its step, and have no result; False if it has ended already."""
        if self.done():
            return False
        self._state = "CANCELLED"
        self.stop()
        return True

    @checked
    def fork(self, arm: str, step: int | None = None, **changes: Any) -> str:
        """Have another arm join that goes on from the state of one, with something changed; returns its name.

        Each seed is forked from the same seed of its parent, so that the two are pairs. A recipe is forked as it is; a
        function must take `resume_from=None` and hand it to `fit` or `run`.

        Args:
            arm: The parent's name.
            step: Where it branches off: a step that is still to come, or one of which there is a checkpoint; None takes
                where the race stands.
            changes: What is different from the parent, as for `vary`.

        Raises:
            ValidationError: No such arm, no change, or a function that cannot resume.

        Example:
            >>> comparison.fork("learning_rate=0.003", learning_rate=1e-3)
        """
        if self.done():
            raise ValidationError(
                f"The comparison {self.comparison_id} has ended: an arm can join a race that is on. Compare anew."
            )
        parent = next((one for one in self._race.arms if one.name == arm), None)
        if parent is None:
            raise ValidationError(f"fork: there is no arm {as_given(arm)}.{nearest(arm, self.arms)}")
        if not changes:
            raise ValidationError("fork: say what is to be different: fork(arm, learning_rate=1e-3).")
        if step is not None and step < 0:
            raise ValidationError(f"fork: step={step} must be a step of the run, 0 or later.")
        if not parent.idea.resumes:
            raise ValidationError(
                f"fork: {parent.idea.name} cannot go on from a checkpoint: give it a parameter resume_from=None, "
                f"and hand that on: tc.fit(…, resume_from=resume_from), or trainer.run(…, resume_from=resume_from)."
            )
        varied = {**parent.varied, **changes}
        parent.idea.check(varied)
        name = f"{arm} ⑂ {', '.join(name_parts(changes))}"
        if name in self.arms:
            raise ValidationError(f"fork: there is an arm {as_given(name)} already.")
        self._race.fork(Arm(name, varied, parent.idea, (arm, -1 if step is None else step)))
        self._race.wake()
        return name

    # its thread

    def _main(self) -> None:
        try:
            try:
                self._race.run()
            finally:
                if self._own_service is not None:
                    self._own_service.close()
            self._refuse_if_all_failed()
        except BaseException as error:  # noqa: BLE001  # whatever it was, whoever waits is told
            self._finish("FAILED", error)
        else:
            self._finish("STOPPED" if self._race.wants_stop else "FINISHED", None)

    def _refuse_if_all_failed(self) -> None:
        errors = [lane.error for lane in self._race.lanes]
        if errors and errors[0] is not None and all(error is not None for error in errors):
            lane = self._race.lanes[0]
            raise ValidationError(
                f"compare: all {len(errors)} runs failed. The first ({lane.arm.name}, seed {lane.seed}): "
                f"{type(errors[0]).__name__}: {errors[0]}"
            ) from errors[0]

    def _finish(self, state: str, error: BaseException | None) -> None:
        self._state = self._state if self._state == "CANCELLED" else state
        self._reason = None if error is None else str(error)
        try:
            self._tell()
        finally:
            self._under_way.close()
            if error is not None and self._state != "CANCELLED":
                self._promise.fail(error)
            else:
                self._promise.succeed(self.so_far())
            for watcher in tuple(self._watchers):
                watcher()

    def _tell(self) -> None:
        """Keep how it stands, and let whoever watches know."""
        try:
            self._keep()
        except TGTinkerError as error:
            logger.warning("the comparison %s could not be written: %s", self.comparison_id, error)
        for watcher in tuple(self._watchers):
            watcher()

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Call back after every round, and at the end; returns a function that forgets the callback."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher) if watcher in self._watchers else None

    def _keep(self) -> None:
        race, told = self._race, self.standings()
        lanes = [
            KeptLane(t.arm, t.seed, t.run_id, t.state, t.done, t.reason, lane.begun_at, lane.earlier)
            for t, lane in zip(told.tracks, tuple(race.lanes), strict=False)
        ]
        measure = race.measure
        Kept(
            self.comparison_id,
            self.name,
            self.started_at,
            self.state,
            self._reason,
            None if measure is None else measure.metric,
            None if measure is None else measure.window,
            measure is None or measure.higher,
            None if measure is None else measure.planned,
            race.baseline,
            {
                arm: {name: plain(value) for name, value in varied.items()}
                for arm, varied in told.arms.items()
            },
            told.given_up,
            told.parents,
            tuple(lanes),
            race.steps,
        ).write()


@checked
def compare(
    arm: ArmSpec | Sequence[ArmSpec],
    *,
    seeds: int | Sequence[int] = 5,
    vary: Vary = None,
    data: Any = None,
    eval_data: Any = None,
    metric: str | None = None,
    better: Literal["higher", "lower"] | None = None,
    last: int | None = None,
    steps: int | None = None,
    baseline: str | None = None,
    service: ServiceClient | None = None,
    early_stop: bool = True,
    pace: int | None = None,
    side_by_side: int | None = None,
    resume_from: str | None = None,
    name: str | None = None,
    show: bool = True,
) -> Comparison:
    """Compare ideas honestly: each over several seeds, pair by pair, with an interval. Returns at once.

    All arms get the same seeds, and so, from the same seed, the same prompts in the same order and the same initial
    weights: what is left of a difference is the idea's. They advance in step, so that there is something to see early.
    Every run is an ordinary one, in `list_runs(tags=comparison.comparison_id)`.

    Args:
        arm: What trains: a function `arm(service, seed, **varied)` that starts a run and returns it, a recipe (a .yaml
            file, a Recipe, or a dict of its sections), or a list of these, each of them an arm.
        seeds: How many, or which. With fewer than 3 there is no interval; 5 see large differences, 10 smaller ones.
        vary: What differs: a dict of lists, whose combinations are the arms, or a list of dicts, each of them an arm. A
            function gets them as keywords; of a recipe they are entries, such as "learning_rate" or "lora.rank".
        data: The rows that recipes are trained on.
        eval_data: Held-out rows for recipes.
        metric: What is compared; None takes the reward or the loss, on held-out data where there is some.
        better: Whether "higher" or "lower" values are; None knows of losses, errors, perplexities and KL that lower is.
        last: A run's value is its mean over so many of its last steps; None takes a tenth of them, or, of an
            evaluation, the last one.
        steps: How many steps each run takes; a function that has a parameter `steps` is given it.
        baseline: The arm that the others are compared with; None takes the one that turns out best, and widens the
            intervals for that choice.
        service: Where the training clients are made; None makes a service, and closes it at the end.
        early_stop: Give up arms that are far behind at half and at three quarters of the steps, and not catching up.
        pace: Steps that an arm may be ahead of the others; None takes a twentieth of the run.
        side_by_side: Runs under way at the same moment; None takes as many as there are cores, 4 at most.
        resume_from: A comparison of the same arms and seeds, by its id or name, that was stopped or whose process ended
            in the middle: it goes on. What had ended stays; a run that had saved a checkpoint goes on from there (a
            function has to take `resume_from` for that); the rest begins anew.
        name: What it is called, in the chart and for `load_comparison`; its runs are tagged with it.
        show: Show the live chart in a notebook.

    Raises:
        ValidationError: Something that is no arm, does not fit it, or an unknown baseline; says the nearest. Or a
            comparison that cannot be gone on with.
        RunNotFoundError: There is no comparison to go on with.

    Example:
        >>> def arm(service, seed, learning_rate):
        ...     tc = service.create_training_client(model_ref="builtin:sums", seed=seed,
        ...                                         optimizer={"learning_rate": learning_rate})
        ...     return RLVRTrainer(tc, rows, "exact_match", seed=seed).run(steps=40, show=False)
        >>> comparison = tn.compare(arm, seeds=5, vary={"learning_rate": [1e-3, 3e-3]})
    """
    for what, count in (("last", last), ("steps", steps), ("pace", pace), ("side_by_side", side_by_side)):
        if count is not None and count < 1:
            raise ValidationError(f"compare: {what}={as_given(count)} must be at least 1.")
    described(RunDescribed(run_id=""), name, None, None)
    arms = arms_of(arm, vary, data, eval_data, steps)
    if baseline is not None and baseline not in [one.name for one in arms]:
        raise ValidationError(
            f"compare: baseline={as_given(baseline)} is none of the arms.{nearest(baseline, [a.name for a in arms])}"
        )
    numbers, name = seeds_of(seeds), name.strip() or None if name else None
    higher = None if better is None else better == "higher"
    earlier = None if resume_from is None else load_comparison(resume_from)
    went_before: dict[str, Any] = {}
    if earlier is not None:
        check_measure(earlier, metric=metric, last=last, better=better, steps=steps)
        went_before = {
            "earlier": earlier,
            "left": what_is_left(earlier, arms, numbers),
            "measure": earlier.measure,
            "given_up": earlier.kept.given_up,
        }
        name, baseline = name or earlier.name, baseline or earlier.kept.baseline
    comparison = Comparison(
        arms,
        numbers,
        service,
        name,
        **went_before,
        metric=metric,
        window=last,
        higher=higher,
        steps=steps,
        pace=pace,
        side_by_side=side_by_side,
        early_stop=early_stop,
        baseline=baseline,
    )
    if show:
        widgets.show_comparison(comparison)
    return comparison.start()


def check_measure(earlier: ComparisonRecord, **asked: Any) -> None:
    """Refuse to go on with a comparison by another measure than it began with.

    Args:
        earlier: The comparison.
        asked: `metric`, `last`, `better` and `steps` as they are given now.

    Raises:
        ValidationError: Says which.
    """
    was, known = earlier.measure, earlier.name or earlier.comparison_id
    before: dict[str, Any] = {"steps": earlier.kept.steps}
    if was is not None:
        before |= {"metric": was.metric, "last": was.window, "better": "higher" if was.higher else "lower"}
    for name, value in before.items():
        if asked[name] != value and (asked[name] is not None or name == "steps"):
            raise ValidationError(
                f"compare: {name} was {as_given(value)} when {known} began, and is {as_given(asked[name])} now: go "
                f"on with what it was, or compare anew. A measure chosen after a look makes differences out of chance."
            )


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """Return the seeds.

    Raises:
        ValidationError: There are none, too many, or one twice.
    """
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if isinstance(seeds, int) and seeds == 1:
        found = [0]
    if not 0 < len(found) <= MOST_SEEDS:
        raise ValidationError(
            f"compare: seeds={as_given(seeds)} must be a number of seeds, 1 to {MOST_SEEDS}, or a list."
        )
    if not all(is_whole(seed) and seed >= 0 for seed in found):
        raise ValidationError(f"compare: seeds={as_given(seeds)} must be whole numbers, 0 or more.")
    if len(set(found)) < len(found):
        raise ValidationError(
            f"compare: seeds={as_given(seeds)} has one twice: the same run again says nothing new."
        )
    return list(map(int, found))
