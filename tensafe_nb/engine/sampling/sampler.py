"""Our own decode loop: every row has its own random stream, logprobs come for free, any token can be the last.

Why not `generate`: it applies top_k=50 silently, returns no logprobs, and cannot be stopped between tokens.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tensafe_nb.config import SamplingConfig
from tensafe_nb.data.labels import TurnEnd
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.sampling.copies import Copies, KeptCopies, copies_of
from tensafe_nb.engine.sampling.decoding import LARGE, Decoder, Rows, rows_of
from tensafe_nb.engine.sampling.merged import merged
from tensafe_nb.engine.sampling.prefixes import Prefixes, Read
from tensafe_nb.protocol.results import SampledPiece, SampledSequence, TopLogprobs

TOKENS_AT_ONCE = 8_192  # prompts and completions decoded together, which bounds the cache; more take turns
ON_ACCELERATORS = 32  # times as many: a CPU is no faster with more
RACERS = 256  # tokens of a block, in which a token of a large vocabulary is drawn
MOST_GUESSES = 8  # of a single row, before they are looked at
GUESS, LOOK = 0.25, 1.2  # the time of a guess, and of a look at some, in that of a token without
LOWEST = -1e4  # log-probability below which nothing adds to an entropy
Tick = Callable[[int, int], None]
Tell = Callable[[SampledPiece], None]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes whose character is not whole yet


@dataclass(slots=True)
class Completion:
    """One completion in the making."""

    prompt_index: int
    prompt: tuple[int, ...]
    seed: int
    turn: TurnEnd = field(default_factory=TurnEnd)
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

    def shown(self, model: LoadedModel) -> str:
        """Return the text without what begins, ends or fills up a sequence; other special tokens are shown."""
        if self.text is not None:
            return self.text
        tokenizer = model.tokenizer
        framing = {*model.end_tokens, *self.turn.tokens, tokenizer.bos_token_id, tokenizer.pad_token_id}
        kept = [token for token in self.tokens if token not in framing]
        return str(tokenizer.decode(kept, skip_special_tokens=False))

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

    def finished(self, model: LoadedModel) -> SampledSequence:
        return SampledSequence(
            self.prompt_index,
            self.shown(model),
            self.prompt,
            tuple(self.tokens),
            tuple(self.logprobs),
            tuple(self.raw_logprobs),
            self.finish_reason or "length",
            self.seed,
            self.entropy / len(self.tokens) if self.tokens else None,
            tuple(self.top_logprobs),
        )

    def finish(self, model: LoadedModel, sampling: SamplingConfig, *, last: bool) -> None:
        """Say why the completion ends with the token just drawn, if it does."""
        if sampling.ignore_end:
            self.finish_reason = "fixed" if last else None
        elif (
            self.tokens[-1] in model.end_tokens
            or self.tokens[-1] in self.turn.tokens
            or self._cut(model.tokenizer, self.turn.texts)
        ):
            self.finish_reason = "stop"
        elif self._cut(model.tokenizer, sampling.stop):
            self.finish_reason = "stop_string"
        elif last:
            self.finish_reason = "length"

    def _cut(self, tokenizer: Any, stops: Sequence[str]) -> bool:
        """Cut the text at the first of some strings, in which special tokens count as they are written."""
        recent = self._recent(tokenizer, stops) if stops else ""
        if not any(stop in recent for stop in stops):
            return False
        whole = tokenizer.decode(self.tokens, skip_special_tokens=False)
        cuts = [whole.find(stop) for stop in stops if stop in whole]
        if cuts:
            self.text = whole[: min(cuts)]
            for framing in filter(None, (tokenizer.bos_token, tokenizer.pad_token)):
                self.text = self.text.replace(framing, "")
        return bool(cuts)


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
    known: Prefixes | None = None,
    kept: Prefixes | None = None,
    copied: KeptCopies | None = None,
) -> list[SampledSequence]:
    """Draw `num_samples` completions per prompt, prompt by prompt.

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
        known: What was read already of prompts that go on; used if it is of all of them.
        kept: Takes what is read of the prompts and drawn for them, by their streams.
        copied: Brings and takes copies of the weights.
    """
    turns, before = turns or [TurnEnd()] * len(prompts), before or [0] * len(prompts)
    own: list[int | None] = list(streams) or [None] * len(prompts)
    rows = list(begun(prompts, sampling.num_samples, seed, turns, own, before))
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    most = TOKENS_AT_ONCE * (1 if model.device.type == "cpu" else ON_ACCELERATORS)
    samples = 1
    if sampling.num_samples > 1 or known is None or not all(map(known.has_begun, own, prompts)):
        known = None
        prompts, samples = read_once(prompts, sampling.num_samples, most // longest)
    at_once = max(1, most // (longest * samples))  # prompts
    starts = range(0, len(prompts), at_once)
    decoded, together = sampling.max_new_tokens * len(starts), min(len(prompts), at_once) * samples
    copies = copies_of(model, decoded, together, copied.copies if copied else None, sampling.precision)
    if copied is not None and copies is not None:
        copied.copies = copies
    with merged(model, decoded, together) if copies is None else contextlib.nullcontext():
        for number, start in enumerate(starts):

            def of_all(done: int, total: int, before: int = number) -> None:
                tick(before * total + done, len(starts) * total)

            decode(
                model,
                prompts[start : start + at_once],
                samples,
                rows[start * samples : (start + at_once) * samples],
                sampling,
                of_all,
                (lambda: None) if tell is None else partial(tell_news, model, sampling, rows, tell),
                None if known is None else known.take(own[start : start + at_once]),
                None if kept is None else partial(keep_rows, kept, own),
                copies,
            )
    return [row.finished(model) for row in rows]


def decode(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    samples: int,
    rows: list[Completion],
    sampling: SamplingConfig,
    tick: Tick,
    after_token: Callable[[], None] = lambda: None,
    before: Read | None = None,
    keep: Callable[[Sequence[Completion], Read], None] | None = None,
    copies: Copies | None = None,
) -> None:
    """Fill in the rows of some prompts, `samples` of each, all of them token by token together."""
    active, most = list(rows), sampling.max_new_tokens
    state = rows_of(model, prompts, samples, most, before, copies)
    if isinstance(state, Decoder) and state.guesses:
        decode_guessing(model, state, rows[0], sampling, tick, after_token)
        keep_ended(state, rows, keep)
        return
    for position in range(most):
        tick(position, most)
        drawn = draw(state.logits, sampling, uniforms_at(active, [position], lanes_of(state.logits)))
        append(model, sampling, active, drawn, state.logits)
        after_token()
        keep_ended(state, active, keep)
        going = [index for index, row in enumerate(active) if row.finish_reason is None]
        if not going:
            break
        tokens = drawn[0]
        if len(going) < len(active):
            active = [active[index] for index in going]
            state.keep(torch.tensor(going, device=model.device))
            tokens = tokens[torch.tensor(going, device=tokens.device)]
        state.feed(tokens)


def decode_guessing(
    model: LoadedModel,
    state: Decoder,
    row: Completion,
    sampling: SamplingConfig,
    tick: Tick,
    after_token: Callable[[], None],
) -> None:
    """Fill in a single row: rough weights guess some tokens, the exact ones look at all of them at once.

    Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), in which draft and model draw with the same random
    numbers: what is drawn at a position depends on its logits alone, so that a guess is kept where it is the very token
    that would have been drawn, and the row is the one that decoding token by token gives.
    """
    most, luck = sampling.max_new_tokens, Luck()
    guessed: list[int] = []
    while True:
        first = len(row.tokens)
        ahead, lanes = range(first, first + len(guessed) + 1), lanes_of(state.logits)
        drawn = draw(state.logits, sampling, uniforms_at([row], ahead, lanes))
        for index, position in enumerate(ahead):
            tick(position, most)
            append(
                model,
                sampling,
                [row],
                [part[index : index + 1] for part in drawn],
                state.logits[index : index + 1],
            )
            after_token()
            if index == len(guessed) or row.finish_reason or row.tokens[-1] != guessed[index]:
                break
        luck.add(index, len(guessed))
        state.forget(len(guessed) - index)
        if row.finish_reason:
            return
        token, guessed = row.tokens[-1], []
        for position in range(len(row.tokens), min(len(row.tokens) + luck.worth, most - 1)):
            logits = state.guess(guessed[-1] if guessed else token)
            guessed += draw(logits, sampling, uniforms_at([row], [position], lanes))[0].tolist()
        state.verify(len(guessed), [token, *guessed])


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


def append(
    model: LoadedModel,
    sampling: SamplingConfig,
    rows: Sequence[Completion],
    drawn: Sequence[Tensor],
    logits: Tensor,
) -> None:
    """Append to each row the token that was drawn for it from its logits, and say whether it ends with it."""
    for row, token, logprob, raw_logprob, nats in zip(rows, *(part.tolist() for part in drawn), strict=True):
        row.tokens.append(token)
        row.logprobs.append(logprob)
        row.raw_logprobs.append(raw_logprob)
        row.entropy += nats
        row.finish(model, sampling, last=len(row.tokens) == sampling.max_new_tokens)
    if sampling.top_logprobs:
        for row, likeliest in zip(rows, likeliest_of(logits, sampling.top_logprobs), strict=True):
            row.top_logprobs.append(likeliest)


def keep_ended(
    state: Rows, rows: Sequence[Completion], keep: Callable[[Sequence[Completion], Read], None] | None
) -> None:
    """Keep what was read of the rows that have just ended; of what was cut nothing goes on."""
    ended = [index for index, row in enumerate(rows) if row.finish_reason not in (None, "length")]
    if keep is not None and ended:
        read = state.read(torch.tensor(ended, device=state.logits.device))
        if read is not None:
            keep([rows[index] for index in ended], read)


def keep_rows(kept: Prefixes, streams: Sequence[int | None], rows: Sequence[Completion], read: Read) -> None:
    """Keep rows under their streams: the prompt and all that was drawn, but the last token, which nobody has read."""
    tokens = [(*row.prompt, *row.tokens[:-1]) for row in rows]
    kept.keep([streams[row.prompt_index] for row in rows], tokens, read)


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


def read_once(
    prompts: Sequence[Sequence[int]], samples: int, most: int
) -> tuple[Sequence[Sequence[int]], int]:
    """Return prompts without equal neighbours, and the rows of each: a prompt need be read once for all its rows.

    Where they do not all come equally often, or one would have more than `most` rows, they stay as they are.
    """
    often = next((n for n, prompt in enumerate(prompts) if prompt != prompts[0]), len(prompts))
    runs = [prompts[start : start + often] for start in range(0, len(prompts), often)]
    if (
        often * samples > most
        or len(prompts) % often
        or any(prompt != run[0] for run in runs for prompt in run)
    ):
        return prompts, samples
    return [run[0] for run in runs], samples * often


def begun(
    prompts: Sequence[Sequence[int]],
    samples: int,
    seed: int,
    turns: Sequence[TurnEnd],
    streams: Sequence[int | None],
    before: Sequence[int],
) -> Iterator[Completion]:
    """Yield the completions to be made, each with the seed of its own random stream."""
    seen: Counter[tuple[int, ...]] = Counter()
    each = zip(map(tuple, prompts), turns, streams, before, strict=True)
    for index, (prompt, turn, stream, first) in enumerate(each):
        for number in range(first, first + samples):
            own = repr((seed, prompt, first + seen[prompt] if stream is None else (stream, number))).encode()
            digest = hashlib.blake2b(own, digest_size=7).digest()
            yield Completion(index, prompt, int.from_bytes(digest, "big"), turn)
            seen[prompt] += stream is None


def uniforms_at(rows: Sequence[Completion], positions: Sequence[int], lanes: int) -> Tensor:
    """Return uniforms in [0, 1), (rows × positions, lanes): SplitMix64 (Steele et al. 2014) of rows' seeds there."""
    with np.errstate(over="ignore"):
        places: Any = np.arange(lanes, dtype=np.uint64)
        places = np.array(positions, dtype=np.uint64)[:, None] * np.uint64(lanes) + places
        seeds = np.array([row.seed for row in rows], dtype=np.uint64)[:, None, None]
        state = seeds + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    # the upper 53 bits, which a float64 holds exactly
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53).flatten(0, 1)
