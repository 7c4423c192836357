"""A chat: one conversation with one training client, or with several side by side, each in a column of its own.

What is said here takes its place in each client's queue as `tc.stream` does. Nothing here waits for an answer: pieces
are taken in when somebody looks.
"""

import json
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from tensafe_nb.chats.column import ChatColumn, Talker
from tensafe_nb.chats.preferences import Pair, pairs_of, row_of
from tensafe_nb.chats.turns import FAILED, STOPPED, ChatTurn, TurnAnswer, messages_of, read_before
from tensafe_nb.checks import checked
from tensafe_nb.config import SamplingConfig
from tensafe_nb.data.values import checked_text
from tensafe_nb.display import as_given, shown, widgets
from tensafe_nb.errors import FutureFailedError, TGTinkerError, ValidationError, nearest
from tensafe_nb.events import Event, Progress
from tensafe_nb.futures import FutureHandle, Promise, handle_of
from tensafe_nb.lifetimes import Freed
from tensafe_nb.protocol.results import FutureStatus
from tensafe_nb.store.disk import write_whole


@shown
@dataclass(frozen=True, slots=True)
class ChatReply:
    """The answers to a message.

    Attributes:
        texts: By name of the column; of one that failed or was stopped, what there was of it.
        finish_reasons: By name: "stop", "length", "stop_string", "stopped" (by you), or "failed".
        errors: By name, why some failed.
    """

    texts: Mapping[str, str]
    finish_reasons: Mapping[str, str]
    errors: Mapping[str, str]

    @property
    def text(self) -> str:
        """The answer of the first column."""
        return next(iter(self.texts.values()))

    @property
    def finish_reason(self) -> str:
        """Why the answer of the first column ended."""
        return next(iter(self.finish_reasons.values()))


@final
class ModelChat:
    """A conversation with training clients: in a notebook a panel to type into, anywhere else the text.

    Made by `tc.chat()` and `tn.chat(base=tc0, tuned=tc1)`. It lasts as long as one of its clients does or a variable
    of yours refers to it, and its clients last as long as it.

    Args:
        clients: Training clients by name; each answers in a column of its own.
        system: What stands before the conversation: for the system role of the chat template or, without one, the
            beginning of the text.
        sampling: How answers are drawn.

    Example:
        >>> chat = tc.chat(system="Answer briefly.", temperature=0.7)
        >>> print((await chat.say("Hello!")).text)
        >>> chat                            # the panel, with this turn in it
    """

    def __init__(
        self, clients: Mapping[str, Talker], system: str = "", sampling: SamplingConfig | None = None
    ) -> None:
        self.chat_id = f"chat-{uuid.uuid4().hex[:8]}"
        self._columns = [ChatColumn(name, client) for name, client in clients.items()]
        self._sampling, self._system = SamplingConfig(), ""
        self.sampling, self.system = sampling or SamplingConfig(), system
        self._turns: list[ChatTurn] = []
        self._rated: dict[TurnAnswer, None] = {}  # those of turns that were edited or cleared too
        self._lock = threading.RLock()
        self._watchers: dict[object, Callable[[], None]] = {}
        here = weakref.ref(self)

        def hear(event: Event) -> None:
            chat = here()
            if chat is not None and not isinstance(event, Progress):
                chat._tell()

        for column in self._columns:
            weakref.finalize(self, column.client.watch(hear)).atexit = False

    # what may be set

    @property
    def system(self) -> str:
        """What stands before the conversation; set, it holds from the next message on."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        self._system = checked_text(text, "'system'")
        if hasattr(self, "_watchers"):
            self._tell()

    @property
    def sampling(self) -> SamplingConfig:
        """How answers are drawn; set, it holds from the next answer on."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        if not isinstance(sampling, SamplingConfig):
            raise ValidationError(f"chat.sampling is a SamplingConfig, not {as_given(sampling)}.")
        if sampling.num_samples != 1 or sampling.reads_prompts:
            raise ValidationError(
                "A chat draws one answer at a time, and shows no log-probabilities of prompts: leave num_samples, "
                "prompt_logprobs and top_prompt_logprobs alone. chat.regenerate() draws another answer."
            )
        self._sampling = sampling
        if hasattr(self, "_watchers"):
            self._tell()

    # talking

    def say(self, text: Any) -> FutureHandle[ChatReply]:
        """Say something; every column answers.

        Args:
            text: What the user says. A model without a chat template continues it as it stands.

        Returns:
            A handle: await it for the `ChatReply`. It fails only if no column could answer.

        Raises:
            ValidationError: No text, or the answers to the message before are still under way.
        """
        said = checked_message(text)
        with self._lock:
            self._refuse_under_way()
            asked = self._asked(self._new_turn(said), range(len(self._columns)))
        return self._begin(asked)

    @checked
    def regenerate(self, column: str | None = None) -> FutureHandle[ChatReply]:
        """Draw another answer to the last message; the one before stays, to be compared with: see `rate`, `choose`.

        With a `seed` in the sampling, the n-th answer is drawn with seed + n - 1. At temperature 0 all are the same.

        Args:
            column: Of this column only.

        Raises:
            ValidationError: Nothing was said yet, answers are under way, or there is no such column.
        """
        columns = range(len(self._columns)) if column is None else (self._number(column),)
        with self._lock:
            self._refuse_under_way()
            asked = self._asked(self._turn(-1), columns)
        return self._begin(asked)

    @checked
    def edit(self, text: Any, turn: int = -1) -> FutureHandle[ChatReply]:
        """Say something else in place of an earlier message, and go on from there: what came after it is dropped.

        Thumbs that were given there are kept.

        Args:
            text: What the user says instead.
            turn: Which message: 0 is the first, -1 the last.

        Raises:
            ValidationError: No text, no such turn, or answers are under way.
        """
        said = checked_message(text)
        with self._lock:
            self._refuse_under_way()
            number = self._turns.index(self._turn(turn))
            del self._turns[number:]
            asked = self._asked(self._new_turn(said), range(len(self._columns)))
        return self._begin(asked)

    def stop(self) -> int:
        """Stop the answers that are under way; what was said of them stays. Returns how many there were.

        The queues of the clients go on with what comes next.
        """
        with self._lock:
            going = self._under_way()
            for answer in going:
                answer.is_to_stop = True
            handles = [answer.handle for answer in going]
        for answer, handle in zip(going, handles, strict=True):
            if handle is None:  # its model is being loaded
                self._end(answer, STOPPED)
            else:
                handle.cancel()
        return len(going)

    @checked
    def clear(self, thumbs: bool = False) -> None:
        """Begin a new conversation; answers that are under way are stopped.

        Args:
            thumbs: Forget the thumbs as well, and with them `rows`.
        """
        self.stop()
        with self._lock:
            self._turns.clear()
            if thumbs:
                self._rated.clear()
        self._tell()

    # judging

    @checked
    def choose(self, answer: int, column: str | None = None) -> None:
        """Go on from another of the answers to the last message.

        Args:
            answer: Which of them: 0 is the first.
            column: Whose; the first column's if None.

        Raises:
            ValidationError: There is no such answer, or answers are under way.
        """
        number = self._number(column)
        with self._lock:
            self._refuse_under_way()
            turn = self._turn(-1)
            turn.shown[number] = turn.answers[number].index(self._answer(turn, number, answer))
            turn.version += 1
        self._tell()

    @checked
    def rate(
        self, good: bool | None, turn: int = -1, *, column: str | None = None, answer: int | None = None
    ) -> None:
        """Give an answer a thumb: two answers to one prompt, one good and one bad, are a row of `rows`.

        Args:
            good: True, False, or None to take the thumb back.
            turn: Which turn: 0 is the first, -1 the last.
            column: Whose answer; the first column's if None.
            answer: Which of the answers to it; the one that is shown if None.

        Raises:
            ValidationError: There is no such answer, it is under way, or it has no text.
        """
        number = self._number(column)
        with self._lock:
            found = self._answer(self._turn(turn), number, answer)
            if found.finish_reason is None or not found.is_read:
                raise ValidationError("Only an answer that has ended, and has a text, can be rated.")
            found.good = None if good is None else bool(good)
            found.turn.version += 1
            if good is None:
                self._rated.pop(found, None)
            else:
                self._rated[found] = None
        self._tell()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The preferences, {"prompt", "chosen", "rejected"}: for `tc.batches`, and `dpo`, `ipo` and `margin_ranking`.

        For each prompt, every answer with a thumb up beside every one with a thumb down, of all columns that read the
        same prompt; thumbs of turns that were edited or cleared are among them. An answer that has no counterpart is in
        no row.

        Example:
            >>> run = tc.fit(tc.batches(chat.rows), loss_fn="dpo", epochs=3)
        """
        with self._lock:
            return [row_of(pair, self._is_templated(pair[0])) for pair in self._pairs()]

    @checked
    def save(self, to: str | Path) -> Path:
        """Write `rows` as JSON lines, which `tn.data.read_rows` reads back; an existing file is replaced.

        Args:
            to: The file.

        Raises:
            ValidationError: There is no row yet.
            StorageError: It cannot be written.
        """
        lines = self.json_lines()
        if not lines:
            raise ValidationError(
                "There is no pair yet: rate one answer good and another one to the same prompt bad, of another column "
                "or from chat.regenerate()."
            )
        write_whole(Path(to), lines)
        return Path(to)

    def json_lines(self) -> str:
        """Return `rows` as JSON lines."""
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in self.rows)

    # reading

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""
        return tuple(column.name for column in self._columns)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation of the first column, as messages with role and content: see `messages_of`."""
        return self.messages_of()

    @checked
    def messages_of(self, column: str | None = None) -> list[dict[str, Any]]:
        """Return the conversation of a column as messages, as far as it has come.

        A turn without an answer (it failed, or was stopped before its first token) is in it only as the last one: the
        model does not read it.

        Args:
            column: Its name; the first one's if None.
        """
        number = self._number(column)
        with self.held() as turns:
            if not turns:
                return messages_of(self._system, [])
            last = turns[-1]
            before, answer = read_before(last, number), last.answer(number)
            if answer is not None and answer.is_read:
                return messages_of(last.system, [*before, answer])
            return messages_of(last.system, before, last.said)

    def __len__(self) -> int:
        return len(self._turns)

    def __bool__(self) -> bool:
        return True

    @property
    def is_under_way(self) -> bool:
        """Whether an answer is still to come, or coming."""
        return bool(self._under_way())

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Call back, on whatever thread, whenever something may have changed; returns what ends it."""
        key, watchers = object(), self._watchers
        watchers[key] = watcher

        def forget() -> None:  # which does not keep the chat
            watchers.pop(key, None)

        return forget

    @property
    def speakers(self) -> tuple[ChatColumn, ...]:
        """Its columns, with their clients."""
        return tuple(self._columns)

    @contextmanager
    def held(self) -> Iterator[Sequence[ChatTurn]]:
        """Hold the conversation still, with the pieces that have come so far taken in, and look at its turns."""
        with self._lock:
            for answer in self._under_way():
                answer.pull()
            yield self._turns

    @property
    def pairs(self) -> int:
        """How many `rows` there are."""
        with self._lock:
            return sum(1 for _ in self._pairs())

    @property
    def unpaired(self) -> int:
        """How many thumbs are in no row: there is no answer to the same prompt with the other thumb."""
        with self._lock:
            return len(self._rated) - len({answer for pair in self._pairs() for answer in pair})

    def __repr__(self) -> str:
        with_whom = " · ".join(self.columns)
        turns = f"{len(self._turns)} turn{'' if len(self._turns) == 1 else 's'}"
        return f"<ModelChat {self.chat_id} with {with_whom}, {turns}, {self.pairs} preference pairs>"

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return widgets().chat_bundle(self)

    def _mime_(self) -> tuple[str, str]:
        """Return what marimo shows."""
        found: tuple[str, str] = widgets().chat_mime(self)
        return found

    def _left_behind(self) -> Freed:
        """Return what a notebook's output history keeps of it when nothing else refers to it."""
        return Freed(f"The chat {self.chat_id}", messages=self.messages, rows=self.rows)

    # inside

    def _number(self, column: str | None) -> int:
        if column is None:
            return 0
        if column not in self.columns:
            raise ValidationError(
                f"The chat has no column {as_given(column)}; it has {', '.join(map(repr, self.columns))}."
                f"{nearest(column, self.columns)}"
            )
        return self.columns.index(column)

    def _turn(self, number: int) -> ChatTurn:
        if not -len(self._turns) <= number < len(self._turns):
            raise ValidationError(
                f"The chat has no turn {number}: "
                + (
                    f"it has {len(self._turns)}, from 0 on."
                    if self._turns
                    else "nothing was said yet, chat.say(…)."
                )
            )
        return self._turns[number]

    def _answer(self, turn: ChatTurn, column: int, number: int | None) -> TurnAnswer:
        answers = turn.answers[column]
        number = turn.shown[column] if number is None else number
        if not -len(answers) <= number < len(answers):
            raise ValidationError(
                f"{self.columns[column]!r} has no answer {number} here: it has {len(answers)}, from 0 on."
            )
        return answers[number]

    def _under_way(self) -> list[TurnAnswer]:
        """Return what is not over; only the last turn can have such answers."""
        answers = self._turns[-1].answers if self._turns else []
        return [answer for column in answers for answer in column[-1:] if answer.finish_reason is None]

    def _refuse_under_way(self) -> None:
        if self._under_way():
            raise ValidationError(
                "The chat is still answering: await the handle that chat.say returned, or call chat.stop() first."
            )

    def _new_turn(self, said: str) -> ChatTurn:
        last = self._turns[-1] if self._turns else None
        numbers = range(len(self._columns))
        turn = ChatTurn(said, self._system, [None if last is None else last.answer(n) for n in numbers])
        self._turns.append(turn)
        return turn

    def _asked(self, turn: ChatTurn, columns: Sequence[int]) -> list[TurnAnswer]:
        """Return new answers to a turn, which are still to be begun."""
        asked = [TurnAnswer(turn, column) for column in columns]
        for answer in asked:
            answers = turn.answers[answer.column]
            answers.append(answer)
            turn.shown[answer.column] = len(answers) - 1
            turn.version += 1
        return asked

    def _begin(self, asked: Sequence[TurnAnswer]) -> FutureHandle[ChatReply]:
        """Have answers drawn, and return the handle of all of them."""
        promise: Promise[ChatReply] = Promise()
        promise.start()
        for answer in asked:
            answer.when_over = lambda: self._reply(asked, promise)
        for answer in asked:
            if self._columns[answer.column].templated is None:  # waits for its model
                threading.Thread(target=self._draw, args=(answer,), name="tsnb-chat", daemon=True).start()
            else:
                self._draw(answer)
        self._tell()
        here = weakref.ref(self)

        def stop() -> bool:
            chat = here()
            return chat is not None and not promise.done and chat.stop() > 0

        client_id = self._columns[asked[0].column].client.training_client_id
        return handle_of(promise, "chat", client_id, ChatReply, stop)

    def _draw(self, answer: TurnAnswer) -> None:
        column, number = self._columns[answer.column], answer.turn.answers[answer.column].index(answer)
        seed = self._sampling.seed
        try:
            column.learn()
            if answer.finish_reason is not None:  # stopped meanwhile
                return
            sampling = self._sampling if seed is None else self._sampling.replace(seed=seed + number)
            pieces = column.draw(answer, sampling)
        except TGTinkerError as error:
            self._end(answer, FAILED, error)
        except Exception as error:  # noqa: BLE001  # a template may raise anything; whoever asked must be told
            self._end(answer, FAILED, wrapped(error))
        else:
            promise = answer.attach(pieces.handle, self._tell)
            promise.on_done(lambda: self._drawn(answer, promise))
            if answer.is_to_stop:
                pieces.handle.cancel()

    def _drawn(self, answer: TurnAnswer, promise: Any) -> None:
        """Take in how the drawing of an answer ended."""
        if promise.state is FutureStatus.COMPLETED:
            (sequence,) = promise.value.sequences
            answer.policy_version = promise.value.policy_version
            self._end(answer, sequence.finish_reason)
        elif promise.state is FutureStatus.FAILED:
            ours = isinstance(promise.error, TGTinkerError)
            self._end(answer, FAILED, promise.error if ours else wrapped(promise.error))
        else:
            self._end(answer, STOPPED)

    def _end(self, answer: TurnAnswer, finish_reason: str, error: TGTinkerError | None = None) -> None:
        with self._lock:
            if answer.finish_reason is not None:
                return
            answer.end(finish_reason, error)
            when_over, answer.when_over = answer.when_over, lambda: None
        when_over()
        self._tell()

    def _reply(self, asked: Sequence[TurnAnswer], promise: Promise[ChatReply]) -> None:
        """Fulfil the promise of some answers once all of them are over."""
        with self._lock:
            if any(answer.finish_reason is None for answer in asked):
                return
            failed = [answer for answer in asked if answer.error is not None]
            named = [(self.columns[answer.column], answer) for answer in asked]
        if len(failed) == len(asked) and failed[0].error is not None:
            promise.fail(failed[0].error)
            return
        promise.succeed(
            ChatReply(
                {name: answer.text for name, answer in named},
                {name: str(answer.finish_reason) for name, answer in named},
                {name: str(answer.error) for name, answer in named if answer.error is not None},
            )
        )

    def _is_templated(self, answer: TurnAnswer) -> bool:
        return bool(self._columns[answer.column].templated)

    def _pairs(self) -> Iterator[Pair]:
        return pairs_of((answer, self._is_templated(answer)) for answer in self._rated)

    def _tell(self) -> None:
        for watcher in tuple(self._watchers.values()):
            watcher()


def checked_message(text: Any) -> str:
    """Return what a user says.

    Raises:
        ValidationError: It is no text, or empty.
    """
    said = checked_text(text, "what you say")
    if not said:
        raise ValidationError("There is nothing to say: give a text.")
    return said


def wrapped(error: BaseException | None) -> FutureFailedError:
    """Return an error of our family for one that is not."""
    return FutureFailedError(f"The answer failed: {type(error).__name__}: {error}")
