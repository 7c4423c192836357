"""What stays in the file of a chat: its conversation as a table and as text, renewed at the end of each answer."""

import html
import uuid
import weakref
from collections.abc import Callable, Sequence

from tensafe_nb.chats.chat import ModelChat
from tensafe_nb.chats.turns import ChatTurn, TurnAnswer
from tensafe_nb.display import escaped, visible
from tensafe_nb.widgets.feed.flusher import Flusher
from tensafe_nb.widgets.still.snapshot import TABLE_SECONDS, Bundle, publish

MOST_TURNS, MOST_CHARACTERS = 50, 4_000  # that stay in the file; characters of one text
TOP = 'style="text-align: left; vertical-align: top"'
TEXT = 'style="text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere"'


def transcript(chat: ModelChat) -> Bundle:
    """Return a chat as an output: what nobody can type into, or who opens the file, can read."""
    with chat.held() as turns:
        told = [told_of(turn, chat.columns) for turn in turns[-MOST_TURNS:]]
        earlier, system = len(turns) - len(told), turns[-1].system if turns else chat.system
    told = [*([[("system", shortened(system))]] if system else []), *told]
    with_whom = "; ".join(f"{one.name}: {one.about}" for one in chat.speakers)
    caption = f"Chat with {with_whom}" + (
        f"; the last {MOST_TURNS} of {earlier + MOST_TURNS} turns" if earlier else ""
    )
    lines = [(who, text) for turn in told for who, text in turn]
    rows = "".join(
        f'<tr><th scope="row" {TOP}>{escaped(who)}</th><td {TEXT}>{html.escape(text)}</td></tr>'
        for who, text in lines
    )
    call = 'await chat.say("…") goes on.' if lines else 'await chat.say("…") begins.'
    table = f'<table class="tsnb-facts"><caption>{escaped(caption)}</caption><tbody>{rows}</tbody></table>'
    return {
        "text/html": f'<div class="tsnb-transcript">{table}<p>{html.escape(call)}</p></div>',
        "text/plain": "\n".join([caption, *(f"{visible(who)}: {text}" for who, text in lines), call]),
    }


def told_of(turn: ChatTurn, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return who said what in a turn."""
    told = [("user", shortened(turn.said))]
    for number, name in enumerate(names):
        answer = turn.answer(number)
        if answer is not None:
            told.append((name, words_of(answer)))
    return told


def words_of(answer: TurnAnswer) -> str:
    """Return an answer, with what must be known of its end."""
    text = shortened(answer.text)
    if answer.error is not None:
        return f"{text} [failed: {visible(str(answer.error))}]".lstrip()
    return text + {None: " …", "stopped": " [stopped]"}.get(answer.finish_reason, "")


def shortened(text: str) -> str:
    """Return a text in lines, with nothing in it that cannot be seen, as long as a file should keep it."""
    lines = "\n".join(visible(line) for line in text[:MOST_CHARACTERS].expandtabs(4).split("\n"))
    left = len(text) - MOST_CHARACTERS
    return f"{lines} … ({left:,} more characters)" if left > 0 else lines


class StillChat:
    """The output of a chat that stays in the file.

    It is renewed whenever the chat is at rest; where no page shows the panel, also while answers come. It does not keep
    the chat.

    Args:
        chat: The chat.
        flusher: Who calls.
        alone: Whether no page shows the panel.
    """

    def __init__(self, chat: ModelChat, flusher: Flusher, alone: Callable[[], bool]) -> None:
        self._chat, self._flusher, self._alone = weakref.ref(chat), flusher, alone
        self._ids: list[str] = []
        self._unmet: list[str] = []
        self._told: Bundle = {}
        self._told_at = float("-inf")
        self._out_of_reach = False
        chat.watch(lambda: flusher.wake(self))

    @property
    def live(self) -> bool:
        chat = self._chat()
        return chat is not None and chat.is_under_way

    @property
    def busy(self) -> bool:
        return False

    @property
    def hint(self) -> str:
        """What a page must know of its file, which the kernel cannot renew since it was loaded anew."""
        if not self._out_of_reach:
            return ""
        return (
            "The page was loaded again: the file keeps the conversation as it was before. A new cell that ends with "
            "the chat keeps it as it is."
        )

    def place(self) -> None:
        """Put the output into the calling cell."""
        identity = f"chat-{uuid.uuid4().hex[:12]}"
        self._ids.append(identity)
        self._unmet.append(identity)
        self._out_of_reach = False
        chat = self._chat()
        if chat is not None:
            self._told = transcript(chat)
        publish(self._told, {}, identity)

    def meet(self) -> None:
        """A page was loaded: it knows the outputs that were placed since, and no longer those that another showed."""
        self._out_of_reach = bool(self._ids) and not self._unmet
        self._unmet.clear()

    def flush(self) -> float | None:
        """Renew what is due; called by `tsnb-view` only."""
        chat = self._chat()
        if chat is None or not self._ids:
            return None
        now, going = self._flusher.now(), chat.is_under_way
        if going and not (self._alone() and now >= self._told_at + TABLE_SECONDS):
            return TABLE_SECONDS
        told = transcript(chat)
        if told != self._told:
            self._told, self._told_at = told, now
            for identity in self._ids:
                publish(told, {}, identity, update=True)
        return TABLE_SECONDS if going else None
