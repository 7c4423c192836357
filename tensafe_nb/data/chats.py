"""Turns of the assistant in a chat: the template renders it as it stands, and each turn is found by its characters.

A chat is rendered twice: as it is, and with a mark before and after each answer. Where the two agree but for the marks,
these say where each answer stands, however the template trims, moves or escapes it. A turn that is learnt goes from
where the generation prompt of sampling ends (so that an empty thought written before the answer is learnt too) to the
end of the turn's own end token.
"""

import contextlib
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tensafe_nb.data.marks import MARK, MARKS, THOUGHT, MarkedRuns, Messages, Utterance
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

ASKED, REPLY, NEXT = "Quo vadis, viator?", "Romam, domine.", "Unde venis, quaeso?"
LOOK_BACK = 200  # characters before an answer in which the header of its turn begins
UNLEARNT = ("weight", "train")


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, which of them are to be learnt, and what else the template is given."""

    messages: Messages
    learnt: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as a text, the characters in it that are learnt, and whether the template leaves its end open."""

    text: str
    spans: tuple[tuple[int, int], ...]
    unended: bool = False


def read_chat(row: Mapping[str, Any]) -> Chat:
    """Take a row {"messages", "tools"?, "documents"?, "chat_template_kwargs"?} apart.

    Raises:
        ValidationError: No answer in it, or a weight that is neither 0 nor 1.
    """
    messages = [dict(message) for message in row["messages"]]
    spoken = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
    if not spoken:
        raise ValidationError("This chat has no turn of the assistant, so there is nothing to learn of it.")
    learnt = tuple(n for n in spoken if is_learnt(messages[n]))
    for message in messages:
        for key in UNLEARNT:
            message.pop(key, None)
    return Chat(messages, learnt, template_keywords(row))


def template_keywords(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row or a prompt gives to the chat template beside its messages."""
    given = {key: list(row[key]) for key in ("tools", "documents") if row.get(key)}
    return {**(row.get("chat_template_kwargs") or {}), **given}


def is_learnt(message: Mapping[str, Any]) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise ValidationError(
            f"A message has weight={as_given(weight)}: 0 (not learnt) or 1 are known. Leave the key out, or use one "
            f"of them."
        )
    return weight != 0 and train is not False


class AddedTokens:
    """The added tokens of a tokenizer, as they are found in a text: most templates begin and end turns with them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token or ""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds each; nothing where there are none."""
        added = {*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens} - {""}
        longest_first = sorted(added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def first(self, text: str) -> str:
        """Return the blanks and the one token that a text begins with, or ""."""
        blank = len(text) - len(text.lstrip())
        token = self.pattern.match(text, blank)
        return text[: token.end()] if token else ""

    def to_end_token(self, text: str) -> str:
        """Return the tokens and blanks at the start of a text as far as the tokenizer's end token; "" without one."""
        at = 0
        while self._end and (first := self.first(text[at:])):
            at += len(first)
            if first.lstrip() == self._end:
                return text[:at]
        return ""

    def since_last(self, text: str, until: int) -> str:
        """Return the last token before a place and what follows it up to there; "" if none is near."""
        tokens = list(self.pattern.finditer(text, max(0, until - LOOK_BACK), until))
        return text[tokens[-1].start() : until] if tokens else ""

    def outside(self, text: str, at: int) -> int:
        """Return a place, or where the token begins in whose middle it lies."""
        for token in self.pattern.finditer(text, max(0, at - 100), at + 100):
            if token.start() < at < token.end():
                return token.start()
        return at


@dataclass(slots=True)
class TurnEdges:
    """Edges of turns under one template and the same options, learnt from a made-up chat and the chats before."""

    headers: set[str]  # what a generation prompt ends with, where the answer follows at once
    stop: str  # what ends a turn
    # what follows a last answer → what of it ends the turn
    tails: dict[str, str] = field(default_factory=dict)
    # what precedes and follows calls whose turns stay as said
    calls: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ChatForm:
    """A form that chats share: what stands between their contents, and how turns lie around these."""

    between: tuple[str, ...]
    turns: tuple[tuple[int, int, int], ...]  # (message, characters before its content, characters after it)
    unended: bool

    def rendered(self, contents: Sequence[str], text: str) -> Rendered | None:
        """Return where the turns are if `text` is just this form with these contents; None if it is anything else."""
        parts = [""] * (2 * len(contents) + 1)
        parts[::2], parts[1::2] = self.between, contents
        if "".join(parts) != text:
            return None
        ends = list(itertools.accumulate(map(len, parts)))
        spans = tuple((ends[2 * n] - before, ends[2 * n + 1] + after) for n, before, after in self.turns)
        return Rendered(text[: spans[-1][1]] if self.unended else text, spans, self.unended)


class Template:
    """The chat template of a tokenizer.

    A chat is rendered as it is, and again with marks in it. Most need the first only: when a chat of the same roles was
    found before, what stands between its contents is known, and a rendering that is exactly that needs no marks.

    Raises:
        ValidationError: The tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValidationError(
                "This model has no chat template: give rows with 'prompt' and 'completion' instead."
            )
        self._tokenizer = tokenizer
        self.added = AddedTokens(tokenizer)
        self._edges: dict[str, TurnEdges] = {}
        self._forms: dict[Any, ChatForm | None] = {}
        self._looked_for_system = False

    def turn_ends(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what ends a turn as it is learnt: that of an answer and, with tools, that of a call."""
        return tuple(dict.fromkeys(filter(None, (self.edges(options).stop, self.end_of_calls(options)))))

    def end_of_calls(self, options: Mapping[str, Any]) -> str:
        """Return the token that ends a turn of two calls and neither of them; "" where there is none."""
        try:
            called = {"name": options["tools"][0]["function"]["name"], "arguments": {}}
        except (KeyError, IndexError, TypeError):  # no tools, or in a form of their own
            return ""
        calls = [{"type": "function", "id": f"call0000{n}", "function": called} for n in (1, 2)]
        asked: Messages = [{"role": "user", "content": ASKED}]
        calling = {"role": "assistant", "content": "", "tool_calls": calls}
        said = self.attempt([*asked, calling], options) or ""
        said = said[said.rfind(ASKED) :].rstrip()
        first, last = said.find(called["name"]), said.rfind(called["name"])
        tokens = self.added.pattern.findall(said, max(last, 0))
        # it ends the turn only if it stands behind both calls and not between them
        ends = first < last and tokens and said.endswith(tokens[-1]) and tokens[-1] not in said[first:last]
        return tokens[-1] if ends else ""

    def rendered(self, chats: Sequence[Chat]) -> list[Rendered | ValidationError]:
        """Render chats and find what is learnt of each; a chat that cannot be used gives its error."""
        texts = self._render_all([(chat.messages, chat.options) for chat in chats])
        for chat, text in zip(chats, texts, strict=True):
            if chat.messages[0].get("role") == "system" and not self._looked_for_system:
                self.look_for_system(chat, text)
        made: list[Rendered | ValidationError | None] = []
        for chat, text in zip(chats, texts, strict=True):
            made.append(text if isinstance(text, ValidationError) else self.by_form(chat, text))
        left = [number for number, one in enumerate(made) if one is None]
        found = self._by_marks([chats[n] for n in left], [texts[n] for n in left])
        for number, one in zip(left, found, strict=True):
            made[number] = one
        return made  # type: ignore[return-value]  # none is None any more

    def look_for_system(self, chat: Chat, text: str | ValidationError) -> None:
        """Say, once, that the template has no place for what the system says."""
        first = chat.messages[0]
        said = first.get("content")
        if isinstance(text, ValidationError) or not isinstance(said, str) or not said.strip():
            return
        self._looked_for_system = True
        if said.strip() in text:
            return
        other = self.attempt([{**first, "content": f"{said} {said}"}, *chat.messages[1:]], chat.options)
        if other == text:
            warnings.warn(
                "The model's chat template leaves out what the system says: neither training nor sampling sees it. "
                "Write it into the first message of the user.",
                stacklevel=2,
            )

    def by_form(self, chat: Chat, text: str) -> Rendered | ValidationError | None:
        """Find what is learnt of a chat by an earlier one of its form; None if there is none that fits."""
        if chat.options or any(map(is_special, chat.messages)):
            return None
        contents: list[str] = [message["content"] for message in chat.messages]
        key = (*(message["role"] for message in chat.messages), chat.learnt)
        if key not in self._forms:
            (first,) = self._by_marks([chat], [text])
            self._forms[key] = self.form_of(chat, text, first) if isinstance(first, Rendered) else None
            return first
        form = self._forms[key]
        return form.rendered(contents, text) if form is not None else None

    def form_of(self, chat: Chat, text: str, rendered: Rendered) -> ChatForm | None:
        """Return the form of a rendered chat; None where the template does not only put something between contents."""
        contents = [message["content"] for message in chat.messages]
        # every content is replaced by one character: what stands between them is the form
        hollow = self.attempt(
            [{**message, "content": chr(MARKS + n)} for n, message in enumerate(chat.messages)], chat.options
        )
        if hollow is None or MARK.findall(hollow) != [chr(MARKS + n) for n in range(len(contents))]:
            return None
        plain = ChatForm(
            tuple(MARK.split(hollow)), tuple((n, 0, 0) for n in range(len(contents))), unended=False
        )
        found = plain.rendered(contents, text)
        if found is None or any(content != content.strip() for content in contents):
            return None
        turns = []
        for start, end in rendered.spans:
            inside = [n for n, span in enumerate(found.spans) if start <= span[0] and span[1] <= end]
            if len(inside) != 1:
                return None
            low, high = found.spans[inside[0]]
            turns.append((inside[0], low - start, end - high))
        return ChatForm(plain.between, tuple(turns), rendered.unended)

    def _by_marks(
        self, chats: Sequence[Chat], texts: Sequence[str | ValidationError]
    ) -> list[Rendered | ValidationError]:
        runs = [MarkedRuns() for _ in chats]
        marked = self._render_all(
            [(run.marked(chat.messages), chat.options) for run, chat in zip(runs, chats, strict=True)]
        )
        made: list[Rendered | ValidationError] = []
        for chat, run, text, other in zip(chats, runs, texts, marked, strict=True):
            try:
                made.append(
                    text
                    if isinstance(text, ValidationError)
                    else ChatTurns(self, chat, text).rendered(run, other)
                )
            except ValidationError as error:
                made.append(error)
        return made

    def _render_all(self, asked: Sequence[tuple[Messages, Mapping[str, Any]]]) -> list[str | ValidationError]:
        """Render many chats: those without tools and the like in one call."""
        plain = [number for number, (messages, options) in enumerate(asked) if messages and not options]
        texts: dict[int, str | ValidationError] = {}
        with contextlib.suppress(ValidationError):  # of one of them: which, comes out below
            texts.update(zip(plain, render_many(self._tokenizer, [asked[n][0] for n in plain]), strict=True))
        for number, (messages, options) in enumerate(asked):
            if number not in texts:
                try:
                    texts[number] = render(self._tokenizer, messages, options)
                except ValidationError as error:
                    texts[number] = error
        return [texts[number] for number in range(len(asked))]

    def attempt(self, messages: Messages, options: Mapping[str, Any], *, opened: bool = False) -> str | None:
        """Render a chat; None where the template refuses it, or it is empty."""
        try:
            return render(self._tokenizer, messages, options, opened=opened) if messages else None
        except ValidationError:
            return None

    def edges(self, options: Mapping[str, Any]) -> TurnEdges:
        """Return the edges of turns under these options; what a made-up chat tells of them, at first."""
        key = repr(sorted(options.items())) if options else ""
        if key not in self._edges:
            asked: Messages = [{"role": "user", "content": ASKED}]
            answered: Messages = [*asked, {"role": "assistant", "content": REPLY}]
            text, stop = self.attempt(answered, options), ""
            if text is not None and REPLY in text:
                stop = self.stop(answered, options, REPLY, text[text.rfind(REPLY) + len(REPLY) :])
            self._edges[key] = TurnEdges({self.header(asked, options)} - {""}, stop)
        return self._edges[key]

    def header(self, messages: Messages, options: Mapping[str, Any]) -> str:
        """Return the generation prompt alone, or its last token and what follows."""
        bare, opened = self.attempt(messages, options), self.attempt(messages, options, opened=True)
        if opened is None:
            return ""
        # most templates put the generation prompt behind the chat; others rewrite what came before
        own = opened[len(bare) :] if bare and opened.startswith(bare) else ""
        return own if own.strip() else self.added.since_last(opened, len(opened))

    def stop(self, messages: Messages, options: Mapping[str, Any], answer: str, tail: str) -> str:
        """Return what ends the last answer: what stands after it, whoever speaks next."""
        longer = self.attempt([*messages, {"role": "user", "content": NEXT}], options)
        going = tail
        if longer is not None:
            until = longer.rfind(NEXT)
            at = longer.rfind(answer, 0, max(until, 0))
            going = longer[at + len(answer) : until] if 0 <= at < until else tail
        shared = _shared_start(tail, going)  # what follows the answer whether or not the user goes on
        if shared == tail:
            return self.added.to_end_token(tail) or tail.rstrip()
        return self.added.to_end_token(shared) or self.added.first(tail) or shared.rstrip()


class ChatTurns:
    """The turns of one chat in its rendering: where each that is learnt begins and ends."""

    def __init__(self, template: Template, chat: Chat, text: str) -> None:
        self._template, self._chat, self._text = template, chat, text
        self._edges = template.edges(chat.options)
        self._said: dict[int, Utterance] = {}
        # what else was seen in this chat: (what stood before an answer, how much of it the assistant had said)
        self._local: list[tuple[str, int]] = []

    def _prompt(self, number: int) -> str | None:
        return self._template.attempt(self._chat.messages[:number], self._chat.options, opened=True)

    def rendered(self, runs: MarkedRuns, marked: str | ValidationError) -> Rendered:
        """Return which characters are learnt.

        Args:
            runs: What was marked of the chat.
            marked: The chat as it is rendered with these marks, or why it is not.

        Raises:
            ValidationError: The template leaves out what is to be learnt, or makes something else of it.
        """
        chat, text = self._chat, self._text
        # a template that counts or compares characters minds the marks, and writes another text
        exact = isinstance(marked, str) and MARK.sub("", marked) == text
        self._said = runs.utterances(marked) if isinstance(marked, str) and exact else self.last_by_prompt()
        last = len(chat.messages) - 1
        spans, stop = [], None
        for number in chat.learnt:
            message, one = chat.messages[number], self._said.get(number)
            if one is None and says_nothing(message):
                one = self.nothing_said(number)
            if one is None or (message.get("tool_calls") and not one.calls):
                if number == last or message.get("tool_calls"):
                    raise dropped(message)
                continue
            start = self.start(number, one)
            if message.get("tool_calls"):
                stop, end = None, self.end_of_call(number, start)
            else:
                stop = self.stop(number, one)
                end = None if stop is None else one.end + len(stop)
            if end is not None:
                spans.append((start, end))
        if chat.learnt and not spans:
            raise ValidationError(
                "The model's chat template ends no answer of this chat as it ends the last answer of a chat, so that "
                "none can be learnt. Let the chat end with the assistant's answer."
            )
        # the template ends no turn: the tokenizer's end token is put behind the last one
        unended = stop == "" and chat.learnt[-1] == last
        return Rendered(text[: spans[-1][1]] if unended else text, tuple(spans), unended)

    def last_by_prompt(self) -> dict[int, Utterance]:
        """Find the last answer after the prompt that sampling gives, where the template minds the marks."""
        chat, text, last = self._chat, self._text, len(self._chat.messages) - 1
        answer = chat.messages[last].get("content")
        prompt = self._prompt(last)
        if last in chat.learnt and isinstance(answer, str) and prompt is not None and text.startswith(prompt):
            core = THOUGHT.split(answer)[-1].strip()
            at = text.rfind(core, len(prompt))
            if core and at >= 0:
                before = answer[: answer.rfind(core)]
                after = answer[len(before) + len(core) :]
                return {last: Utterance(at, at + len(core), before, after, calls=False)}
        raise ValidationError(
            "The model's chat template makes another text of this answer, in which it cannot be found again. Give the "
            "row as 'prompt' and 'completion'."
        )

    def nothing_said(self, number: int) -> Utterance | None:
        """Find the place of an answer that says nothing: what is learnt of it is that it ends at once."""
        text, prompt = self._text, self._prompt(number)
        if prompt is None or not text.startswith(prompt):
            return None
        stop = self._edges.stop
        at = text.find(stop, len(prompt)) if stop else len(prompt)
        if at < 0 or text[len(prompt) : at].strip("\n "):
            return None
        return Utterance(at, at, "", "", calls=False)

    def start(self, number: int, one: Utterance) -> int:
        """Return where a turn starts: where the prompt ends that sampling would give for it.

        Most turns follow a generation prompt that was seen before, and need no rendering of their own.
        """
        chat, text, headers, added = self._chat, self._text, self._edges.headers, self._template.added
        with_blanks = one.start - len(one.before) if text.endswith(one.before, 0, one.start) else one.start
        for at in (one.start, with_blanks):
            if any(text.endswith(header, 0, at) for header in headers):
                return at
        for header, own in self._local:
            if text.endswith(header, 0, one.start):
                return one.start - own
        prompt = self._prompt(number)
        if prompt is None:
            # nothing was said before: what the template puts after the prompt is learnt with the answer
            ends = len(text[: one.start].rstrip())
            return ends if any(text.endswith(header, 0, ends) for header in headers) else one.start
        if text.startswith(prompt) and len(prompt) <= one.start:
            start = len(prompt)
            header = (
                self._template.header(chat.messages[:number], chat.options) if start == with_blanks else ""
            )
            headers.update(filter(None, [header]))
        else:
            shared = len(_shared_start(text, prompt))
            unopened = self._template.attempt(chat.messages[:number], chat.options) or ""
            same = text.startswith(_shared_start(unopened, prompt).rstrip())
            start = added.outside(text, min(one.start, shared)) if same and unopened else one.start
        if header := added.since_last(text, start):
            self._local.append((header + text[start : one.start], one.start - start))
        return start

    def stop(self, number: int, one: Utterance) -> str | None:
        """Return what ends a turn, after the answer's own blanks; None where it is not what ends a last turn."""
        chat, text, edges = self._chat, self._text, self._edges
        blanks = one.after if text.startswith(one.after, one.end) else ""
        for own in dict.fromkeys(("", blanks)):
            if edges.stop and text.startswith(edges.stop, one.end + len(own)):
                return own + edges.stop
        if number == len(chat.messages) - 1:
            if edges.stop and THOUGHT.search(one.after) and (at := text.find(edges.stop, one.end)) >= 0:
                # nothing but a thought: the template closes it its own way
                return text[one.end : at] + edges.stop
            tail = text[one.end + len(blanks) :]
            if tail not in edges.tails:
                edges.tails[tail] = self._template.stop(
                    chat.messages, chat.options, text[one.start : one.end] + blanks, tail
                )
            return blanks + edges.tails[tail] if edges.tails[tail] or blanks.strip() else edges.tails[tail]
        return None if edges.stop else self._template.added.to_end_token(text[one.end :])

    def end_of_call(self, number: int, start: int) -> int | None:
        """Return the end of a turn that calls tools, or of the call where later turns change what the turn was."""
        chat, text, edges, said = self._chat, self._text, self._edges, self._said
        one, following = said[number], number + 1
        tokens = self._template.added.pattern.findall(edges.stop)
        mark = tokens[-1] if tokens else edges.stop.strip()
        until = said[following].start if following in said else len(text)
        at = text.find(mark, one.end, until) if mark else -1
        form = (text[start : one.start], text[one.end : at])
        if at >= 0 and form in edges.calls:
            return at + len(mark)
        closed = (self._template.attempt(chat.messages[:following], chat.options) or "").rstrip()
        if len(closed) >= one.end and text.startswith(closed):
            if 0 <= at <= len(closed) - len(mark):
                edges.calls.add(form)
                return at + len(mark)
            return len(closed)
        token = self._template.added.pattern.search(text, one.end, until)
        return token.end() if token else None


def render(tokenizer: Any, messages: Messages, options: Mapping[str, Any], *, opened: bool = False) -> str:
    """Return a chat as a text, opened for the assistant's next answer or not.

    Raises:
        ValidationError: The template refuses it.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened, **options
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise refused_by_template(error) from error
    if not isinstance(text, str):
        raise ValidationError(f"The model's chat template makes no text of this chat, but {as_given(text)}.")
    return text


def render_many(tokenizer: Any, chats: Sequence[Messages]) -> list[str]:
    """Return chats without tools as texts, in one call.

    Raises:
        ValidationError: The template refuses one of them.
    """
    try:
        return list(tokenizer.apply_chat_template(chats, tokenize=False)) if chats else []
    except Exception as error:  # a template is a program: it raises what it likes
        raise refused_by_template(error) from error


def is_special(message: Mapping[str, Any]) -> bool:
    """Whether a message has more than a role and a text, or a text that templates may take apart."""
    content = message.get("content")
    if len(message) != 2 or not isinstance(content, str) or "role" not in message:
        return True
    return not content or content.isspace() or "think" in content or "THINK" in content


def _shared_start(one: str, other: str) -> str:
    length = next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:length]


def says_nothing(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return not message.get("tool_calls") and (
        content is None or (isinstance(content, str) and not content.strip())
    )


def dropped(message: Mapping[str, Any]) -> ValidationError:
    what = "a call of tools" if message.get("tool_calls") else "the assistant's answer"
    return ValidationError(
        f"The model's chat template leaves {what} out, so that it cannot be learnt. Use a model whose template writes "
        f"it, or give the row as 'prompt' and 'completion'."
    )


def refused_by_template(error: Exception) -> ValidationError:
    said = str(error).strip() or type(error).__name__
    return ValidationError(f"The model's chat template refuses this chat: {said}")
