"""The panel of a chat: what is typed into a page goes to the chat, what is drawn comes to the page piece by piece."""

import logging
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, final

import anywidget
import traitlets

from tensafe_nb.chats.chat import ModelChat
from tensafe_nb.chats.turns import ChatTurn, TurnAnswer
from tensafe_nb.display import escaped
from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.widgets.feed.flusher import FLUSHER, Flusher
from tensafe_nb.widgets.live.base import css, esm, view_bundle
from tensafe_nb.widgets.still.snapshot import Bundle
from tensafe_nb.widgets.still.transcript import StillChat

logger = logging.getLogger(__name__)

STREAM_SECONDS = 0.1  # between two messages of what is being drawn
LOOK_SECONDS = 0.5  # between two looks at what an answer waits for
AT_FIRST, EARLIER = 50, 100  # turns that a page is told when it is loaded, and when it asks for more
GONE = "This chat was let go: nothing referred to its clients any more. Run its cell again."
SETTINGS = ("max_new_tokens", "temperature", "top_p", "seed")


@final
class ChatPanel(anywidget.AnyWidget):
    """A chat to type into: columns side by side, Stop, another answer, thumbs, log-probabilities by colour.

    A cell that ends with the chat shows it. The conversation is the kernel's: a page that is loaded again is told of
    it. The panel does not keep the chat.

    Args:
        chat: From `tc.chat()` or `tn.chat(base=tc0, tuned=tc1)`.

    Example:
        >>> HBox([ChatPanel(chat), tc.dashboard(["loss"])])
    """

    _esm = esm("line", "place", "page", "chat")
    _css = css("panel") + css("chat")

    title = traitlets.Unicode(help="With whom one talks, in a few words.").tag(sync=True)

    def __init__(self, chat: ModelChat, flusher: Flusher = FLUSHER) -> None:
        if not isinstance(chat, ModelChat):
            raise ValidationError("A ChatPanel shows a chat: ChatPanel(tc.chat()).")
        self._chat, self._flusher = weakref.ref(chat, lambda _: flusher.wake(self)), flusher
        super().__init__(title=f"Chat with {' · '.join(chat.columns)}")
        self._inbox: deque[dict[str, Any]] = deque()
        self._ready: deque[dict[str, Any]] = deque()  # answers that other threads have prepared
        self._carrying_out = 0
        self._page: object = None
        self.pages = 0  # mounted so far; 0: no page ever said hello
        self._still = StillChat(chat, flusher, alone=lambda: not flusher.met)
        self._sent_at = float("-inf")
        self._start_over()
        self.on_msg(self.receive)
        self._forget = chat.watch(self._hear)

    def _start_over(self) -> None:
        """Tell everything again: a page is new, or missed something."""
        self._begun = False
        self._first = 0  # the earliest turn that pages were told
        self._known: list[ChatTurn] = []  # turns that pages know, or need not
        self._versions: list[int] = []  # of the known turns, as pages were told of them
        self._told: dict[tuple[int, int], tuple[TurnAnswer, int, dict[str, Any]]] = {}  # by turn and column
        self._told_of: dict[str, dict[str, Any]] = {}  # by kind of message, what changes as a whole

    # showing

    def _repr_mimebundle_(self, **_: Any) -> tuple[Bundle, Bundle]:
        from tensafe_nb.widgets import renderer

        if not renderer.in_marimo() and self._chat() is not None:
            self._still.place()
        return self.live_bundle(), {}

    def live_bundle(self) -> Bundle:
        """Return the output that mounts a view, with a line for whoever cannot."""
        line = f"{self.title}: open in Jupyter to go on"
        return view_bundle(self) | {"text/html": f"<p>{escaped(line)}</p>", "text/plain": line}

    def close(self) -> None:
        """Close the line to its pages, and show nothing any more; the chat goes on."""
        if not self.is_cut_off:
            self._forget()
        super().close()

    # as a member of the flusher

    @property
    def live(self) -> bool:
        chat = self._chat()
        return not self.is_cut_off and (self.busy or (chat is not None and chat.is_under_way))

    @property
    def is_cut_off(self) -> bool:
        """Whether its line to pages was closed."""
        return self.comm is None or bool(getattr(self.comm, "_closed", False))

    @property
    def busy(self) -> bool:
        return bool(self._inbox or self._ready or self._carrying_out)

    def _hear(self) -> None:
        """Something may have changed: what is drawn is seen ten times a second, and the first of it at once."""
        self._flusher.wake(self, urgent=self._flusher.now() >= self._sent_at + STREAM_SECONDS)

    def flush(self) -> float | None:
        """Answer the page, then send it what is new; called by `tsnb-view` only."""
        if self.is_cut_off:
            self.close()
            return None
        try:
            chat = self._chat()
            while self._inbox:
                self._answer(self._inbox.popleft(), chat)
            while self._ready:
                self.send(self._ready.popleft())
            if not self.pages:
                return None
            if chat is not None:
                return self._send_news(chat)
            self._send_changed("status", {"gone": GONE})
            return None
        except Exception as error:
            logger.exception("a chat could not be brought up to date")
            self.send({"t": "error", "text": f"The chat stumbled: {type(error).__name__}: {error}"})
            return None

    def _send_news(self, chat: ModelChat) -> float | None:
        with chat.held() as turns:
            messages = list(self._news(turns))
            last = turns[-1] if turns else None
        going = chat.is_under_way
        for message in messages:
            self.send(message)
        self._send_changed("settings", settings_of(chat))
        waits = [waiting(chat, last, number) if going else "" for number in range(len(chat.columns))]
        status = {
            "going": going,
            "pairs": chat.pairs,
            "unpaired": chat.unpaired,
            "turns": len(chat),
            "waits": waits,
        }
        self._send_changed("status", status | {"columns": columns_of(chat), "hint": self._still.hint})
        self._sent_at = self._flusher.now()
        return LOOK_SECONDS if going else None

    def _send_changed(self, kind: str, content: dict[str, Any]) -> None:
        if self._told_of.get(kind) != content:
            self._told_of[kind] = content
            self.send({"t": kind} | content)

    def _news(self, turns: Sequence[ChatTurn]) -> Iterator[dict[str, Any]]:
        """Yield what pages do not know of the turns: what was dropped, what was said, further pieces of answers."""
        if not self._begun:
            self._begun, self._first = True, max(0, len(turns) - AT_FIRST)
            self._known, self._versions = list(turns[: self._first]), [-1] * self._first
            yield {"t": "begin", "first": self._first}
        kept = min(len(self._known), len(turns))
        while kept and self._known[kept - 1] is not turns[kept - 1]:
            kept -= 1  # what stands before an edited turn is as it was
        if kept < len(self._known):
            del self._known[kept:], self._versions[kept:]
            self._first = min(self._first, kept)
            for key in [key for key in self._told if key[0] >= kept]:
                del self._told[key]
            yield {"t": "cut", "n": kept}
        for number in range(kept, len(turns)):
            self._known.append(turns[number])
            self._versions.append(-1)
            yield {"t": "turn", "i": number, "said": turns[number].said}
        for number in range(self._first, len(turns)):
            if turns[number].version != self._versions[number]:
                self._versions[number] = turns[number].version
                yield from self._said(number, turns[number])

    def _said(self, number: int, turn: ChatTurn) -> Iterator[dict[str, Any]]:
        """Yield what pages do not know of the answers of a turn."""
        for column, answers in enumerate(turn.answers):
            answer = turn.answer(column)
            if answer is None:
                continue
            before, sent, told = self._told.get((number, column), (None, 0, {}))
            sent = sent if before is answer else 0
            about = facts_of(answer) | {"v": turn.shown[column], "of": len(answers)}
            if before is answer and sent == len(answer.pieces) and about == told:
                continue
            pieces = [piece_of(*piece) for piece in answer.pieces[sent:]]
            self._told[number, column] = (answer, len(answer.pieces), about)
            yield {"t": "said", "i": number, "c": column, "o": sent, "p": pieces} | about

    # what the page says

    def receive(self, _widget: object, content: dict[str, Any], _buffers: object) -> None:
        """Take a message of the page; it is answered by the next flush."""
        self._inbox.append(content)
        self._flusher.wake(self, urgent=True)

    def _answer(self, content: dict[str, Any], chat: ModelChat | None) -> None:
        match content:
            case {"t": "hello"}:
                self._greet(content.get("mount"))
            case {"t": "do", "do": "earlier", "n": int(number)}:
                self._tell_earlier()
                self._ready.append({"t": "ack", "n": number, "why": None, "said": None})
            case {"t": "do", "do": str(command), "n": int(number)}:
                self._carrying_out += 1
                self._flusher.aside(lambda: self._carry_out(number, command, content, chat))
            case _:
                logger.warning("a page sent what no chat understands: %r", content)

    def _greet(self, page: object) -> None:
        if page and page != self._page:
            self._page = page
            self.pages += 1
            self._still.meet()
        self._flusher.met = True
        self._start_over()

    def _tell_earlier(self) -> None:
        """Tell some more of the turns before those that pages know."""
        first = max(0, self._first - EARLIER)
        for number in range(self._first - 1, first - 1, -1):
            self._ready.append({"t": "turn", "i": number, "said": self._known[number].said})
        self._first = first
        self._ready.append({"t": "first", "first": first})

    def _carry_out(self, number: int, command: str, content: dict[str, Any], chat: ModelChat | None) -> None:
        """Do what a page asks for, on a thread of its own: a stop waits for the server."""
        why = None
        try:
            if chat is None:
                raise ValidationError(GONE)
            if command == "rows":
                self._ready.append({"t": "rows", "name": f"{chat.chat_id}.jsonl", "lines": chat.json_lines()})
            else:
                obey(chat, command, content)
        except TGTinkerError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001  # whoever clicked must be told, whatever it was
            why = f"{type(error).__name__}: {error}"
        self._ready.append({"t": "ack", "n": number, "why": why, "said": None})
        self._carrying_out -= 1
        self._flusher.wake(self, urgent=True)


def obey(chat: ModelChat, command: str, content: dict[str, Any]) -> None:
    """Do with a chat what a page asks for."""
    number = content.get("column")
    column = None if number is None else chat.columns[int(number)]
    match command:
        case "say":
            chat.say(content["text"])
        case "edit":
            chat.edit(content["text"], int(content["turn"]))
        case "regenerate":
            chat.regenerate(column)
        case "stop":
            chat.stop()
        case "choose":
            chat.choose(int(content["answer"]), column)
        case "rate":
            chat.rate(content["good"], int(content["turn"]), column=column, answer=int(content["answer"]))
        case "clear":
            chat.clear()
        case "set":
            chat.sampling = chat.sampling.replace(
                **{name: content[name] for name in SETTINGS if name in content}
            )
            chat.system = content.get("system", chat.system)
        case _:
            raise ValidationError(f"A chat takes no {command!r}.")


def settings_of(chat: ModelChat) -> dict[str, Any]:
    """Return what a page lets one set."""
    return {"system": chat.system} | {name: getattr(chat.sampling, name) for name in SETTINGS}


def columns_of(chat: ModelChat) -> list[dict[str, Any]]:
    """Return what stands above each column."""
    return [
        {
            "name": one.name,
            "about": one.about,
            "trouble": one.trouble,
            "remarks": one.remarks,
            "plain": one.templated is False,
        }
        for one in chat.speakers
    ]


def waiting(chat: ModelChat, turn: ChatTurn | None, column: int) -> str:
    """Return what a column waits for that has not begun to answer; "" if it does not wait."""
    answer = None if turn is None else turn.answer(column)
    if answer is None or answer.finish_reason is not None or answer.pieces:
        return ""
    return chat.speakers[column].waiting(answer)


def facts_of(answer: TurnAnswer) -> dict[str, Any]:
    """Return what a page shows of an answer beside its text; what is not so is left out."""
    facts = {
        "end": answer.finish_reason,
        "why": None if answer.error is None else str(answer.error),
        "good": answer.good,
        "left": answer.left_out or None,
        "ver": answer.policy_version,
    }
    return {name: value for name, value in facts.items() if value is not None}


def piece_of(text: str, logprobs: Sequence[float]) -> list[Any]:
    """Return a piece as it travels: its text, and the log-probability of each of its tokens."""
    return [text, *(round(value, 4) for value in logprobs)]
