"""Transcripts: token in, token out. Tokens and masks are those of the chat when it is tokenised again from its text.

The second reading is that of training (`data.encode_many`), which finds what is learnt by characters and shares no code
with how a transcript grows.
"""

import pytest

from tensafe_nb.data.chats import Template
from tensafe_nb.data.labels import TextTokens, encode_many
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import SampledSequence
from tensafe_nb.rlvr.environments.transcript import Scripts, Transcript
from tests.unit.data import test_labels as templates
from tests.unit.data.test_labels import tokenizer_with

TOLD = ("is the bridge closed", "Answer: no", "on Sundays")
SAID = ("the river runs", "north of the old town", "yes")


def sampled(tokenizer, text, ending="", reason="stop"):
    """What a policy says: its tokens are the text's and those of what ends its turn."""
    ids = tuple(TextTokens(tokenizer).middle(text + ending))
    nothing = (-1.0,) * len(ids)
    return SampledSequence(0, text, (), ids, nothing, nothing, reason, 0, 0.5)


def conversation(tokenizer, told=TOLD, said=SAID, *, chat="auto", options=None, ending=None):
    transcript = Transcript(Scripts(tokenizer, chat).script(options or {}))
    if ending is None:
        ending = Template(tokenizer).edges({}).stop
    for question, answer in zip(told, said, strict=True):
        transcript.tell(question)
        transcript.hear(sampled(tokenizer, answer, ending))
    return transcript


def read_again(tokenizer, told=TOLD, said=SAID, **row):
    """Tokens and what is learnt of them, from the text."""
    messages = []
    for question, answer in zip(told, said, strict=True):
        asked = question if isinstance(question, list) else [{"role": "user", "content": question}]
        messages += [*asked, {"role": "assistant", "content": answer}]
    (made,) = encode_many([{"messages": messages, **row}], tokenizer)
    assert not isinstance(made, ValidationError), made
    return made


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("CHATML", "<|im_end|>"),
        ("DEFAULT_SYSTEM", "<|im_end|>"),
        ("TRIMS", "</s>"),
        ("TAGGED", "<|im_end|>"),
        ("LATE_END", "<|im_end|>"),
        ("ENDS_ONCE", "</s>"),
        ("TOOLS", "<|im_end|>"),
    ],
)
def test_tokens_and_mask_are_those_of_the_chat_tokenised_again(name, end):
    tokenizer = tokenizer_with(getattr(templates, name), end=end)
    made = conversation(tokenizer)
    tokens, learnt = read_again(tokenizer)
    assert [*made.prompt, *made.tokens] == tokens[: len(made.prompt) + len(made.tokens)]
    assert [False] * len(made.prompt) + [bool(one) for one in made.mask] == learnt[
        : len(tokens[: len(made.prompt) + len(made.tokens)])
    ]
    assert not any(learnt[len(made.prompt) + len(made.tokens) :])


def test_blanks_that_the_policy_said_stand_once_whether_the_template_trims_them_or_not():
    said = ("the river ", "\nnorth \n", "yes")
    for template in (templates.CHATML, templates.TRIMS, templates.PLAIN):
        tokenizer = tokenizer_with(template)
        made = conversation(tokenizer, said=said)
        text = tokenizer.decode([*made.prompt, *made.tokens])
        ends = [text.index(words) + len(words) for words in said]
        assert [text[end : end + 1].isspace() and template is templates.PLAIN for end in ends[:2]] == [
            template is templates.PLAIN
        ] * 2
        assert all(text[end : end + 1] in "<\n" for end in ends[:2])


def test_tool_messages_and_tools_go_through_the_template():
    tokenizer = tokenizer_with(templates.TOOLS)
    tools = [{"type": "function", "function": {"name": "level", "parameters": {}}}]
    told = (
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "level"}],
        [{"role": "tool", "content": "1 m"}],
    )
    made = conversation(tokenizer, told, SAID[:2], options={"tools": tools})
    tokens, _ = read_again(tokenizer, told, SAID[:2], tools=tools)
    assert [*made.prompt, *made.tokens] == tokens[: len(made.prompt) + len(made.tokens)]
    assert [(turn.role, turn.text, turn.trained) for turn in made.turns] == [
        ("system", "Be kind.", False),
        ("user", "level", False),
        ("assistant", SAID[0], True),
        ("tool", "1 m", False),
        ("assistant", SAID[1], True),
    ]


def test_the_spans_of_the_turns_cover_all_tokens_and_only_the_policys_are_sampled():
    tokenizer = tokenizer_with(templates.CHATML)
    made = conversation(tokenizer)
    covered = [n for turn in made.turns for n in range(turn.start, turn.stop)]
    assert covered == list(range(len(made.tokens)))
    said = [turn for turn in made.turns if turn.role == "assistant"]
    assert sum(turn.stop - turn.start for turn in said) == sum(made.mask) == made.length
    assert all(logprob == 0 for logprob, sampled in zip(made.logprobs, made.mask, strict=True) if not sampled)
    assert [tokenizer.decode(made.tokens[turn.start : turn.stop]) for turn in said] == [
        f"{text}<|im_end|>" for text in SAID
    ]


def test_texts_stand_one_behind_the_other_for_a_model_without_a_template():
    tokenizer = tokenizer_with(None)
    made = conversation(tokenizer, ending="</s>")
    assert (
        tokenizer.decode([*made.prompt, *made.tokens])
        == "</s>".join(a + b for a, b in zip(TOLD, SAID, strict=True)) + "</s>"
    )
    raw = conversation(tokenizer_with(templates.CHATML), chat="never", ending="</s>")
    assert raw.tokens == made.tokens


def test_a_stop_string_stays_in_the_transcript_and_the_template_still_ends_the_turn():
    tokenizer = tokenizer_with(templates.CHATML)
    transcript = Transcript(Scripts(tokenizer, "auto").script({}))
    transcript.tell(TOLD[0])
    cut = sampled(tokenizer, "yes", " town", reason="stop_string")
    transcript.hear(cut)
    transcript.tell(TOLD[1])
    assert "assistant\nyes town<|im_end|>\n<|im_start|>user\n" in tokenizer.decode(
        [*transcript.prompt, *transcript.tokens]
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("THINKS", "<think>\nwhy\n</think>\n\nyes"),  # leaves out earlier thoughts
        ("THINKS_ALOUD", "yes"),  # opens a thought that it does not show later
        ("UNTHOUGHT", "yes"),
        ("REPEATS", "yes"),  # begins with what was said last
        ("JSON", "yes"),  # quotes it
        ("RETURNS", "yes"),  # ends a turn otherwise once it is not the last
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused_with_what_it_makes_of_them(name, said):
    tokenizer = tokenizer_with(getattr(templates, name))
    transcript = Transcript(Scripts(tokenizer, "auto").script({}))
    transcript.tell(TOLD[0])
    transcript.hear(sampled(tokenizer, said, Template(tokenizer).edges({}).stop))
    with pytest.raises(
        ValidationError, match=r"shows earlier turns otherwise .*tc\.tokenizer\.chat_template"
    ):
        transcript.tell(TOLD[1])


def test_messages_are_refused_where_there_is_no_template_for_them():
    with pytest.raises(ValidationError, match="no chat template"):
        Transcript(Scripts(tokenizer_with(None), "auto").script({})).tell([{"role": "user", "content": "a"}])
    with pytest.raises(ValidationError, match="chat='never'"):
        Transcript(Scripts(tokenizer_with(templates.CHATML), "never").script({})).tell(
            [{"role": "user", "content": "a"}]
        )
    with pytest.raises(ValidationError, match="no chat template"):
        Scripts(tokenizer_with(None), "always").script({})
