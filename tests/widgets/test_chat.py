"""The panel of a chat: what a page is told, what its buttons do, and what stays in the file."""

import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tensafe_nb import widgets
from tensafe_nb.chats.chat import ModelChat
from tensafe_nb.errors import ClientClosedError
from tensafe_nb.events import OperationQueued, OperationStarted
from tensafe_nb.protocol.results import ClientStatus
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.live.chat import AT_FIRST, ChatPanel
from tensafe_nb.widgets.still.transcript import StillChat, transcript
from tests.talkers import FakeTalker, chat_with, told

from .conftest import HandFlusher, Output, Wire


@pytest.fixture
def talkers() -> list[FakeTalker]:
    return [FakeTalker("base"), FakeTalker("tuned")]


@pytest.fixture
def chat(talkers: list[FakeTalker]) -> ModelChat:
    return chat_with(*talkers)


@pytest.fixture
def wire(chat: ModelChat) -> Iterator[Wire]:
    panel = ChatPanel(chat, HandFlusher())
    wire = Wire(panel)
    wire.load()
    yield wire
    panel.close()


class Page:
    """What a page makes of what it is told; the other half of `ChatLine`."""

    def __init__(self) -> None:
        self.turns: dict[int, tuple[str, dict[int, list[str]]]] = {}
        self.about: dict[tuple[int, int], dict[str, Any]] = {}
        self.status: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    def hear(self, messages: list[dict[str, Any]]) -> "Page":
        for one in messages:
            match one:
                case {"t": "begin"}:
                    self.turns.clear()
                case {"t": "cut", "n": first}:
                    self.turns = {number: turn for number, turn in self.turns.items() if number < first}
                case {"t": "turn", "i": number, "said": said}:
                    self.turns[number] = (said, {})
                case {"t": "said", "i": number, "c": column, "o": offset, "p": pieces}:
                    texts = self.turns[number][1].setdefault(column, [])
                    del texts[offset:]
                    assert len(texts) == offset
                    texts += [piece[0] for piece in pieces]
                    self.about[number, column] = one
                case {"t": "status"}:
                    self.status = one
                case {"t": "settings"}:
                    self.settings = one
        return self

    def texts(self, number: int) -> list[str]:
        said, answers = self.turns[number]
        return [said, *("".join(answers[column]) for column in sorted(answers))]


def sent(wire: Wire) -> list[dict[str, Any]]:
    """Flush until there is no more, as a page hears it."""
    found: list[dict[str, Any]] = []
    while messages := wire.flush():
        found += messages
    return found


def test_pieces_come_one_by_one_and_a_page_that_was_loaded_again_has_all(
    wire: Wire, chat: ModelChat, talkers: list[FakeTalker]
) -> None:
    page = Page().hear(sent(wire))
    chat.say("hello")
    talkers[0].asked[-1].say("a")
    page.hear(sent(wire))
    assert page.texts(0) == ["hello", "a", ""] and page.status["going"]
    talkers[0].asked[-1].say("b")
    (news,) = [one for one in sent(wire) if one["t"] == "said"]
    assert (news["o"], news["p"]) == (1, [["b", -0.25]])
    page.hear([news])
    talkers[0].asked[-1].end("length")
    talkers[1].answer("c")
    page.hear(sent(wire))
    assert page.texts(0) == ["hello", "ab", "c"]
    assert page.about[0, 0]["end"] == "length" and page.about[0, 0]["ver"] == 3
    assert not page.status["going"] and sent(wire) == []
    wire.load()
    assert Page().hear(sent(wire)).texts(0) == ["hello", "ab", "c"]


def test_a_turn_that_is_edited_another_answer_and_a_thumb_reach_the_page(
    wire: Wire, chat: ModelChat, talkers: list[FakeTalker]
) -> None:
    page = Page()
    for said in ("one", "two", "three"):
        told(chat, said, f"{said}!", f"{said}?", talkers=talkers)
    page.hear(sent(wire))
    chat.edit("zwei", 1)
    for talker in talkers:
        talker.answer("ja")
    chat.regenerate("tuned")
    talkers[1].answer("nein")
    chat.rate(False, 0)
    page.hear(sent(wire))
    assert [page.texts(number) for number in page.turns] == [["one", "one!", "one?"], ["zwei", "ja", "nein"]]
    assert (page.about[1, 1]["v"], page.about[1, 1]["of"], page.about[0, 0]["good"]) == (1, 2, False)
    chat.choose(0, "tuned")
    assert page.hear(sent(wire)).texts(1) == ["zwei", "ja", "ja"]
    chat.clear()
    assert not page.hear(sent(wire)).turns and page.status["unpaired"] == 1


def ask(wire: Wire, what: str, **more: Any) -> dict[str, Any]:
    """Do what a button does; return what the page is answered."""
    wire.page_says(t="do", do=what, n=1, **more)
    messages = sent(wire)
    (answer,) = [one for one in messages if one["t"] == "ack"]
    return {**answer, "rows": [one for one in messages if one["t"] == "rows"]}


def test_the_buttons_do_what_the_calls_do_and_say_why_they_do_not(
    wire: Wire, chat: ModelChat, talkers: list[FakeTalker]
) -> None:
    assert ask(wire, "say", text="hello")["why"] is None
    assert "still answering" in ask(wire, "say", text="more")["why"]
    ask(wire, "stop")
    ask(wire, "edit", turn=0, text="good day")
    for talker in talkers:
        talker.answer(talker.training_client_id)
    ask(wire, "rate", turn=0, column=0, answer=0, good=True)
    ask(wire, "rate", turn=0, column=1, answer=0, good=False)
    assert chat.pairs == 1
    (rows,) = ask(wire, "rows")["rows"]
    assert [json.loads(line) for line in rows["lines"].splitlines()] == chat.rows
    ask(wire, "regenerate", column=1)
    talkers[1].answer("other")
    ask(wire, "choose", column=1, answer=0)
    assert chat.messages_of("tuned")[-1]["content"] == "tuned"
    assert "no turn 7" in ask(wire, "rate", turn=7, column=1, answer=0, good=True)["why"]
    assert "takes no" in ask(wire, "dance")["why"]
    assert ask(wire, "set", temperature=0.5, seed=None, system="Be brief.")["why"] is None
    assert (chat.sampling.temperature, chat.system) == (0.5, "Be brief.")
    assert "top_p" in ask(wire, "set", top_p=7)["why"] and chat.sampling.top_p == 1
    ask(wire, "clear")
    assert len(chat) == 0


def test_a_column_says_behind_what_it_waits_and_why_it_cannot_answer(
    wire: Wire, chat: ModelChat, talkers: list[FakeTalker]
) -> None:
    base, tuned = talkers
    queue = base.history.state.queue
    queue.apply(OperationQueued(future_id="fut-1", operation="forward_backward"))
    queue.apply(OperationStarted(future_id="fut-1", operation="forward_backward"))
    chat.say("hello")
    chat._under_way()[0].handle._position = lambda: 2  # type: ignore[union-attr]
    page = Page().hear(sent(wire))
    assert (
        page.status["waits"][0] == "waits for its turn behind forward_backward, which is running, and 2 more"
    )
    assert wire.again, "it is looked at again"
    base.status = ClientStatus.TERMINATED
    base.asked[-1].fail(ClientClosedError("It is closed."))
    tuned.answer("here")
    page.hear(sent(wire))
    assert "is closed" in page.status["columns"][0]["trouble"] and page.about[0, 0]["why"] == "It is closed."


def test_a_turn_of_a_long_chat_costs_no_more_than_the_first_ones() -> None:
    talker = FakeTalker(most_kept=1)
    chat = chat_with(talker)
    wire = Wire(ChatPanel(chat, HandFlusher()))
    wire.mount()
    sizes = []
    for number in range(500):
        told(chat, f"{number:04}", "x" * 50, talkers=[talker])
        sizes.append(len(json.dumps(sent(wire))))
    assert max(sizes[250:]) <= 1.1 * max(sizes[:100])
    wire.load()
    page = Page().hear(sent(wire))
    assert min(page.turns) == 500 - AT_FIRST
    wire.page_says(t="do", do="earlier", n=1)
    assert min(page.hear(sent(wire)).turns) == 350 and page.texts(350) == ["0350", "x" * 50]
    wire.widget.close()


def test_text_that_looks_like_html_stays_text_in_the_file(chat: ModelChat, talkers: list[FakeTalker]) -> None:
    told(chat, "<b>hi</b>", "<img src=x onerror=alert(1)>\n\u202e", "line\n\ttab", talkers=talkers)
    bundle = transcript(chat)
    assert "<img" not in bundle["text/html"] and "&lt;img" in bundle["text/html"]
    assert "\u202e" not in bundle["text/html"] + bundle["text/plain"]
    assert "line\n    tab" in bundle["text/plain"] and "tuned: line" in bundle["text/plain"]


def test_without_a_front_end_the_text_is_there_and_follows(
    chat: ModelChat, talkers: list[FakeTalker], outputs: list[Output]
) -> None:
    flusher = HandFlusher()
    still = StillChat(chat, flusher, alone=lambda: True)
    still.place()
    assert "chat.say" in outputs[0].data["text/plain"]
    told(chat, "hello", "a", "b", talkers=talkers)
    still.flush()
    assert still in flusher.woken and outputs[-1].update and outputs[-1].display_id == outputs[0].display_id
    assert "base: a" in outputs[-1].data["text/plain"]
    still.flush()
    assert len(outputs) == 2, "nothing new"


@pytest.mark.parametrize("name", ["widget", "html", "text"])
def test_each_renderer_shows_the_chat(
    name: str,
    chat: ModelChat,
    talkers: list[FakeTalker],
    outputs: list[Output],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(renderer, "choose", lambda: renderer.Renderer(name))
    told(chat, "hello", "a", "b", talkers=talkers)
    shown = chat._repr_mimebundle_()
    if name == "text":
        assert "tuned: b" in shown["text/plain"]
        return
    assert "tuned: b" in outputs[0].data["text/plain"]
    if name == "widget":
        assert widgets.chat_panel(chat).model_id in str(shown)
        widgets.chat_panel(chat).close()
    assert "tuned" in chat._mime_()[1]


def test_a_panel_keeps_no_chat_and_says_when_it_is_gone() -> None:
    talker = FakeTalker()
    chat = chat_with(talker)
    wire = Wire(ChatPanel(chat, HandFlusher()))
    wire.mount()
    gone = weakref.ref(chat)
    del chat
    gc.collect()
    assert gone() is None
    page = Page().hear(sent(wire))
    assert "was let go" in page.status["gone"]
    assert "was let go" in ask(wire, "say", text="hello")["why"]
    wire.widget.close()
