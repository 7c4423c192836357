"""Turns of a chat: what was said, and each answer to it. A turn knows the answers before it, so that none repeats them.

A chat of a thousand turns is a chain of a thousand links; the prompt of an answer is read along it when it is needed.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tensafe_nb.errors import TGTinkerError
from tensafe_nb.futures import FutureHandle, Promise, promise_of
from tensafe_nb.protocol.results import Prompt, SampleResult

STOPPED, FAILED = "stopped", "failed"  # finish reasons beside those of `SampledSequence`


class ChatTurn:
    """What the user said, and the answers to it.

    Args:
        said: The text.
        system: What stands before the whole conversation.
        before: The answer before it, for each column; None at the beginning, and for what the column has not read.

    Attributes:
        answers: For each column those that were drawn, in order.
        shown: For each column which of them the conversation goes on from.
        version: Counts the changes of any of it.
    """

    def __init__(self, said: str, system: str, before: "Sequence[TurnAnswer | None]") -> None:
        self.said, self.system, self.before = said, system, tuple(before)
        self.answers: list[list[TurnAnswer]] = [[] for _ in before]
        self.shown = [0 for _ in before]
        self.version = 0
        self.digests = tuple(b"" if one is None else one.digest for one in before)

    def answer(self, column: int) -> "TurnAnswer | None":
        """Return the answer that is shown in a column, if there is one."""
        answers = self.answers[column]
        return answers[self.shown[column]] if answers else None


class TurnAnswer:
    """An answer in the making, and after it: pieces of text, each with the log-probabilities of its tokens.

    Attributes:
        turn: What it answers.
        column: Whose it is.
        pieces: (text, log-probability of each of its tokens at temperature 1), as they came.
        finish_reason: As in `SampledSequence`, or "stopped", or "failed"; None while it is under way.
        error: Why it failed.
        left_out: How many turns before it no longer fitted, and were not read.
        policy_version: Version of the weights that drew it.
        good: The thumb: True, False, or None for none.
        is_to_stop: Whether it was asked to stop.
        handle: Of what draws it, while it is drawn.
        when_over: Called once it is over.
    """

    def __init__(self, turn: ChatTurn, column: int) -> None:
        self.turn, self.column = turn, column
        self.pieces: list[tuple[str, tuple[float, ...]]] = []
        self.finish_reason: str | None = None
        self.error: TGTinkerError | None = None
        self.left_out = 0
        self.policy_version: int | None = None
        self.good: bool | None = None
        self.is_to_stop = False
        self.handle: FutureHandle[SampleResult] | None = None
        self.when_over: Callable[[], None] = lambda: None
        self._promise: Promise[SampleResult] | None = None
        self._text: str | None = None  # once it is over
        self._taken = 0
        self._forget: Callable[[], None] = lambda: None

    @property
    def text(self) -> str:
        """What there is of it."""
        return "".join(text for text, _ in self.pieces) if self._text is None else self._text

    @property
    def is_read(self) -> bool:
        """Whether later answers read it: it has a text, and was not cut off by a failure."""
        return self.error is None and bool(self.text)

    @property
    def digest(self) -> bytes:
        """What tells the conversation up to its end from any other."""
        before = self.turn.digests[self.column]
        return digest_of(before, self.turn.said, self.text) if self.is_read else before

    def attach(
        self, handle: FutureHandle[SampleResult], watcher: Callable[[], None]
    ) -> Promise[SampleResult]:
        """Take what draws it, and have a watcher called at every piece."""
        self.handle, self._promise = handle, promise_of(handle)
        self._forget = self._promise.watch(watcher)
        return self._promise

    def pull(self) -> None:
        """Take in the pieces that have come."""
        if self._promise is None:
            return
        for piece in self._promise.pieces[self._taken :]:
            self._taken += 1
            self.pieces.append((piece.text, piece.raw_logprobs))
            self.turn.version += 1

    def end(self, finish_reason: str, error: TGTinkerError | None = None) -> None:
        """End it, and let go of what drew it."""
        self.pull()
        self._text = self.text
        self.finish_reason, self.error = finish_reason, error
        self.turn.version += 1
        self.handle = self._promise = None
        self._forget()
        self._forget = lambda: None


def read_before(turn: ChatTurn, column: int) -> list[TurnAnswer]:
    """Return the answers of a column before a turn that are read, oldest first."""
    return list(_backwards(turn.before[column]))[::-1]


def _backwards(answer: TurnAnswer | None) -> Iterator[TurnAnswer]:
    while answer is not None:
        if answer.is_read:
            yield answer
        answer = answer.turn.before[answer.column]


def prompt_of(turn: ChatTurn, before: Sequence[TurnAnswer], templated: bool) -> Prompt:
    """Return what a model reads at a turn: messages for its chat template, or, without one, the text as it stands."""
    if not templated:
        return turn.system + "".join(one.turn.said + one.text for one in before) + turn.said
    return tuple(messages_of(turn.system, before, turn.said))


def messages_of(system: str, answers: Sequence[TurnAnswer], said: str | None = None) -> list[dict[str, Any]]:
    """Return a conversation as messages, with what was said last if that has no answer yet."""
    messages = [{"role": "system", "content": system}] if system else []
    for answer in answers:
        messages.append({"role": "user", "content": answer.turn.said})
        messages.append({"role": "assistant", "content": answer.text})
    return messages if said is None else [*messages, {"role": "user", "content": said}]


def digest_of(*parts: bytes | str | int) -> bytes:
    """Return a hash of some parts and of where one ends and the next begins."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()
