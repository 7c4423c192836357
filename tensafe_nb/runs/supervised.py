"""Supervised training: batches → forward_backward → optim_step, with held-out evaluation in between."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from math import ceil
from typing import Any

from tensafe_nb.data import Batches, check_fit
from tensafe_nb.data.poisson import PoissonDraws
from tensafe_nb.data.rows import refuse_table
from tensafe_nb.display import as_given
from tensafe_nb.errors import NonFiniteLossError, ValidationError
from tensafe_nb.events import Alarm, Metrics
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.losses import OF_PAIRS
from tensafe_nb.protocol.results import ForwardBackwardResult, ForwardResult, OptimStepResult
from tensafe_nb.runs.alarms import Rates, StepAlarms, not_finite
from tensafe_nb.runs.loop import Batch, LossSpec, Run, RunClient

EVAL_SLICE = 64  # held-out batches in the queue at a time
LONG_ACCUMULATION = 400  # batches per step from which on the queue holds one step only


class BatchCursor:
    """Deals batches, pass after pass, and can go back to any place.

    Args:
        batches: A list, a `data.Batches`, or any iterable; iterated anew for each pass.
        passes: How many; None deals until nobody asks any more.
    """

    def __init__(self, batches: Iterable[Batch], passes: int | None) -> None:
        self._batches, self._passes = batches, passes
        self._epoch = self._dealt = 0
        self._shuffle = batches.passes if isinstance(batches, Batches) else 0
        self._iterator: Iterator[Batch] | None = None

    @property
    def is_once(self) -> bool:
        """Whether they can be iterated only once: what a generator has dealt is gone."""
        return isinstance(self._batches, Iterator)

    def check(self) -> None:
        """Refuse, before anything is trained, a plan that a generator cannot serve.

        Raises:
            ValidationError: Several passes over what can be iterated only once.
        """
        if self.is_once and self._passes is not None and self._passes > 1:
            raise ValidationError(
                f"fit: epochs={self._passes}, but the batches could be iterated only once. "
                f"Give a list or data.Batches instead of a generator."
            )

    def take(self, count: int) -> list[Batch]:
        """Return the next batches; fewer at the end, across passes."""
        taken: list[Batch] = []
        while len(taken) < count and (self._passes is None or self._epoch < self._passes):
            found = list(itertools.islice(self._open(), count - len(taken)))
            taken += found
            self._dealt += len(found)
            if len(taken) < count and not self._next_pass():
                break
        return taken

    def position(self) -> dict[str, int]:
        """Return the number of the pass, the batches dealt in it, and the number of its shuffle."""
        return {"epoch": self._epoch, "dealt": self._dealt, "shuffle": self._shuffle}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a position: the batches must come in the order in which they came then.

        Raises:
            ValidationError: There are fewer batches than that.
        """
        if self.is_once and (self._iterator is not None or position["epoch"]):
            raise ValidationError(
                "These batches are a generator, which cannot go back to where the checkpoint stood. "
                "Give fit() a list or data.Batches."
            )
        self._epoch, self._dealt, self._shuffle = (position[name] for name in ("epoch", "dealt", "shuffle"))
        self._iterator = None
        if isinstance(self._batches, PoissonDraws):  # to draw and throw away would be charged
            self._iterator = self._batches.rest(self._dealt)
            return
        passed = sum(1 for _ in itertools.islice(self._open(), self._dealt))
        if passed < self._dealt:
            raise ValidationError(
                f"The checkpoint was saved after {self._dealt} batches of a pass; there are only {passed} now. "
                f"Go on with the batches of the original run, or load_state() the checkpoint and start a new run."
            )

    def _open(self) -> Iterator[Batch]:
        if self._iterator is None:
            if isinstance(self._batches, Batches):
                self._batches.passes = self._shuffle
            self._iterator = iter(self._batches)
        return self._iterator

    def _next_pass(self) -> bool:
        """Begin the next pass; False when this one was empty, so that the next would be too."""
        if not self._dealt:
            if self._epoch and self._passes is not None:
                raise ValidationError(
                    f"fit: epochs={self._passes}, but the batches could be iterated only once. "
                    f"Give a list or data.Batches instead of a generator."
                )
            return False
        self._epoch, self._dealt, self._shuffle = self._epoch + 1, 0, self._shuffle + 1
        self._iterator = None
        return True


class SupervisedLoop:
    """Batches → forward_backward → optim_step, with held-out evaluation in between.

    Args:
        client: What to train.
        batches: A list, a `data.Batches`, or any iterable; iterated anew for each epoch.
        epochs: Passes over the batches; None repeats them until the run's steps are reached, or once.
        eval_batches: Held-out batches, evaluated before the first step, every `eval_every` steps, and at the end.
        eval_every: Steps between evaluations.
        steps: Planned steps; None takes what the epochs give.
        loss_fn: The loss; the client's own when None.
        loss_kwargs: Its keywords.
    """

    curve = "loss"

    def __init__(
        self,
        client: RunClient,
        batches: Iterable[Batch],
        *,
        epochs: int | None,
        steps: int | None,
        eval_batches: Iterable[Batch] | None,
        eval_every: int | None,
        loss_fn: LossSpec | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_numbers(epochs=epochs, steps=steps, eval_every=eval_every)
        if eval_every is not None and eval_batches is None:
            raise ValidationError(f"fit: eval_every={eval_every} needs eval_batches.")
        held_out = () if eval_batches is None else eval_batches
        check_batches(batches=batches, eval_batches=held_out)
        check_pairs(
            client.config.loss.type if loss_fn is None else loss_fn, batches=batches, eval_batches=held_out
        )
        if batches is eval_batches and isinstance(batches, Iterator):
            raise ValidationError(
                "fit: batches and eval_batches are one generator: what one has dealt, the other misses. Give lists."
            )
        self._client = client
        # how gradients and losses are asked for; nothing is said where the client's own loss is meant
        self._loss: dict[str, Any] = {} if loss_fn is None else {"loss_fn": loss_fn}
        if loss_kwargs:
            self._loss["loss_kwargs"] = dict(loss_kwargs)
        whole_draws = isinstance(batches, PoissonDraws)  # one item is one step, however many rows it has
        self._accumulation = 1 if whole_draws else client.config.gradient_accumulation_steps
        self.lookahead = 1 if self._accumulation < LONG_ACCUMULATION else 0
        self._eval_batches = [BatchData.of(batch) for batch in held_out]
        self._eval_every = eval_every
        # without epochs, batches are repeated until the steps are reached; without either, taken once
        self._passes = epochs if epochs is not None else (None if steps is not None else 1)
        self._evaluated_after: int | None = None
        self._ended_after: int | None = None  # steps, where the batches ended before
        dp = client.config.dp_config
        self._alarms = StepAlarms(client.config.optimizer, private=dp is not None and dp.enabled)
        self._rates = Rates(client.config.optimizer)
        self._newest: list[FutureHandle[Any]] = []  # of the last two steps
        self._batches, self._held_out = batches, held_out
        self._cursor = BatchCursor(batches, self._passes)
        self.planned_steps = steps
        if steps is None and self._passes is not None and isinstance(batches, Sized):
            self.planned_steps = ceil(len(batches) * self._passes / self._accumulation)
        if isinstance(batches, Sized) and len(batches) == 0:
            self._refuse_emptiness()
        if eval_batches is not None and not self._eval_batches:
            raise ValidationError(
                "fit: eval_batches is empty (a generator can be iterated only once): there is nothing to evaluate on. "
                "Give a list, or leave it out."
            )

    @property
    def described_loss(self) -> dict[str, Any]:
        """The loss that was asked for, as plain data: a function by its name."""
        asked: Any = self._loss.get("loss_fn")
        name = asked if isinstance(asked, str) or asked is None else getattr(asked, "__name__", repr(asked))
        kwargs = {key: as_given(value) for key, value in self._loss.get("loss_kwargs", {}).items()}
        return ({} if name is None else {"loss": name}) | ({"loss_kwargs": kwargs} if kwargs else {})

    def attach(self, run: Run) -> None:
        self._run = run

    def submit(self, index: int) -> Sequence[FutureHandle[Any]] | None:
        if index == 0:
            self._cursor.check()
        batches = [BatchData.of(batch) for batch in self._cursor.take(self._accumulation)]
        if not batches:
            self._end_of_data(index)
            return None
        if index == 0:
            # `data.batches` does not know the model: rows past its context are refused before the first step
            for source in (self._batches, self._held_out):
                if isinstance(source, Batches | PoissonDraws):
                    check_fit(source.examples, getattr(self._client, "context", None))
            self._evaluate()
        training = [self._client.forward_backward(batch, **self._loss) for batch in batches]
        training.append(self._client.optim_step())
        # the step before may fail while this one is queued: its handles say so at the end
        self._newest = [*self._newest[-len(training) :], *training]
        due = self._eval_every is not None and (index + 1) % self._eval_every == 0
        if due or index + 1 == self.planned_steps:
            self._evaluated_after = index
            self._evaluate()
        return training

    def collect(self, index: int, results: Sequence[Any]) -> None:
        """Publish the alarms that a step sets off; what it measured was published by the worker."""
        losses = [result.loss for result in results if isinstance(result, ForwardBackwardResult)]
        values = {"loss": sum(losses)}  # looked at for being a number only
        for result in results:
            if isinstance(result, OptimStepResult):
                values |= {"grad_norm": result.grad_norm, "param_delta_norm": result.param_delta_norm}
                values["learning_rate"] = result.learning_rate
                last = None if self.planned_steps is None else result.step + self.planned_steps - index - 1
                run_id = self._run.run_id
                found = self._rates.observe(result.learning_rate, last)
                planned = [finding.alarm(run_id, result.step) for finding in found]
                for alarm in [*planned, *self._alarms.observe(run_id, result.step, values)]:
                    self._client.publish(alarm)

    def position(self) -> dict[str, int]:
        """Return where the batches stand."""
        return self._cursor.position()

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a place in the batches."""
        self._cursor.seek(position)

    def interrupt(self) -> None:
        """Nothing to do: all it waits for is in the queue."""

    def close(self) -> None:
        """Say at which step a loss or gradient was no number, if that is how it ended; and what moved nothing."""
        if self._rates.remark is not None:
            self._run.remark(self._rates.remark)
        if self._ended_after is not None:
            self._say_that_the_data_ended(self._ended_after)
        failed = (handle.exception() for handle in self._newest if handle.done())
        error = next((error for error in failed if isinstance(error, NonFiniteLossError)), None)
        if error is not None:
            self._client.publish(not_finite(str(error)).alarm(self._run.run_id, self._client.step + 1))

    def _end_of_data(self, index: int) -> None:
        """Evaluate after the last step, which nobody knew to be the last; refuse to have had none at all."""
        if index == 0:
            self._refuse_emptiness()
        if self._evaluated_after != index - 1:
            self._evaluate()
        if self.planned_steps is not None and index < self.planned_steps:
            self._ended_after = index

    def _say_that_the_data_ended(self, steps: int) -> None:
        """An end that comes early is no failure, but it is no end as planned either."""
        if self._passes is None or self._cursor.is_once:
            why, remedy = (
                "they can be iterated only once",
                "Give a list or data.Batches, which begin again; or",
            )
        else:
            why, remedy = (
                f"epochs={self._passes} asked for no further pass",
                "Leave epochs out, so that they begin again; or",
            )
        ended = f"The batches ended after {steps} of {self.planned_steps} steps: {why}."
        remedy = f"{remedy} ask for as many steps as there are batches for."
        self._run.remark(f"{ended} {remedy}")
        run_id, step = self._run.run_id, self._client.step
        self._client.publish(
            Alarm(run_id=run_id, step=step, name="data_ended", level="amber", message=ended, remedy=remedy)
        )

    @staticmethod
    def _refuse_emptiness() -> None:
        raise ValidationError("fit() was given no batches: there is nothing to train on.")

    def _evaluate(self) -> None:
        """Measure the held-out loss behind whatever is queued, a slice at a time: the queue has an end."""
        results: list[ForwardResult] = []
        for start in range(0, len(self._eval_batches), EVAL_SLICE):
            part = self._eval_batches[start : start + EVAL_SLICE]
            results += [
                self._run.wait(handle)
                for handle in [self._client.forward(batch, **self._loss) for batch in part]
            ]
        if results:
            # Σ wᵢ·lossᵢ / Σ wᵢ: batches with more learnt tokens count for more, as in one big batch
            weight = sum(result.weight for result in results)
            measured = [{"loss": result.loss, **result.metrics} for result in results]
            values = {
                f"eval/{name}": sum(
                    m.get(name, 0.0) * r.weight for m, r in zip(measured, results, strict=True)
                )
                / weight
                for name in measured[0]
            }
            self._client.publish(Metrics(step=self._client.step, values=values, run_id=self._run.run_id))


def summary_of(batches: Iterable[Batch] | None) -> dict[str, Any] | None:
    """Return what tells batches from others, in a few numbers: how many there are, of how many rows, in which order."""
    if batches is None:
        return None
    found: dict[str, Any] = {"kind": type(batches).__name__}
    if isinstance(batches, Sized):
        found["batches"] = len(batches)
    if isinstance(batches, Batches | PoissonDraws):
        found["rows"] = len(batches.examples)
        found["tokens"] = sum(map(len, batches.examples))
    if isinstance(batches, Batches):
        found["seed"] = batches.seed
    return found


def check_numbers(**given: int | None) -> None:
    """Refuse a count that is not a whole number above 0."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValidationError(f"fit: {name}={as_given(value)} must be a whole number, at least 1.")


def check_pairs(loss_fn: object, **given: object) -> None:
    """Refuse rows that are no pairs for a loss of pairs: two that happen to follow each other would be taken for one.

    Raises:
        ValidationError: Says what rows such a loss takes.
    """
    for name, batches in given.items():
        if loss_fn in OF_PAIRS and isinstance(batches, Batches | PoissonDraws) and batches.group == 1:
            columns = (
                "'anchor' and 'positive'" if loss_fn == "contrastive" else "'prompt', 'chosen' and 'rejected'"
            )
            raise ValidationError(
                f"fit: the loss {loss_fn!r} takes pairs, and the rows of {name} are none: give rows with {columns}."
            )


def check_batches(**given: object) -> None:
    """Refuse rows, and one batch, where a list of batches is meant.

    Raises:
        ValidationError: With the line that does it.
    """
    for name, batches in given.items():
        made = "tc.fit({})" if name == "batches" else f"tc.fit(…, {name}={{}})"
        takes = f"fit: {name} takes batches"
        from_rows = f"Make batches of them: {made.format('tc.batches(rows)')}."
        if isinstance(batches, BatchData) or (isinstance(batches, Mapping) and "input_ids" in batches):
            raise ValidationError(
                f"{takes}, and this is one batch. Give a list of it: {made.format('[batch]')}."
            )
        if isinstance(batches, Mapping):
            raise ValidationError(
                f"{takes}, and this is one row or one table, {as_given(batches)}. Give a list of rows. {from_rows}"
            )
        refuse_table(batches, f"{takes}, and this is a table of rows. {from_rows}")
        if isinstance(batches, str | os.PathLike):
            from_file = made.format(f"tc.batches({as_given(str(batches))})")
            raise ValidationError(f"{takes}, and this is a path. If it is a file of rows: {from_file}.")
        if not isinstance(batches, Iterable) or isinstance(batches, range):
            raise ValidationError(f"{takes}: a list of them, or another iterable, not {as_given(batches)}.")
        first = next(iter(batches), None) if isinstance(batches, Sequence) else None
        is_row = isinstance(first, str) or (isinstance(first, Mapping) and "input_ids" not in first)
        if is_row or (isinstance(first, list) and first and isinstance(first[0], Mapping)):
            raise ValidationError(f"{takes}, and these are rows. {from_rows}")
        if isinstance(first, list | tuple):
            raise ValidationError(
                f"{takes}, and these are lists. Of token ids: {made.format('[tn.BatchData([[…], …])]')}. "
                f"Of anything else, make rows (texts or dicts), then: {made.format('tc.batches(rows)')}."
            )
