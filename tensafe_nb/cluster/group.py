"""A group of replicas with the methods of one engine: it divides, adds up, and goes on without those that are lost.

Each replica computes its share of a batch; the group adds the shares in the order of the batch, and every replica takes
the sum and the same step: none of them is ahead of another, and the last one left still knows everything. The group
knows no processes: where a replica lives is the business of its place.
"""

import contextlib
import hashlib
import logging
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from tensafe_nb.cluster.clusters import NOT_PRIVATELY
from tensafe_nb.cluster.replica import Introduction, ReplicaStanding
from tensafe_nb.config import UNCHANGED, SamplingConfig, StepConfig, TrainingConfig
from tensafe_nb.core.engines import Tell
from tensafe_nb.engine import micro_batches
from tensafe_nb.engine.accumulation import Tally, Tick, Window
from tensafe_nb.engine.engine import seed_of_call
from tensafe_nb.engine.forward import SCORING
from tensafe_nb.engine.models.low_rank import Factors
from tensafe_nb.engine.private_step import Account
from tensafe_nb.engine.sampling import sampler
from tensafe_nb.engine.state import EngineState
from tensafe_nb.errors import ClusterError, TGTinkerError
from tensafe_nb.events import ReplicaChange, ReplicasChanged
from tensafe_nb.losses import Loss
from tensafe_nb.losses.base import Declaration
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    ForwardResult,
    FreezeReferenceResult,
    LoadAdapterResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    ReadAdapterResult,
    SampledPiece,
    SampledSequence,
    SampleResult,
    StepEstimate,
)

logger = logging.getLogger(__name__)

FOR_THE_FIRST, FOR_THE_OTHERS = 600.0, 30.0  # seconds to wait for a replica, and then for the rest
LOOK_UP = 0.5  # seconds until whoever waits for replicas looks whether anybody still waits for it
TRIES = 3  # places that do not come up, one after the other, until no more are started
Message: TypeAlias = tuple[Any, ...]  # a replica's, or ("waiting", reason) or ("lost", reason) of its place
Inbox: TypeAlias = "SimpleQueue[tuple[ReplicaPlace, Message]]"


class ReplicaPlace(Protocol):
    """Where one replica lives; its messages come to an inbox, the last of them ("lost", reason)."""

    name: str

    def send(self, call: int, method: str, arguments: Sequence[Any]) -> None:
        """Let the replica carry out a call, behind those before it."""

    def interrupt(self) -> None:
        """Let it end what it is asked at its next micro-batch or token."""

    def end(self) -> None:
        """End it, whatever it does; idempotent."""


class ReplicaPlaces(Protocol):
    """Where replicas can live."""

    def start(self, inbox: Inbox) -> ReplicaPlace:
        """Return a new place at once; the first call to it waits until there is a replica."""

    def load_arguments(self, config: TrainingConfig) -> Sequence[Any]:
        """Return what a replica is to load, as it is to be named where it lives."""


@dataclass(slots=True, eq=False)
class ReplicaCall:
    """Something that a replica is to do.

    Attributes:
        method: Of `Replica`.
        arguments: Its arguments.
        place: Whose replica is meant. None leaves it to whoever has nothing to do, and to another if that one is lost:
            it changes nothing.
        hear: Called with the pieces that it tells while it is at it.
        progress: How far it is: done, and of how much.
        ended: Whether it has.
        answer: What it has returned.
        error: What it has raised.
    """

    method: str
    arguments: Sequence[Any]
    place: ReplicaPlace | None = None
    hear: sampler.Tell | None = None
    progress: tuple[int, int] = (0, 1)
    ended: bool = False
    answer: Any = None
    error: BaseException | None = None


class EngineGroup:
    """The engine of a training client on a cluster.

    Args:
        config: What to load and how to train it.
        places: Where its replicas live.
        size: How many of them.
        tell: Told when one is lost, or there again.
        tick: Called while they start; may raise.

    Raises:
        ClusterError: No replica could be started.
        ModelLoadError: The model cannot be loaded there.
    """

    def __init__(
        self,
        config: TrainingConfig,
        places: ReplicaPlaces,
        size: int,
        tell: Tell,
        tick: Tick = lambda done, total: None,
    ) -> None:
        self._places, self._size, self._tell = places, size, tell
        self._inbox: Inbox = SimpleQueue()
        self._members: list[ReplicaPlace] = []
        self._coming: dict[ReplicaPlace, int] = {}  # its first call
        self._calls = self._failed = 0
        self.samples_drawn = 0
        self.config = config
        weakref.finalize(self, end_all, self._members, self._coming)
        self._first(config, tick)

    # who there is

    def _first(self, config: TrainingConfig, tick: Tick) -> None:
        """Start all replicas, and wait for the first, then a while for the others: a cluster may have to grow."""
        for _ in range(self._size):
            self._start()
        known: Introduction | None = None
        last: BaseException | None = None
        lack = ""
        try:
            until = time.monotonic() + FOR_THE_FIRST
            while self._coming:
                try:
                    place, message = self._inbox.get(timeout=LOOK_UP)
                except Empty:
                    tick(0, 0)
                    if time.monotonic() < until:
                        continue
                    last = ClusterError(
                        f"The cluster had no room for {len(self._coming)} of {self._size} replicas within "
                        f"{FOR_THE_FIRST if known is None else FOR_THE_OTHERS:.0f} s: close other training clients, or "
                        f"ask for fewer engines, cores or GPUs.{lack}"
                    )
                    break
                match message:
                    case ("answer", call, introduction) if self._coming.get(place) == call:
                        del self._coming[place]
                        known = known or introduction
                        if introduction.standing.digest != known.standing.digest:
                            raise ClusterError(
                                f"The replica {place.name} has loaded other weights than the rest: "
                                f"{config.model_ref!r} is not the same model on all machines."
                            )
                        self._members.append(place)
                        until = min(until, time.monotonic() + FOR_THE_OTHERS)
                    case ("error", _, error):
                        raise error
                    case ("lost", reason):
                        place.end()
                        self._coming.pop(place, None)
                        if place in self._members:  # it had come, and did not wait for the others
                            self._members.remove(place)
                        last = ClusterError(f"A replica did not come up ({place.name}): {reason}")
                    case ("waiting", reason):
                        lack = f" One that waits ({place.name}): {reason}."
                        self._tell_of(ReplicaChange.WAITING, place.name, reason)
            if known is None or not self._members:
                raise last or ClusterError("No replica was started.")
        except BaseException:
            end_all(self._members, self._coming)
            raise
        self.config, self._introduction = known.config, known
        self._standing = replace(known.standing, value=None)
        self._tell_of(ReplicaChange.STARTED, reason=None if last is None else str(last))
        for _ in range(self._size - len(self._members) - len(self._coming)):
            self._replace()

    def _start(self) -> None:
        place = self._places.start(self._inbox)
        self._calls += 1
        self._coming[place] = self._calls
        place.send(self._calls, "load", self._places.load_arguments(self.config))

    def _replace(self) -> None:
        """Start a replica in place of one that was lost, unless that has failed too often."""
        if self._failed < TRIES:
            try:
                self._start()
            except (TGTinkerError, OSError) as error:
                logger.warning("no replica could be started: %s", error)
                self._failed = TRIES
                self._tell_of(ReplicaChange.MISSING, reason=str(error))

    def _tell_of(self, change: ReplicaChange, name: str = "", reason: str | None = None) -> None:
        self._tell(
            ReplicasChanged(
                change=change, replicas=len(self._members), wanted=self._size, name=name, reason=reason
            )
        )

    def _lose(self, place: ReplicaPlace, reason: str) -> None:
        """Go on without a replica, and start another in its place."""
        place.end()
        if place in self._coming:
            del self._coming[place]
            self._failed += 1
            if self._failed == TRIES:
                self._tell_of(ReplicaChange.MISSING, place.name, reason)
            self._replace()
        elif place in self._members:
            self._members.remove(place)
            self._tell_of(ReplicaChange.LOST, place.name, reason)
            if self._members:
                self._replace()

    def _check_alive(self) -> None:
        if not self._members:
            raise ClusterError(
                "All replicas of this training client are lost, and its weights with them. Go on from its latest "
                "checkpoint: service.restore(…), with the artifact that service.list_artifacts() shows first."
            )

    def _admit(self) -> None:
        """Take in, between two operations, what has happened meanwhile, and the replicas that have come."""
        with contextlib.suppress(Empty):
            while True:  # one by one: the next may be that the one being let in is lost
                place, message = self._inbox.get_nowait()
                match message:
                    case ("lost", reason):
                        self._lose(place, reason)
                    case ("error", call, error) if self._coming.get(place) == call:
                        self._lose(place, str(error))
                    case ("answer", call, _) if self._coming.get(place) == call:
                        self._let_in(place)
                    case ("waiting", reason):
                        self._tell_of(ReplicaChange.WAITING, place.name, reason)
        self._check_alive()

    def _let_in(self, place: ReplicaPlace) -> None:
        """Let a newcomer become what the others are, down to the last bit."""
        self._check_alive()
        (state,) = self._ask([ReplicaCall("capture", (True,))])
        if place not in self._coming:  # lost meanwhile
            return
        adopt = ReplicaCall("adopt", (state,), place)
        self._carry_out([adopt])
        standing = adopt.answer
        if standing is None or not self._agrees(standing):
            self._lose(place, str(adopt.error or "it computes other numbers than the rest"))
        elif place in self._coming:
            del self._coming[place]
            self._members.append(place)
            self._failed = 0
            self._tell_of(ReplicaChange.JOINED, place.name)

    def _agrees(self, standing: ReplicaStanding) -> bool:
        return replace(standing, value=None) == self._standing

    # asking and telling

    def _carry_out(self, calls: Sequence[ReplicaCall], tick: Tick | None = None) -> None:
        """Let replicas do something; return once none of them works any more.

        Raises:
            Exception: What a call that changes nothing has raised, or the tick. What others have raised is theirs.
        """
        waiting: deque[ReplicaCall] = deque()
        running: dict[int, tuple[ReplicaPlace, ReplicaCall]] = {}
        later: list[tuple[ReplicaPlace, Message]] = []
        failure: BaseException | None = None

        def give(place: ReplicaPlace, call: ReplicaCall) -> None:
            self._calls += 1
            running[self._calls] = place, call
            place.send(self._calls, call.method, call.arguments)

        for call in calls:
            if call.place is None:
                waiting.append(call)
            else:
                give(call.place, call)
        while True:
            busy = {place for place, _ in running.values()}
            for place in self._members:
                if waiting and place not in busy:
                    give(place, waiting.popleft())
            if not running:
                break
            place, message = self._inbox.get()
            match message:
                case ("progress", number, done, total) if number in running:
                    running[number][1].progress = done, total
                case ("piece", number, piece) if number in running:
                    hear = running[number][1].hear
                    if hear is not None and failure is None:
                        hear(piece)
                case ("answer", number, answer) if number in running:
                    _, call = running.pop(number)
                    call.answer, call.ended, call.progress = answer, True, (1, 1)
                case ("error", number, error) if number in running:
                    _, call = running.pop(number)
                    call.error, call.ended = error, True
                    failure = failure or (error if call.place is None else None)
                case ("lost", reason):
                    for number in [number for number, (whose, _) in running.items() if whose is place]:
                        _, call = running.pop(number)
                        if call.place is None:
                            waiting.appendleft(call)
                    self._lose(place, reason)
                case _:  # a newcomer's: its turn comes between two operations
                    later.append((place, message))
            if failure is None:
                try:
                    if waiting:
                        self._check_alive()
                    if tick is not None:
                        tick(*progress_of(calls))
                except BaseException as error:  # noqa: BLE001  # raised again, once nobody works on it any more
                    failure = error
            if failure is not None:
                waiting.clear()
                for busy_place, _ in running.values():
                    busy_place.interrupt()
        for entry in later:
            self._inbox.put(entry)
        if failure is not None:
            raise failure

    def _ask(self, calls: Sequence[ReplicaCall], tick: Tick | None = None) -> list[Any]:
        """Return what the replicas answer, each to what it can, in the order of the questions."""
        self._carry_out(calls, tick)
        return [call.answer for call in calls]

    def _order(self, method: str, *arguments: Any, tick: Tick | None = None) -> Any:
        """Let all replicas do the same; return what they return. One that comes to another end is one no more.

        Raises:
            Exception: What all of them have raised.
        """
        calls = [ReplicaCall(method, arguments, place) for place in self._members]
        self._carry_out(calls, tick)
        self._check_alive()
        first, *others = [call for call in calls if call.ended]
        for call in others:
            if call.place in self._members and not same_end(call, first):
                self._lose(call.place, str(call.error or "it has come to other numbers than the rest"))
        if first.error is not None:
            raise first.error
        self._standing = replace(first.answer, value=None)
        return first.answer.value

    # the verbs

    def forward_backward(
        self, batch: BatchData, loss: Loss, tick: Tick, return_logprobs: bool = False
    ) -> ForwardBackwardResult:
        """Add the gradient of a batch's loss to the window; see `Engine.forward_backward`."""
        self._admit()
        try:
            shares = self._shares(batch, loss.declares)
            if len(self._members) == 1:  # nobody could take over: it may as well keep its gradient to itself
                result: ForwardBackwardResult = self._order(
                    "forward_backward", batch, loss, return_logprobs, tick=tick
                )
                return result
            # (the gradient of a share by parameter, what its losses add up to)
            parts = self._ask(
                [
                    ReplicaCall("contribute", (batch, loss, share, self._dropout_of(number), return_logprobs))
                    for number, share in enumerate(shares)
                ],
                tick,
            )
            gradients = [summed(ofs) for ofs in zip(*(gradients for gradients, _ in parts), strict=True)]
            tally = joined([tally for _, tally in parts], loss)
            logprobs, tally.logprobs = tally.logprobs, None
            grad_norm = self._order("absorb", gradients, tally, loss)
        except BaseException:
            if self._members:
                self.discard_gradients()
            raise
        labelled = int((batch.labels != IGNORE).sum())
        return ForwardBackwardResult(tally.loss, grad_norm, labelled, tally.metrics, tally.weight, logprobs)

    def optim_step(self, apply_dp_noise: bool = True, step: StepConfig = UNCHANGED) -> OptimStepResult:
        """Take one optimiser step; see `Engine.optim_step`."""
        self._admit()
        try:
            result: OptimStepResult = self._order("optim_step", step)
        except BaseException:
            if self._members:
                self.discard_gradients()  # they have: but a refusal does not say where they stand
            raise
        return result

    def discard_gradients(self) -> None:
        """Drop what has been accumulated."""
        self._order("discard_gradients")

    def forward(self, batch: BatchData, loss: Loss, return_logprobs: bool, tick: Tick) -> ForwardResult:
        """Evaluate a loss; see `Engine.forward`."""
        self._admit()
        parts = self._ask(
            [
                ReplicaCall("evaluate", (batch, loss, return_logprobs, share))
                for share in self._shares(batch, loss.declares)
            ],
            tick,
        )
        tally = joined(parts, loss)
        labelled = int((batch.labels != IGNORE).sum())
        return ForwardResult(tally.loss, labelled, tally.metrics, tally.logprobs, tally.weight)

    def compute_logprobs(
        self, batch: BatchData, temperature: float, reference: bool, tick: Tick
    ) -> LogprobsResult:
        """Score a batch's labels; see `Engine.compute_logprobs`."""
        self._admit()
        parts: list[LogprobsResult] = self._ask(
            [
                ReplicaCall("compute_logprobs", (batch, temperature, reference, share))
                for share in self._shares(batch, SCORING)
            ],
            tick,
        )
        logprobs, entropy, values = (
            cast(Any, summed([getattr(part, name) for part in parts]))
            for name in ("logprobs", "entropy", "values")
        )
        return replace(parts[0], logprobs=logprobs, entropy=entropy, values=values)

    def freeze_reference(self) -> FreezeReferenceResult:
        """Keep a copy of the trained weights as the reference; see `Engine.freeze_reference`."""
        self._admit()
        result: FreezeReferenceResult = self._order("freeze_reference")
        return result

    def sample(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        tick: Tick,
        tell: sampler.Tell | None = None,
    ) -> SampleResult:
        """Draw completions, the same as one engine draws; see `Engine.sample`."""
        self._admit()
        ((ids, turns, streams),) = self._ask([ReplicaCall("encode", (prompts, config))])
        wanted = [ReplicaCall("read", (ids, config))] if config.reads_prompts else []
        (read,) = self._ask(wanted) or [((), ())]
        seed = config.seed
        if seed is None:  # counted here: one who takes over draws from the same
            self.samples_drawn += 1
            seed = seed_of_call(self.config.seed, self.samples_drawn)
        parts = list(parts_of(len(ids), config.num_samples, len(self._members)))
        told = None if tell is None else ToldOnce(tell)
        calls = []
        for part in parts:
            arguments = (
                [ids[index] for index in part.prompts],
                [turns[index] for index in part.prompts],
                [streams[index] for index in part.prompts],
                config.replace(num_samples=len(part.samples)),
                seed,
                rows_before(ids, streams, part, config.num_samples),
                tell is not None,
            )
            hear = None if told is None else told.of(part, config.num_samples)
            calls.append(ReplicaCall("sample", arguments, hear=hear))
        drawn: dict[tuple[int, int], SampledSequence] = {}
        for part, sequences in zip(parts, self._ask(calls, tick), strict=True):
            rows = ((prompt, sample) for prompt in part.prompts for sample in part.samples)
            for (prompt, sample), sequence in zip(rows, sequences, strict=True):
                drawn[prompt, sample] = replace(sequence, prompt_index=prompt)
        return SampleResult(tuple(drawn[row] for row in sorted(drawn)), self.policy_version, *read)

    def kind_of(self, config: SamplingConfig, prompts: int) -> None:
        """Each call is drawn by itself: it is divided among the replicas already."""

    def together(self, kind: str) -> sampler.Together:
        """Refuse to: see `kind_of`."""
        raise NotImplementedError

    def call(self, *_: Any) -> sampler.SampleCall:
        """Refuse to: see `kind_of`."""
        raise NotImplementedError

    def read_adapter(self) -> ReadAdapterResult:
        """Return a copy of the adapter; see `Engine.read_adapter`."""
        self._admit()
        result: ReadAdapterResult
        (result,) = self._ask([ReplicaCall("read_adapter", ())])
        return result

    def load_adapter(
        self, tensors: Mapping[str, Array], take_over: Callable[[], None] = lambda: None
    ) -> LoadAdapterResult:
        """Take tensors in place of the adapter's own; see `Engine.load_adapter`."""
        self._admit()
        result: LoadAdapterResult = self._order("load_adapter", tensors)
        take_over()  # a group is never private: there is no account that could refuse
        return result

    def factors(self, layers: Sequence[int], modules: Sequence[str] | None) -> Factors:
        """Return the adapters of some layers; see `Engine.factors`."""
        self._admit()
        found: Factors
        (found,) = self._ask([ReplicaCall("factors", (layers, modules))])
        return found

    def estimate(self, batch_size: int | None, length: int | None) -> StepEstimate:
        """Return what a training step takes: as long as a replica's share of it does, adding up apart.

        What it says of memory is each replica's.
        """
        self._admit()
        rows = batch_size or self.config.batch_size * self.config.gradient_accumulation_steps
        found: StepEstimate
        (found,) = self._ask([ReplicaCall("estimate", (-(-rows // len(self._members)), length))])
        return replace(found, batch_size=rows, tokens_per_second=rows * found.length / found.seconds_per_step)

    def train_privately(self, account: Account, client_id: str) -> None:
        """Refuse to: `check` has said so to whoever asked."""
        raise ClusterError(NOT_PRIVATELY)

    def _shares(self, batch: BatchData, declares: Declaration) -> list[list[Array]]:
        """Divide a batch into as many shares as there are replicas, where it can be: each the pieces of one.

        The pieces are made small enough for that: of an even share, or of a row more, where that leaves less for who
        has most.
        """
        replicas, most = len(self._members), self.config.micro_batch_tokens
        overhead = self._introduction.overhead
        if replicas == 1:
            return [micro_batches.divided(batch, declares, most, overhead)]
        columns = micro_batches.columns_needed(batch.attention_mask)
        even = max(1, -(-int(columns.sum()) // replicas))
        return min(
            (
                shared_out(
                    batch,
                    micro_batches.divided(batch, declares, min(most, limit), overhead),
                    replicas,
                    overhead,
                )
                for limit in (even, even + int(columns.max(initial=1)) - 1)
            ),
            key=lambda found: found[1],
        )[0]

    def _dropout_of(self, share: int) -> int:
        """Return what seeds the dropout of a share: whoever computes it, and however often, draws the same."""
        at = self._standing
        own = f"{self.config.seed}/{at.policy_version}/{at.window.batches}/{share}".encode()
        return int.from_bytes(hashlib.blake2b(own, digest_size=7).digest(), "big")

    def close(self) -> None:
        """End the replicas; idempotent."""
        end_all(self._members, self._coming)

    # the state

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self._standing.step

    @property
    def policy_version(self) -> int:
        """Version of the weights."""
        return self._standing.policy_version

    @property
    def window(self) -> Window:
        """What has been accumulated since the last optimiser step."""
        return self._standing.window

    @property
    def resumable(self) -> bool:
        """A checkpoint takes the open window along."""
        return True

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._introduction.tokenizer

    @property
    def holder(self) -> object:
        """Whose end sets the weights' memory free, and ends the replicas."""
        return self

    @property
    def about(self) -> dict[str, Any]:
        """What there is to tell of the model, as plain data."""
        return self._introduction.about

    @property
    def fingerprint(self) -> str:
        """Of the frozen weights."""
        return self._introduction.fingerprint

    def capture(self, include_optimizer: bool) -> EngineState:
        """Return the state, from whichever replica has time."""
        self._admit()
        (state,) = self._ask([ReplicaCall("capture", (include_optimizer,))])
        state.facts["samples_drawn"] = self.samples_drawn
        return cast(EngineState, state)

    def restore(self, state: EngineState, *, keep_moments: bool = True) -> None:
        """Take over a state; see `Engine.restore`."""
        self._admit()
        self._order("restore", state, keep_moments)
        if state.facts["config"]["seed"] == self.config.seed:
            self.samples_drawn = state.facts["samples_drawn"]

    def streams(self) -> dict[str, Any]:
        """Return where the random streams stand, as plain data."""
        self._admit()
        (found,) = self._ask([ReplicaCall("streams", ())])
        return {**found, "samples_drawn": self.samples_drawn}

    def restore_streams(self, facts: Mapping[str, Any]) -> None:
        """Let the random streams go on from where `streams` found them."""
        self._admit()
        self._order("restore_streams", facts)
        self.samples_drawn = facts["samples_drawn"]


@dataclass(frozen=True, slots=True)
class SampleShare:
    """The completions that one replica draws: for these prompts, these of their samples."""

    prompts: range
    samples: range


def parts_of(prompts: int, samples: int, replicas: int) -> Iterator[SampleShare]:
    """Divide the rows of a call: by prompts, where there are enough of them, else by the samples of each."""
    by_prompts = prompts >= min(replicas, samples)
    count = prompts if by_prompts else samples
    size = -(-count // replicas)
    for start in range(0, count, size):
        own = range(start, min(start + size, count))
        yield SampleShare(own, range(samples)) if by_prompts else SampleShare(range(prompts), own)


def rows_before(
    ids: Sequence[Sequence[int]], streams: Sequence[int | None], part: SampleShare, samples: int
) -> list[int]:
    """Return, for each prompt of a part, how many rows of an equal prompt come before its first, outside the part.

    A prompt with a stream of its own has no equals.

    With them every row has the number, and so the random stream, that it has in the whole call.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    of_part: Counter[tuple[int, ...]] = Counter()
    before = []
    for index, prompt in enumerate(map(tuple, ids)):
        if streams[index] is not None:
            if index in part.prompts:
                before.append(part.samples.start)
            continue
        if index in part.prompts:
            before.append(seen[prompt] + part.samples.start - of_part[prompt])
            of_part[prompt] += len(part.samples)
        seen[prompt] += samples
    return before


class ToldOnce:
    """Passes on the pieces of sequences, each once, also where another replica draws them again."""

    def __init__(self, tell: sampler.Tell) -> None:
        self._tell = tell
        self._known: Counter[int] = Counter()  # tokens told, by sequence

    def of(self, part: SampleShare, samples: int) -> sampler.Tell:
        """Return what hears a replica that draws a part."""
        said: Counter[int] = Counter()

        def hear(piece: SampledPiece) -> None:
            prompt, sample = divmod(piece.sequence, len(part.samples))
            number = part.prompts[prompt] * samples + part.samples[sample]
            said[number] += len(piece.tokens)
            if said[number] > self._known[number]:  # the same tokens come in the same pieces
                self._known[number] = said[number]
                self._tell(replace(piece, sequence=number))

        return hear


def progress_of(calls: Sequence[ReplicaCall]) -> tuple[int, int]:
    """Return how far several calls are together, in hundredths of each."""
    return sum(100 * done // max(total, 1) for done, total in (call.progress for call in calls)), 100 * len(
        calls
    )


def same_end(one: ReplicaCall, other: ReplicaCall) -> bool:
    """Whether two replicas have come to the same end."""
    if one.error is not None or other.error is not None:
        return type(one.error) is type(other.error)
    return bool(one.answer == other.answer)


def shared_out(
    batch: BatchData, pieces: Sequence[Array], replicas: int, overhead: int
) -> tuple[list[list[Array]], int]:
    """Give each piece, the largest first, to whoever has least; return the shares, and what the largest costs.

    A piece costs its tokens, padding included, and what any piece costs.
    """
    columns = micro_batches.columns_needed(batch.attention_mask)
    costs = [len(rows) * int(columns[rows].max()) + overhead for rows in pieces]
    shares: list[list[Array]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for piece in sorted(range(len(pieces)), key=lambda piece: -costs[piece]):
        least = loads.index(min(loads))
        shares[least].append(pieces[piece])
        loads[least] += costs[piece]
    return [share for share in shares if share], max(loads)


def summed(parts: Sequence[Array | None]) -> Array | None:
    """Return the sum of what there is, in the order given; None of nothing."""
    there = [part for part in parts if part is not None]
    return reduce(np.add, there) if there else None


def joined(tallies: Sequence[Tally], loss: Loss) -> Tally:
    """Return what the shares of a batch add up to."""
    whole = Tally(loss.declares.prenormalised)
    for tally in tallies:
        whole.join(tally)
    return whole


def end_all(members: list[ReplicaPlace], coming: dict[ReplicaPlace, int]) -> None:
    """End the replicas of a group that is no more."""
    for place in [*members, *coming]:
        place.end()
    members.clear()
    coming.clear()
