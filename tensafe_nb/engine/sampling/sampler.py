"""Our own decode loop: every row has its own random stream, logprobs come for free, any token can be the last.

Calls take part together: see `Together`.

Why not `generate`: it applies top_k=50 silently, returns no logprobs, and cannot be stopped between tokens.
"""

import contextlib
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tensafe_nb.config import SamplingConfig
from tensafe_nb.data.labels import TurnEnd
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.sampling.copies import Copies, KeptCopies, copies_of
from tensafe_nb.engine.sampling.decoding import LARGE, Decoder, Rows, rows_of
from tensafe_nb.engine.sampling.drawn import FACTS, Array, Drawn, Piece
from tensafe_nb.engine.sampling.merged import merged
from tensafe_nb.engine.sampling.prefixes import PAYS_FROM, SHARED_FROM, Prefixes, Read, common
from tensafe_nb.engine.sampling.prompts import ReadPrompts
from tensafe_nb.errors import NonFiniteLossError
from tensafe_nb.protocol.results import SampledPiece, SampledSequence, SampleResult, TopLogprobs

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 8_192  # prompts and completions decoded together, which bounds the cache; more take turns
ON_ACCELERATORS = 32  # times as many: a CPU is no faster with more
FULL = 0.75  # of those, from which on a call that has begun waits for more room before more of its rows join
RACERS = 256  # tokens of a block, in which a token of a large vocabulary is drawn
MOST_GUESSES = 8  # of a single row, before they are looked at
GUESS, LOOK = 0.4, 1.1  # the time of a guess, and of a look at some, in that of a token without
ENTROPY = 3  # of what `draw` returns
BROKEN = (
    "What the model says of the next token is NaN or infinite: its weights are of no use any more. Go back to a "
    "checkpoint with load_state(), or make a new training client, and take a lower learning rate."
)
LOWEST = -1e4  # log-probability below which nothing adds to an entropy
Tick = Callable[[int, int], None]
Tell = Callable[[SampledPiece], None]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes whose character is not whole yet


class DecodesElsewhere(Protocol):
    """Says what comes next in place of a model of torch's, with its weights or about those."""

    def rows(self, prompts: Sequence[Sequence[int]], samples: Sequence[int], new_tokens: int) -> Rows:
        """Return prompts' rows, so many of each, that may grow by so many tokens."""

    def most_rows(self, longest: int) -> int:
        """Return how many rows of so many tokens are decoded together."""


@dataclass(slots=True)
class Completion:
    """One completion in the making: `Drawn` has its tokens until it ends, or somebody follows it."""

    prompt_index: int
    prompt: tuple[int, ...]
    seed: int
    turn: TurnEnd = field(default_factory=TurnEnd)
    most: int = 0  # tokens, those of the prompt included
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    entropy: float = 0.0  # sum over its tokens
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    text: str | None = None
    told: str = ""
    told_tokens: int = 0
    is_told: bool = False  # to its end

    @property
    def so_far(self) -> tuple[int, ...]:
        """The prompt, and what goes on from it."""
        return (*self.prompt, *self.tokens) if self.tokens else self.prompt

    def add(self, piece: Piece) -> None:
        """Get to know further tokens."""
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.raw_logprobs += piece.raw_logprobs

    def shown(self, model: LoadedModel, framing: Set[int] | None = None) -> str:
        """Return the text without what begins, ends or fills up a sequence; other special tokens are shown."""
        if self.text is not None:
            return self.text
        framing = framing_of(model) if framing is None else framing
        kept = [token for token in self.tokens if token not in framing and token not in self.turn.tokens]
        return str(model.tokenizer.decode(kept, skip_special_tokens=False))

    def piece(self, number: int, model: LoadedModel, stops: Sequence[str]) -> SampledPiece | None:
        """Return what was not told yet, if there is further text of it, or it has ended."""
        text = self._news(model, stops)
        if self.is_told or not (text or self.finish_reason):
            return None
        first, self.told_tokens, self.is_told = self.told_tokens, len(self.tokens), bool(self.finish_reason)
        return SampledPiece(
            number,
            text,
            tuple(self.tokens[first:]),
            tuple(self.logprobs[first:]),
            tuple(self.raw_logprobs[first:]),
            self.finish_reason,
            tuple(self.top_logprobs[first:]),
        )

    def _news(self, model: LoadedModel, stops: Sequence[str]) -> str:
        """Return the text that was not told yet, but for what may still turn out otherwise.

        That is a character whose bytes are not all there, and what may be the beginning of a string that ends it.
        """
        text = self.shown(model)
        if self.finish_reason is None:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - self._undecided(model.tokenizer, stops)]
        if not text.startswith(self.told):
            return ""
        news, self.told = text[len(self.told) :], max(self.told, text, key=len)
        return news

    def _undecided(self, tokenizer: Any, stops: Sequence[str]) -> int:
        """Return how many characters at the end are the beginning of one of some strings, at most."""
        if not stops:
            return 0
        text = self._recent(tokenizer, stops).rstrip(UNFINISHED)
        return max(
            (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )

    def _recent(self, tokenizer: Any, stops: Sequence[str]) -> str:
        """Return the last tokens' text as it is written, among which the longest of some strings would lie."""
        # a token is a byte at least: a string that the last token completed lies among so many tokens
        recent = -4 * max(map(len, stops), default=0) - 4
        return str(tokenizer.decode(self.tokens[recent:], skip_special_tokens=False))

    def finished(self, text: str) -> SampledSequence:
        return SampledSequence(
            self.prompt_index,
            text,
            self.prompt,
            tuple(self.tokens),
            tuple(self.logprobs),
            tuple(self.raw_logprobs),
            self.finish_reason or "length",
            self.seed,
            self.entropy / len(self.tokens) if self.tokens else None,
            tuple(self.top_logprobs),
        )

    def finish(self, model: LoadedModel, sampling: SamplingConfig, *, by_token: bool, last: bool) -> None:
        """Say why the completion ends with the token just drawn, if it does: for one, as that token ends it."""
        if sampling.ignore_end:
            self.finish_reason = "fixed" if last else None
        elif by_token or self._cut(model.tokenizer, self.turn.texts):
            self.finish_reason = "stop"
        elif self._cut(model.tokenizer, sampling.stop):
            self.finish_reason = "stop_string"
        elif last:
            self.finish_reason = "length"

    def _cut(self, tokenizer: Any, stops: Sequence[str]) -> bool:
        """Cut the text at the first of some strings, in which special tokens count as they are written."""
        if not stops:
            return False
        recent = self._recent(tokenizer, stops)
        if not any(stop in recent for stop in stops):
            return False
        whole = tokenizer.decode(self.tokens, skip_special_tokens=False)
        cuts = [whole.find(stop) for stop in stops if stop in whole]
        if cuts:
            self.text = whole[: min(cuts)]
            for framing in filter(None, (tokenizer.bos_token, tokenizer.pad_token)):
                self.text = self.text.replace(framing, "")
        return bool(cuts)


def framing_of(model: LoadedModel) -> Set[int]:
    """Return the tokens that begin, end or fill up a sequence."""
    return {*model.end_tokens, model.tokenizer.bos_token_id, model.tokenizer.pad_token_id}


@torch.no_grad()
def sample(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seed: int,
    tick: Tick,
    turns: Sequence[TurnEnd] = (),
    tell: Tell | None = None,
    streams: Sequence[int | None] = (),
    before: Sequence[int] = (),
    elsewhere: Callable[[], DecodesElsewhere] | None = None,
) -> list[SampledSequence]:
    """Draw completions of some prompts, beside nobody else; see `call_of`."""
    call = call_of(model, prompts, sampling, seed, tick, turns, tell, streams, before)
    with Together(model, sampling.precision, elsewhere=elsewhere) as together:
        together.add(call)
        together.run()
    return call.sequences()


def call_of(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seed: int,
    tick: Tick,
    turns: Sequence[TurnEnd] = (),
    tell: Tell | None = None,
    streams: Sequence[int | None] = (),
    before: Sequence[int] = (),
) -> "SampleCall":
    """Return the call that draws `num_samples` completions per prompt, prompt by prompt.

    Args:
        model: In evaluation mode.
        prompts: Token ids, none empty.
        sampling: How to draw; its own seed, if any, is the caller's business.
        seed: Of the call; a row's stream depends on it, on the row's prompt and on its number among equal prompts.
        tick: Called with (tokens done, tokens at most) before each token; may raise to stop.
        turns: What ends an answer to each prompt beside the model's end tokens; for none of them if empty.
        tell: Called with what there is of each sequence after each token, if asked for.
        streams: Of a prompt, what takes the place of its number among equal ones in the choice of its random stream.
        before: Of a prompt, how many rows of it or of equal ones others draw that come first; none if empty.
    """
    turns, before = turns or [TurnEnd()] * len(prompts), before or [0] * len(prompts)
    own: list[int | None] = list(streams) or [None] * len(prompts)
    return SampleCall(
        model, list(begun(prompts, sampling, seed, turns, own, before)), sampling, tick, tell, own
    )


@dataclass(slots=True, eq=False)
class SampleCall:
    """Some prompts and how to draw for them: one of those whose rows are decoded together.

    Attributes:
        model: In evaluation mode.
        rows: Its completions, prompt by prompt.
        sampling: How to draw; its own seed, if any, is the caller's business.
        tick: Called with (tokens done, tokens at most, of a row on average) before each token; may raise to stop.
        tell: Called with what there is of each sequence after each token, if asked for.
        streams: Of each prompt, the conversation that may go on from it, if it is one.
        version: Of the weights.
        precision: Of the weights.
        read: What the model says of the prompts' own tokens, if that was asked for.
        failure: Why it ended before its end.
    """

    model: LoadedModel
    rows: list[Completion]
    sampling: SamplingConfig
    tick: Tick
    tell: Tell | None = None
    streams: Sequence[int | None] = ()
    version: int = 0
    precision: str = "exact"
    read: ReadPrompts = ((), ())
    failure: BaseException | None = None
    waiting: "deque[Completion]" = field(init=False)
    ends: Set[int] = field(init=False)  # tokens that end a completion, asked for once
    done: int = 0  # tokens, counting a row that has ended as if it had them all
    luck: "Luck" = field(default_factory=lambda: Luck())

    def __post_init__(self) -> None:
        self.waiting, self.ends = deque(self.rows), self.model.end_tokens

    @property
    def ended(self) -> bool:
        return self.failure is not None or self.done == len(self.rows) * self.sampling.max_new_tokens

    @property
    def begun(self) -> int:
        """How many of its rows have begun."""
        return len(self.rows) - len(self.waiting)

    def follows(self, row: Completion) -> bool:
        """Whether somebody looks at a row after each token: who is told of it, or what may end it but a token."""
        if self.tell is not None or self.sampling.top_logprobs:
            return True
        return not self.sampling.ignore_end and bool(self.sampling.stop or row.turn.texts)

    def ends_of(self, row: Completion) -> tuple[int, ...]:
        """Return the tokens that end a row."""
        return () if self.sampling.ignore_end else tuple(self.ends | row.turn.tokens)

    def take_back(self, rows: Sequence[Completion]) -> None:
        """Let rows wait again, which have begun and are to go on."""
        self.waiting.extendleft(reversed(rows))

    def may_go_on(self, row: Completion) -> bool:
        """Whether a prompt to come may go on from where a row has ended: a conversation, if it was not cut."""
        if self.sampling.num_samples > 1 or (self.sampling.alone and not self.goes_on):
            return False
        if self.streams[row.prompt_index] is not None:
            return row.finish_reason != "length"
        return len(row.prompt) + len(row.tokens) >= SHARED_FROM

    @property
    def goes_on(self) -> bool:
        """Whether its prompts are conversations that may go on."""
        return self.sampling.num_samples == 1 and None not in self.streams

    def attempt(self, act: Callable[[], object]) -> None:
        """Do something for this call alone; whatever is raised ends it, and no other."""
        try:
            act()
        except BaseException as error:  # noqa: BLE001  # it is raised again by `sequences`
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error

    def look_up(self) -> None:
        self.attempt(lambda: self.tick(self.done // len(self.rows), self.sampling.max_new_tokens))

    def sequences(self) -> list[SampledSequence]:
        """Return what was drawn.

        Raises:
            BaseException: What has ended it.
        """
        if self.failure is not None:
            raise self.failure
        texts: dict[tuple[Any, ...], str] = {}  # equal completions of small models are many
        sequences, framing = [], framing_of(self.model)
        for row in self.rows:
            drawn = row.turn.tokens, tuple(row.tokens)
            text = row.text if row.text is not None else texts.get(drawn)
            if text is None:
                text = texts[drawn] = row.shown(self.model, framing)
            sequences.append(row.finished(text))
        return sequences

    def result(self) -> SampleResult:
        """Return what was drawn, and what was read; see `sequences`."""
        return SampleResult(tuple(self.sequences()), self.version, *self.read, precision=self.precision)


class Together:
    """Calls whose rows are decoded together, a token of all of them at a time; others join between two tokens.

    Continuous batching (Yu et al. 2022, Orca): a row that ends leaves, and its place is free for one that waits. Each
    row draws with its own settings and its own random numbers, so that its tokens do not depend on who is beside it.

    Args:
        model: In evaluation mode, used by nobody else until `close`.
        precision: Of the weights to draw with; the same for all calls.
        kept: What was read before, and takes what is read; None keeps nothing.
        copied: Brings and takes copies of the weights.
        known: Conversations as the call before has left them.
        turns: Takes conversations, in place of `kept`.
        elsewhere: Brings what decodes in place of the model, from nothing that was read before.
    """

    def __init__(
        self,
        model: LoadedModel,
        precision: str = "exact",
        kept: Prefixes | None = None,
        copied: KeptCopies | None = None,
        known: Prefixes | None = None,
        turns: Prefixes | None = None,
        elsewhere: Callable[[], DecodesElsewhere] | None = None,
    ) -> None:
        self._model, self._precision, self._elsewhere = model, precision, elsewhere
        self._kept, self._known, self._turns = kept, known, turns or kept
        self._copied = copied or KeptCopies(0)
        self._most = TOKENS_AT_ONCE * (1 if model.device.type == "cpu" else ON_ACCELERATORS)
        self.calls: list[SampleCall] = []
        self._apart: list[SampleCall] = []  # a token of theirs has failed: the first of them draws alone
        self._state: Rows | None = None
        self._drawn, self._rows = Drawn(), list[Completion]()  # of the state, in its order
        self._owners: list[SampleCall] = []  # of the rows, by the number that `Drawn` knows
        self._alike: list[tuple[SamplingConfig, Array | None]] = []  # how to draw, and for which rows
        # behind the last token of a single row; the state has logits after each
        self._guessed: list[int] = []
        self._merging = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the model back as it was."""
        self._empty()
        self._merging.close()

    def _empty(self) -> None:
        self._state, self._guessed = None, []
        self._drawn, self._rows, self._owners, self._alike = Drawn(), [], [], []

    def add(self, call: SampleCall) -> None:
        """Let a call take part from the next token on."""
        self.calls.append(call)

    def run(
        self,
        newcomer: Callable[[], SampleCall | None] = lambda: None,
        ended: Callable[[SampleCall], object] = lambda _: None,
    ) -> None:
        """Draw until nobody takes part any more.

        Args:
            newcomer: Asked before each token for calls to join, until there is none.
            ended: Told of each call that has ended, or failed.
        """
        while True:
            while (call := newcomer()) is not None:
                self.add(call)
            if not self.calls:
                return
            for call in self.step():
                ended(call)

    @torch.no_grad()
    def step(self) -> list[SampleCall]:
        """Draw a token for each row; return the calls that have ended."""
        for call in self.calls:
            call.look_up()
        self._leave()
        if any(not call.ended for call in self.calls):
            try:
                self._go_on()
            except BaseException as error:  # noqa: BLE001  # nobody can say whose it was
                self._part(error)
            self._leave()
        ended = [call for call in self.calls if call.ended]
        self.calls = [call for call in self.calls if not call.ended]
        return ended

    def _go_on(self) -> None:
        newcomers = self._next_in()
        if self._state is not None:
            self._feed(alone=not newcomers)
        if newcomers:
            self._let_in(newcomers)
        state = self._state
        if state is None:
            return
        if self._guessed and isinstance(state, Decoder):
            self._draw_guessed(state)
        else:
            self._draw(state.logits)
        self._keep_ended()

    def _part(self, error: BaseException) -> None:
        """Let calls go on one after the other, from where they were, as a token of all of them has failed.

        Whoever is at fault fails again, by itself; and so does a single call at once.
        """
        inside = list(dict.fromkeys(self._owners))
        if len(inside) < 2 or not isinstance(error, Exception):
            for call in inside or self.calls:
                call.fail(error)
            return
        logger.warning(
            "a token of %d samples that were drawn together failed, and each of them goes on by itself: %s",
            len(inside),
            error,
        )
        everyone = np.arange(len(self._rows))
        for row, piece in zip(self._rows, self._drawn.news(everyone), strict=True):
            row.add(piece)
        self._write_entropy(everyone)
        for call in inside:
            call.take_back([row for n, row in self._of(call) if not row.finish_reason])
        self._empty()
        self._apart = inside

    def _taking_part(self) -> list[SampleCall]:
        """Return the calls that draw: all of them, or the one whose turn it is to draw alone."""
        self._apart = [call for call in self._apart if not call.ended]
        return self._apart[:1] or [call for call in self.calls if not call.ended]

    def _leave(self) -> None:
        """Let go of rows that have ended, or whose call has."""
        gone = self._drawn.facts["ended"]
        ended = [number for number, call in enumerate(self._owners) if call.ended]
        if ended:
            gone = gone | np.isin(self._drawn.facts["owner"], ended)
        if not gone.any():
            return
        staying = np.flatnonzero(~gone)
        if not len(staying):
            self._empty()
            return
        assert self._state is not None
        self._state.keep(torch.from_numpy(staying).to(self._model.device))
        self._drawn.keep(staying)
        self._rows = [self._rows[n] for n in staying.tolist()]
        owners, self._drawn.facts["owner"] = np.unique(self._drawn.facts["owner"], return_inverse=True)
        self._owners = [self._owners[number] for number in owners]
        self._look_whose()

    def _look_whose(self) -> None:
        """See which rows draw with the same settings, and are drawn at once."""
        kinds: dict[tuple[float, ...], list[int]] = {}
        for number, call in enumerate(self._owners):
            own = call.sampling
            kinds.setdefault((own.temperature, own.top_p, own.top_k), []).append(number)
        owner = self._drawn.facts["owner"]
        self._alike = [
            (
                self._owners[numbers[0]].sampling,
                np.flatnonzero(np.isin(owner, numbers)) if len(kinds) > 1 else None,
            )
            for numbers in kinds.values()
        ]

    def _of(self, call: SampleCall) -> list[tuple[int, Completion]]:
        """Return the rows of a call, with their places."""
        places = np.flatnonzero(self._drawn.facts["owner"] == self._owners.index(call)).tolist()
        return [(n, self._rows[n]) for n in places]

    # who joins

    def _next_in(self) -> list[tuple[SampleCall, Completion]]:
        """Return the rows for which there is room: of the call that has fewest in it, row by row.

        A single row is not worth a pass through the model of its own, unless its call has none yet.
        """
        calls = [call for call in self._taking_part() if call.waiting]
        if not calls or (self._state is not None and not self._state.joinable):
            return []
        facts, chosen = self._drawn.facts, list[tuple[SampleCall, Completion]]()
        count, longest = len(facts), int(facts["longest"].max(initial=0))
        if count * longest > FULL * self._most and all(call.begun for call in calls):
            return []
        inside = Counter(id(self._owners[number]) for number in facts["owner"].tolist())
        while calls:
            call = calls[0] if len(calls) == 1 else min(calls, key=lambda call: inside[id(call)])
            row = call.waiting[0]
            longest = max(longest, row.most)
            if count and not self._has_room(count + 1, longest):
                break
            chosen.append((call, call.waiting.popleft()))
            inside[id(call)] += 1
            count += 1
            if not call.waiting:
                calls = [call for call in calls if call.waiting]
        return chosen

    def _has_room(self, rows: int, longest: int) -> bool:
        if self._elsewhere is not None:
            return rows <= self._elsewhere().most_rows(longest)
        return rows * longest <= self._most

    def _let_in(self, newcomers: list[tuple[SampleCall, Completion]]) -> None:
        """Read newcomers' prompts, and let their rows join; where that fails, call by call."""
        try:
            self._join(newcomers)
        except BaseException as error:  # noqa: BLE001  # a lack of memory, for one
            calls = list(dict.fromkeys(call for call, _ in newcomers))
            if len(calls) == 1:
                calls[0].fail(error)
            for call in calls if len(calls) > 1 else ():
                call.attempt(partial(self._join, [each for each in newcomers if each[0] is call]))

    def _join(self, newcomers: list[tuple[SampleCall, Completion]]) -> None:
        of_prompts: dict[tuple[int, ...], list[tuple[SampleCall, Completion]]] = {}
        for call, row in newcomers:
            of_prompts.setdefault(row.so_far, []).append((call, row))
        prompts, room = list(of_prompts), max(row.most - len(row.so_far) for _, row in newcomers)
        samples = list(map(len, of_prompts.values()))
        if self._elsewhere is None:
            copies = self._prepare(len(newcomers), room)
            before = None if self._known is None else self._known.take(prompts)
            if before is None and self._kept is not None:
                before = self._beginnings(self._kept, prompts, copies)
            state = rows_of(self._model, prompts, samples, room, before, copies)
            if not newcomers[0][0].sampling.alone:
                self._keep_long(prompts, samples, state)
        else:
            state = self._elsewhere().rows(prompts, samples, room)
        if self._state is None:
            self._state = state
        else:
            self._state.join(state)
        self._take_in([each for rows in of_prompts.values() for each in rows])

    def _take_in(self, joining: Sequence[tuple[SampleCall, Completion]]) -> None:
        """Make room for what is going to be drawn for rows that have joined."""
        owners = {id(call): number for number, call in enumerate(self._owners)}
        for call, _ in joining:
            if id(call) not in owners:
                owners[id(call)] = len(self._owners)
                self._owners.append(call)
        facts = np.zeros(len(joining), FACTS)
        facts["owner"] = [owners[id(call)] for call, _ in joining]
        facts["seed"] = [row.seed for _, row in joining]
        facts["first"] = [len(row.tokens) for _, row in joining]
        facts["limit"] = [call.sampling.max_new_tokens for call, _ in joining]
        facts["longest"] = [row.most for _, row in joining]
        facts["entropy"] = [row.entropy for _, row in joining]
        facts["followed"] = [call.follows(row) for call, row in joining]
        self._drawn.join(facts, [call.ends_of(row) for call, row in joining])
        self._rows += [row for _, row in joining]
        self._look_whose()

    def _keep_long(self, prompts: Sequence[tuple[int, ...]], samples: Sequence[int], state: Rows) -> None:
        """Keep long prompts as soon as they are read: others that begin so may come before an answer has ended."""
        long = [n for n, prompt in enumerate(prompts) if len(prompt) >= PAYS_FROM]
        if self._kept is None or not long:
            return
        read = state.read(torch.tensor([sum(samples[:n]) for n in long], device=self._model.device))
        if read is not None:
            self._kept.keep([prompts[n] for n in long], read)

    def _beginnings(
        self, kept: Prefixes, prompts: Sequence[tuple[int, ...]], copies: Copies | None
    ) -> Read | None:
        """Return what is known of how prompts begin; a long beginning that all of them share is read first, once."""
        shared = min(prompts)[: common(min(prompts), max(prompts))]
        pays = len(shared) >= SHARED_FROM and len(shared) * (len(prompts) - 1) >= PAYS_FROM
        if pays and kept.known(shared) < len(shared) - 1:
            once = rows_of(self._model, [shared], [1], 0, kept.take([shared]), copies)
            read = once.read(torch.tensor([0], device=self._model.device))
            if read is not None:
                kept.keep([shared], read)
        return kept.take(prompts)

    def _prepare(self, joining: int, room: int) -> Copies | None:
        """Return copies of the weights to go on with; without any, let the model compute with merged ones."""
        waves = 1 + sum(len(call.waiting) for call in self._taking_part()) // (joining + len(self._rows))
        decoded, together = room * waves, joining + len(self._rows)
        alone = any(call.sampling.alone for call in self._taking_part())
        copies = copies_of(self._model, decoded, together, self._copied.copies, self._precision, alone=alone)
        if copies is not None or self._state is None:
            self._merging.close()
        if copies is not None:
            self._copied.copies = copies
        elif self._state is None:
            self._merging.enter_context(merged(self._model, decoded, together))
        return copies

    # a token

    def _feed(self, *, alone: bool) -> None:
        """Let the model read the tokens drawn last; a single row's, with guesses of what comes next.

        Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), in which draft and model draw with the same
        random numbers: what is drawn at a position depends on its logits alone, so that a guess is kept where it is the
        very token that would have been drawn, and the row is the one that decoding token by token gives.
        """
        assert self._state is not None
        state = self._state
        if not (alone and isinstance(state, Decoder) and state.guesses):
            state.feed(self._drawn.last())
            return
        call, facts, lanes = self._owners[0], self._drawn.facts, lanes_of(state.logits)
        token, (first,) = int(self._drawn.last()[0]), self._drawn.positions.tolist()
        for position in range(first, min(first + call.luck.worth, call.sampling.max_new_tokens - 1)):
            logits = state.guess(self._guessed[-1] if self._guessed else token)
            uniforms = uniforms_at(facts["seed"], np.array([position]), lanes)
            self._guessed += draw(logits, call.sampling, uniforms)[0].tolist()
        state.verify(len(self._guessed), [token, *self._guessed])

    def _draw(self, logits: Tensor) -> None:
        """Draw a token for each row, at once for those that draw with the same settings."""
        uniforms = uniforms_at(self._drawn.facts["seed"], self._drawn.positions, lanes_of(logits))
        drawn: list[Array] = []
        for sampling, places in self._alike:
            if places is None:
                drawn = [part.cpu().numpy() for part in draw(logits, sampling, uniforms)]
                break
            where = torch.from_numpy(places)
            parts = draw(logits[where.to(logits.device)], sampling, uniforms[where])
            found = [part.cpu().numpy() for part in parts]
            drawn = drawn or [np.empty(len(logits), part.dtype) for part in found]
            for whole, part in zip(drawn, found, strict=True):
                whole[places] = part
        self._add(drawn, logits)

    def _draw_guessed(self, state: Decoder) -> None:
        """Draw for a single row behind each guess, as long as the guesses are what is drawn."""
        (call,) = self._owners
        guessed, self._guessed = self._guessed, []
        places = self._drawn.positions + np.arange(len(guessed) + 1)
        uniforms = uniforms_at(self._drawn.facts["seed"], places, lanes_of(state.logits))
        drawn = [part.cpu().numpy() for part in draw(state.logits, call.sampling, uniforms)]
        for index in range(len(places)):
            if index:
                call.look_up()
            here = slice(index, index + 1)
            self._add([part[here] for part in drawn], state.logits[here])
            if call.ended or index == len(guessed) or drawn[0][index] != guessed[index]:
                break
        call.luck.add(index, len(guessed))
        state.forget(len(guessed) - index)

    def _add(self, drawn: Sequence[Array], logits: Tensor) -> None:
        """Append to each row the token that was drawn for it from its logits, and say whether it ends with it."""
        facts = self._drawn.facts
        broken = ~np.isfinite(drawn[ENTROPY])
        for number in np.unique(facts["owner"][broken]).tolist() if broken.any() else ():
            self._owners[number].fail(NonFiniteLossError(BROKEN))
        likeliest = self._likeliest(logits)
        by_token, last = self._drawn.add(drawn)
        for call, rows in zip(self._owners, np.bincount(facts["owner"]).tolist(), strict=True):
            call.done += rows
        looked_at = np.flatnonzero(by_token | last | facts["followed"])
        for n, piece in zip(looked_at.tolist(), self._drawn.news(looked_at), strict=True):
            row, call = self._rows[n], self._owners[facts["owner"][n]]
            row.add(piece)
            if n in likeliest:
                row.top_logprobs.append(likeliest[n][: call.sampling.top_logprobs])
            try:
                row.finish(self._model, call.sampling, by_token=bool(by_token[n]), last=bool(last[n]))
            except Exception as error:  # noqa: BLE001  # its text cannot be decoded, for one
                call.fail(error)
            if row.finish_reason is not None:
                facts["ended"][n] = True
                call.done += call.sampling.max_new_tokens - len(row.tokens)
        self._write_entropy(looked_at)
        for call in self._owners:
            self._tell(call)

    def _write_entropy(self, places: Array) -> None:
        for n, entropy in zip(places.tolist(), self._drawn.facts["entropy"][places].tolist(), strict=True):
            self._rows[n].entropy = entropy

    def _likeliest(self, logits: Tensor) -> dict[int, TopLogprobs]:
        """Return the most likely tokens of those rows, by place, whose call asks for them."""
        asking = [number for number, call in enumerate(self._owners) if call.sampling.top_logprobs]
        if not asking:
            return {}
        places = np.flatnonzero(np.isin(self._drawn.facts["owner"], asking))
        wanted = max(self._owners[number].sampling.top_logprobs for number in asking)
        of_these = logits[torch.from_numpy(places).to(logits.device)]
        return dict(zip(places.tolist(), likeliest_of(of_these, wanted), strict=True))

    def _tell(self, call: SampleCall) -> None:
        if call.tell is not None and call.failure is None:
            call.attempt(partial(tell_news, self._model, call.sampling, call.rows, call.tell))

    def _keep_ended(self) -> None:
        """Keep what was read of the rows that have just ended, where something may go on from it."""
        if self._turns is None or self._state is None:
            return
        facts = self._drawn.facts
        ended = [
            n
            for n in np.flatnonzero(facts["ended"]).tolist()
            if self._owners[facts["owner"][n]].may_go_on(self._rows[n])
        ]
        read = self._state.read(torch.tensor(ended, device=self._model.device)) if ended else None
        if read is not None:  # the token that was drawn last nobody has read
            self._turns.keep([self._rows[n].so_far[:-1] for n in ended], read)


class Luck:
    """How often guesses come true, and how many are worth making before they are looked at.

    Of n guesses, each true with probability p, 1 + p + … + pⁿ tokens come, in the time of n guesses and a look.
    """

    def __init__(self) -> None:
        self.true, self.made = 8.0, 10.0  # before anything is known

    def add(self, true: int, made: int) -> None:
        """Count guesses, of which the one after the first false one says nothing."""
        self.true += true
        self.made += min(true + 1, made)

    @property
    def worth(self) -> int:
        """How many to make."""
        p = self.true / self.made
        return max(
            range(MOST_GUESSES + 1),
            key=lambda n: sum(p**k for k in range(n + 1)) / (GUESS * n + (LOOK if n else 1)),
        )


def tell_news(model: LoadedModel, sampling: SamplingConfig, rows: Sequence[Completion], tell: Tell) -> None:
    """Tell what there is of each row that was not told yet."""
    for number, row in enumerate(rows):
        ends = () if sampling.ignore_end else (*sampling.stop, *row.turn.texts)
        piece = row.piece(number, model, ends)
        if piece is not None:
            tell(piece)


def draw(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens (R,), their logprobs under the distribution drawn from, their raw logprobs, and its entropy.

    Args:
        logits: (R, V).
        sampling: How to draw.
        uniforms: (R, L) as many as `lanes_of` the logits says.

    The entropy −Σ p log p over the vocabulary is exact, and costs one more product with the p that are there already.
    """
    raw = torch.log_softmax(logits, -1)
    if sampling.temperature == 0:
        tokens, certain = logits.argmax(-1), torch.zeros_like(raw[:, 0])
        return tokens, certain, _pick(raw, tokens), certain
    plain = sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k == 0
    logprobs = raw if plain else torch.log_softmax(truncated(logits / sampling.temperature, sampling), -1)
    probabilities = logprobs.exp()
    # What was cut has p = 0, and 0 · −∞ is no number. In place: a tensor as large as these takes longer to get than to
    # fill, since the system hands out its pages one by one.
    entropy = -torch.linalg.vecdot(probabilities, logprobs.clamp_(min=LOWEST))
    tokens = pick(probabilities, uniforms.to(logits.device))
    return tokens, _pick(logprobs, tokens), _pick(raw, tokens), entropy


def pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return a token for each row of (R, V) probabilities, as its own uniforms (R, L) want it.

    Of a small vocabulary by inverse CDF. Of a large one by a race: with p / e, e = −log u, a block of the vocabulary
    wins, then a token of it (Gumbel-max, in two rounds). A little more for one token moves the bounds of all that come
    after it in a running sum, but hardly any winner: two distributions that are alike draw the same token.
    """
    if uniforms.shape[1] == 1:
        cumulative = probabilities.double().cumsum(-1)
        target = uniforms * cumulative[:, -1:]
        found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        return found.clamp(max=probabilities.shape[-1] - 1)
    more = -probabilities.shape[-1] % RACERS
    whole = F.pad(probabilities, (0, more)) if more else probabilities
    blocks = whole.view(len(whole), -1, RACERS)  # (R, B, b)
    waits = -uniforms.clamp(min=torch.finfo(torch.float64).tiny).log()
    won = (blocks.sum(-1) / waits[:, RACERS:]).argmax(-1)  # (R,)
    within = blocks[torch.arange(len(won), device=won.device), won]
    token: Tensor = won * RACERS + (within / waits[:, :RACERS]).argmax(-1)
    return token


def lanes_of(logits: Tensor) -> int:
    """Return how many uniforms a token takes: one, or one for each racer of two rounds."""
    vocabulary = logits.shape[-1]
    return 1 if vocabulary < LARGE else RACERS + -(-vocabulary // RACERS)


def likeliest_of(logits: Tensor, count: int) -> Iterator[TopLogprobs]:
    """Yield for each row of logits (R, V) its most likely tokens, with their logprobs at temperature 1."""
    values, tokens = torch.log_softmax(logits, -1).topk(min(count, logits.shape[-1]))
    for row in zip(tokens.tolist(), values.tolist(), strict=True):
        yield tuple(zip(*row, strict=True))


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def truncated(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Set to -inf what top_k and top_p (Holtzman et al. 2019, arXiv:1904.09751) leave out."""
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = (before >= sampling.top_p).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def begun(
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seed: int,
    turns: Sequence[TurnEnd],
    streams: Sequence[int | None],
    before: Sequence[int],
) -> Iterator[Completion]:
    """Yield the completions to be made, each with the seed of its own random stream."""
    seen: Counter[tuple[int, ...]] = Counter()
    each = zip(map(tuple, prompts), turns, streams, before, strict=True)
    for index, (prompt, turn, stream, first) in enumerate(each):
        most = len(prompt) + sampling.max_new_tokens
        of_prompt = hashlib.blake2b(f"({seed}, {prompt}, ".encode(), digest_size=7)
        equal = first + seen[prompt]
        for number in range(sampling.num_samples):
            own = of_prompt.copy()
            own.update(f"{equal + number if stream is None else (stream, first + number)})".encode())
            yield Completion(index, prompt, int.from_bytes(own.digest(), "big"), turn, most)
        seen[prompt] += sampling.num_samples * (stream is None)


def uniforms_at(seeds: Array, positions: Array, lanes: int) -> Tensor:
    """Return uniforms in [0, 1), (R, lanes), of rows' positions: SplitMix64 (Steele et al. 2014) of their seeds."""
    with np.errstate(over="ignore"):
        places = positions.astype(np.uint64)[:, None] * np.uint64(lanes) + np.arange(lanes, dtype=np.uint64)
        state: Array = seeds[:, None] + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    # the upper 53 bits, which a float64 holds exactly
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)
