"""A chat: what is said and answered adds up to the messages that the next answer reads, whatever is done in between."""

import gc
import weakref
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import tensafe_nb as tn
from tensafe_nb.chats.chat import ModelChat
from tests.talkers import FakeTalker, chat_with, told

USER, ASSISTANT = "user", "assistant"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair() -> tuple[FakeTalker, FakeTalker, ModelChat]:
    one, other = FakeTalker("base"), FakeTalker("tuned")
    return one, other, chat_with(one, other)


def test_a_message_reads_all_that_was_said_before_it_with_the_roles_of_the_template() -> None:
    talker = FakeTalker()
    chat = chat_with(talker, system="Be brief.")
    told(chat, "one", "eins", talkers=[talker])
    chat.say("two")
    asked = [
        message("system", "Be brief."), message(USER, "one"), message(ASSISTANT, "eins"), message(USER, "two"),
    ]  # fmt: skip
    assert list(talker.asked[-1].prompt) == asked == chat.messages
    talker.asked[-1].say("zw", "ei")
    assert chat.messages == [*asked, message(ASSISTANT, "zwei")], "as far as it has come"


def test_a_model_without_a_template_continues_the_text_as_it_stands() -> None:
    talker = FakeTalker(template=None)
    chat = chat_with(talker, system="# sums\n")
    told(chat, "1+1=", "2\n", talkers=[talker])
    chat.say("2+2=")
    assert talker.asked[-1].prompt == "# sums\n1+1=2\n2+2="
    assert "continues the text" in chat.speakers[0].remarks[0]


def test_columns_go_their_own_ways_and_a_handle_ends_with_the_last_of_them() -> None:
    one, other, chat = pair()
    handle = chat.say("hello")
    one.answer("a")
    assert not handle.done()
    with pytest.raises(tn.ValidationError, match="still answering"):
        chat.say("more")
    other.answer("b")
    assert handle.texts == {"base": "a", "tuned": "b"} and handle.text == "a"
    chat.say("next")
    assert list(other.asked[-1].prompt) == chat.messages_of("tuned")
    assert [each["content"] for each in chat.messages_of("tuned")] == ["hello", "b", "next"]


def test_a_column_that_fails_says_why_and_does_not_hold_up_the_other() -> None:
    one, other, chat = pair()
    handle = chat.say("hello")
    one.asked[-1].say("half")
    one.asked[-1].fail(tn.ClientClosedError("It is closed."))
    other.answer("whole")
    assert dict(handle.finish_reasons) == {"base": "failed", "tuned": "stop"}
    assert dict(handle.errors) == {"base": "It is closed."}
    told(chat, "again", "x", "y", talkers=[one, other])
    assert [each["content"] for each in chat.messages] == ["again", "x"], "what was cut off is not read"
    handle = chat.say("both")
    for talker in (one, other):
        talker.asked[-1].fail(tn.QueueFullError("It is full."))
    with pytest.raises(tn.QueueFullError):
        handle.result()


def test_stop_keeps_what_was_said_and_a_cancelled_handle_stops() -> None:
    one, other, chat = pair()
    handle = chat.say("hello")
    one.asked[-1].say("so f")
    assert chat.stop() == 2 and chat.stop() == 0
    assert handle.texts == {"base": "so f", "tuned": ""} and handle.finish_reason == "stopped"
    told(chat, "go on", "ar", "b", talkers=[one, other])
    assert [each["content"] for each in chat.messages] == ["hello", "so f", "go on", "ar"]
    assert [each["content"] for each in chat.messages_of("tuned")] == ["go on", "b"], "it never began"
    handle = chat.say("x")
    assert handle.cancel() and not chat.is_under_way and not handle.cancel()


def test_a_chat_that_waits_for_its_model_can_be_stopped() -> None:
    talker = FakeTalker()
    chat = ModelChat({"a": talker})
    draw, chat._draw = chat._draw, lambda answer: None  # type: ignore[method-assign]
    handle = chat.say("hello")
    (answer,) = chat._under_way()
    assert chat.speakers[0].waiting(answer) == "the model is being loaded"
    assert chat.stop() == 1 and handle.result().finish_reason == "stopped"
    draw(answer)
    assert not talker.asked, "nothing is drawn that nobody waits for"


def test_another_answer_has_another_seed_and_any_of_them_can_be_gone_on_from() -> None:
    talker = FakeTalker()
    chat = chat_with(talker, sampling=tn.SamplingConfig(seed=5))
    told(chat, "hello", "a", talkers=[talker])
    chat.regenerate()
    assert talker.asked[-1].sampling.seed == 6
    talker.answer("b")
    assert chat.messages[-1]["content"] == "b"
    chat.choose(0)
    chat.say("next")
    assert [each["content"] for each in talker.asked[-1].prompt] == ["hello", "a", "next"]


def test_thumbs_on_answers_to_one_prompt_are_rows_and_others_are_not() -> None:
    one, other, chat = pair()
    told(chat, "hello", "a", "b", talkers=[one, other])
    chat.rate(True)
    assert (chat.pairs, chat.unpaired) == (0, 1)
    chat.rate(False, column="tuned")
    row = {
        "prompt": [message(USER, "hello")],
        "chosen": [message(ASSISTANT, "a")],
        "rejected": [message(ASSISTANT, "b")],
    }
    assert chat.rows == [row] and (chat.pairs, chat.unpaired) == (1, 0)
    told(chat, "next", "c", "d", talkers=[one, other])
    chat.rate(True)
    chat.rate(False, column="tuned")
    assert chat.rows == [row], "the columns had read different conversations"
    chat.regenerate("base")
    one.answer("e")
    chat.rate(False)
    chat.edit("hello", 0)
    one.answer("f")
    other.answer("a")
    chat.rate(False)
    assert [(each["chosen"][0]["content"], each["rejected"][0]["content"]) for each in chat.rows] == [
        ("a", "b"), ("a", "f"), ("c", "e"),
    ]  # fmt: skip
    chat.clear()
    assert len(chat.rows) == 3 and not chat.messages
    chat.clear(thumbs=True)
    assert chat.rows == []


def test_rows_are_written_and_read_back(tmp_path: Any) -> None:
    one, other = FakeTalker("base", None), FakeTalker("tuned", None)
    chat = chat_with(one, other)
    with pytest.raises(tn.ValidationError, match="no pair yet"):
        chat.save(tmp_path / "rows.jsonl")
    told(chat, "Grüße: ", "世界", "x", talkers=[one, other])
    chat.rate(True)
    chat.rate(False, column="tuned")
    path = chat.save(tmp_path / "rows.jsonl")
    assert list(tn.data.read_rows(path)) == chat.rows == [
        {"prompt": "Grüße: ", "chosen": "世界", "rejected": "x"}
    ]  # fmt: skip


def test_what_cannot_be_is_refused_in_words() -> None:
    chat = chat_with(FakeTalker("base"))
    for wrong, words in (
        (lambda: chat.say(""), "nothing to say"),
        (lambda: chat.regenerate(), "nothing was said yet"),
        (lambda: chat.edit("x", 3), "no turn 3"),
        (lambda: chat.messages_of("bas"), "Did you mean"),
        (lambda: setattr(chat, "sampling", tn.SamplingConfig(num_samples=2)), "one answer at a time"),
        (lambda: tn.chat(), "was given 0"),
        (lambda: tn.chat(temprature=1), "Did you mean"),
    ):
        with pytest.raises(tn.ValidationError, match=words):
            wrong()
    chat.say("x")
    with pytest.raises(tn.ValidationError, match="has ended"):
        chat.rate(True)
    chat.stop()


def test_nothing_but_its_users_keeps_a_chat() -> None:
    talker = FakeTalker()
    chat = chat_with(talker)
    handle = chat.say("hello")
    talker.answer("a")
    gone = weakref.ref(chat)
    del chat
    gc.collect()
    assert gone() is None and not talker.watchers and handle.text == "a"


class Expected:
    """What a chat must add up to, the long way."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.turns: list[dict[str, Any]] = []
        self.thumbs: list[tuple[Any, str, bool]] = []

    def say(self, text: str) -> None:
        prompts = {name: [*self.conversation(name), (USER, text)] for name in self.names}
        self.turns.append(
            {"said": text, "prompts": prompts, "answers": {name: [] for name in self.names}, "at": {}}
        )

    def conversation(self, name: str) -> list[tuple[str, str]]:
        found = []
        for turn in self.turns:
            answer = turn["answers"][name][turn["at"][name]] if turn["answers"][name] else ["", None]
            if answer[0]:
                found += [(USER, turn["said"]), (ASSISTANT, answer[0])]
        return found

    def answered(self, name: str, text: str) -> None:
        turn = self.turns[-1]
        turn["answers"][name].append([text, None])
        turn["at"][name] = len(turn["answers"][name]) - 1

    def messages(self, name: str) -> list[dict[str, str]]:
        found = self.conversation(name)
        if self.turns and (not found or found[-2] != (USER, self.turns[-1]["said"]) or self.last(name) == ""):
            found = [*found, (USER, self.turns[-1]["said"])]
        return [message(*each) for each in found]

    def last(self, name: str) -> str:
        turn = self.turns[-1]
        return turn["answers"][name][turn["at"][name]][0] if turn["answers"][name] else ""


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["say", "say", "regenerate", "edit", "stop", "rate", "choose", "clear"]),
        st.sampled_from(["x", "yy", "z"]),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=14,
)


@settings(max_examples=60)
@given(ACTIONS)
def test_any_sequence_of_what_can_be_done_keeps_messages_and_rows_consistent(actions: list[Any]) -> None:
    talkers = {name: FakeTalker(name) for name in ("base", "tuned")}
    chat, expected = chat_with(*talkers.values()), Expected(list(talkers))
    rated: dict[tuple[int, str, int], tuple[Any, str, bool]] = {}
    serial = 0
    for what, text, number, flag in actions:
        names = list(talkers)
        if what in ("edit", "regenerate", "rate", "choose") and not expected.turns:
            continue
        if what == "clear":
            chat.clear()
            expected.turns.clear()
        elif what == "rate":
            name, turn = names[flag], expected.turns[number % len(expected.turns)]
            answer = turn["at"][name]
            if not turn["answers"][name][answer][0]:
                continue
            chat.rate(number > 1, number % len(expected.turns), column=name)
            key = (id(turn["answers"][name][answer]), name, answer)
            rated[key] = (tuple(turn["prompts"][name]), turn["answers"][name][answer], number > 1)
        elif what == "choose":
            name = names[flag]
            at = number % len(expected.turns[-1]["answers"][name])
            chat.choose(at, name)
            expected.turns[-1]["at"][name] = at
        else:
            if what == "regenerate":
                names = [names[flag]] if number else names
                chat.regenerate(names[0] if number else None)
            elif what == "edit":
                at = number % len(expected.turns)
                chat.edit(text, at)
                del expected.turns[at:]
                expected.say(text)
            else:
                chat.say(text)
                expected.say(text)
            for name in names:
                serial += 1
                said = "" if what == "stop" and flag else f"{text}{serial % 3}"
                if said:
                    talkers[name].asked[-1].say(said)
                if what != "stop":
                    talkers[name].asked[-1].end()
                expected.answered(name, said)
            if what == "stop":
                chat.stop()
        for name in talkers:
            assert chat.messages_of(name) == expected.messages(name)
    wanted = [
        (good[0], good[1][0], bad[1][0])
        for good in rated.values()
        for bad in rated.values()
        if good[2] and not bad[2] and good[0] == bad[0] and good[1][0] != bad[1][0]
    ]
    rows = []
    for row in chat.rows:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        prompt = tuple((each["role"], each["content"]) for each in row["prompt"])
        rows.append((prompt, chosen["content"], rejected["content"]))
    assert sorted(rows) == sorted(wanted)
    assert chat.pairs == len(rows)
