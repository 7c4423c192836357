"""Where the assistant speaks in a chat: the template renders it as it stands, and each turn is found by its characters.

A chat is rendered twice: as it is, and with a mark before and after each answer. Where the two agree but for the marks,
these say where each answer stands, however the template trims, moves or escapes it. A turn that is learnt goes from
where the generation prompt of sampling ends (so that an empty thought written before the answer is learnt too) to the
end of the turn's own end token.
"""

import contextlib
import itertools
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

Messages = list[dict[str, Any]]
MARKS = 0x100000  # the last private plane of Unicode: run n stands between MARKS + 2n and MARKS + 2n + 1
MARK = re.compile(
    rf"[{chr(MARKS)}-{chr(0x10FFFD)}]|\\udb[c-f][0-9a-f]\\ud[c-f][0-9a-f]{{2}}"
)  # or so in JSON
THOUGHT = re.compile(r"(</?[\w:]*think[\w:]*>|\[/?THINK\])")  # templates take answers apart at these
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
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
    learnt = tuple(n for n in spoken if _is_learnt(messages[n]))
    for message in messages:
        for key in UNLEARNT:
            message.pop(key, None)
    return Chat(messages, learnt, template_options(row))


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row or a prompt gives to the chat template beside its messages."""
    given = {key: list(row[key]) for key in ("tools", "documents") if row.get(key)}
    return {**(row.get("chat_template_kwargs") or {}), **given}


def _is_learnt(message: Mapping[str, Any]) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise ValidationError(
            f"A message has weight={as_given(weight)}: 0 (not learnt) or 1 are known. Leave the key out, or use one "
            f"of them."
        )
    return weight != 0 and train is not False


@dataclass(slots=True)
class _Runs:
    """The pieces of text that were marked: whose they are, and what stands around each in its message."""

    owner: list[int] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    of_call: list[bool] = field(default_factory=list)

    def marked(self, messages: Messages) -> Messages:
        """Return the messages with marks in what the assistant and its tools say."""
        return [
            message
            if message.get("role") in ("user", "system", "developer")
            else self._message(message, number)
            for number, message in enumerate(messages)
        ]

    def _message(self, message: dict[str, Any], number: int) -> dict[str, Any]:
        made = dict(message)
        for key in (*THOUGHTS, "content"):
            if key in made:
                made[key] = self._value(made[key], number)
        if message.get("role") == "assistant" and isinstance(made.get("tool_calls"), list):
            made["tool_calls"] = [self._call(call, number) for call in made["tool_calls"]]
        return made

    def _call(self, call: Any, number: int) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"], number)}
        return {
            key: self._leaves(value, number) if key in ("name", "arguments") else value
            for key, value in call.items()
        }

    def _leaves(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._run(value, number, of_call=True)
        if isinstance(value, Mapping):
            return {key: self._leaves(one, number) for key, one in value.items()}
        return [self._leaves(one, number) for one in value] if isinstance(value, list) else value

    def _value(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._text(value, number)
        if isinstance(value, list):  # content in parts
            return [
                {**part, "text": self._text(part["text"], number)}
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                else part
                for part in value
            ]
        return value

    def _text(self, text: str, number: int) -> str:
        if not THOUGHT.search(text):
            return self._run(text, number)
        made, at = "", 0
        for piece in THOUGHT.split(text):
            made += self._run(piece, number, text[:at], text[at + len(piece) :])
            at += len(piece)
        return made

    def _run(self, text: str, number: int, left: str = "", right: str = "", *, of_call: bool = False) -> str:
        core = text.strip()
        if not core or THOUGHT.fullmatch(core):
            return text
        lead = text[: len(text) - len(text.lstrip())]
        trail = text[len(lead) + len(core) :]
        opening = MARKS + 2 * len(self.owner)
        self.owner.append(number)
        self.before.append(left + lead)
        self.after.append(trail + right)
        self.of_call.append(of_call)
        return f"{lead}{chr(opening)}{core}{chr(opening + 1)}{trail}"


@dataclass(slots=True)
class _Said:
    """Where what a message says stands in the rendering, without the blanks around it."""

    start: int
    end: int
    before: str
    after: str
    calls: bool


def _found(marked: str, runs: _Runs) -> dict[int, _Said]:
    """Return where each marked message stands: the last place of each run that comes after the message before."""
    places: dict[int, list[tuple[int, int]]] = {}
    opened: dict[int, int] = {}
    left_out = 0
    for mark in MARK.finditer(marked):
        run, closes = divmod(ord(json.loads(f'"{mark[0]}"')) - MARKS, 2)
        at = mark.start() - left_out
        left_out += len(mark[0])
        if not closes:
            opened[run] = at
        elif run in opened:
            places.setdefault(run, []).append((opened.pop(run), at))
    said: dict[int, _Said] = {}
    floor = 0
    for number, group in itertools.groupby(range(len(runs.owner)), key=runs.owner.__getitem__):
        spots = []
        for run in group:
            after = [place for place in places.get(run, ()) if place[0] >= floor]
            if (
                after
            ):  # the name of a tool comes again with the tool's answer, an answer at most before its turn
                spots.append((after[0] if runs.of_call[run] else after[-1], run))
        if not spots:
            continue
        first, last = min(spots), max(spots, key=lambda spot: spot[0][1])
        floor = last[0][1]
        calls = any(runs.of_call[run] for _, run in spots)
        said[number] = _Said(first[0][0], floor, runs.before[first[1]], runs.after[last[1]], calls)
    return said


@dataclass(slots=True)
class _Known:
    """What is known of a template under the same options, learnt from a made-up chat and from the chats before."""

    headers: set[str]  # what a generation prompt ends with, where the answer follows at once
    stop: str  # what ends a turn
    tails: dict[str, str] = field(
        default_factory=dict
    )  # what follows a last answer → what of it ends the turn
    calls: set[tuple[str, str]] = field(
        default_factory=set
    )  # what precedes and follows calls whose turns stay as said


@dataclass(frozen=True, slots=True)
class _Form:
    """What the chats of one form have in common: what stands between the contents, and how turns lie around them."""

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
        self._end = tokenizer.eos_token or ""
        self._token = token_pattern(tokenizer)
        self._known: dict[str, _Known] = {}
        self._forms: dict[Any, _Form | None] = {}
        self._looked_for_system = False

    def turn_ends(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what ends a turn as it is learnt: that of an answer and, with tools, that of a call."""
        return tuple(dict.fromkeys(filter(None, (self._known_under(options).stop, self._call_end(options)))))

    def _call_end(self, options: Mapping[str, Any]) -> str:
        """Return the token that ends a turn of two calls and neither of them; "" where there is none."""
        try:
            called = {"name": options["tools"][0]["function"]["name"], "arguments": {}}
        except (KeyError, IndexError, TypeError):  # no tools, or in a form of their own
            return ""
        calls = [{"type": "function", "id": f"call0000{n}", "function": called} for n in (1, 2)]
        asked: Messages = [{"role": "user", "content": ASKED}]
        said = self._try([*asked, {"role": "assistant", "content": "", "tool_calls": calls}], options) or ""
        said = said[said.rfind(ASKED) :].rstrip()
        first, last = said.find(called["name"]), said.rfind(called["name"])
        tokens = self._token.findall(said, max(last, 0))
        ends = first < last and tokens and said.endswith(tokens[-1]) and tokens[-1] not in said[first:last]
        return tokens[-1] if ends else ""

    def rendered(self, chats: Sequence[Chat]) -> list[Rendered | ValidationError]:
        """Render chats and find what is learnt of each; a chat that cannot be used gives its error."""
        texts = self._render_all([(chat.messages, chat.options) for chat in chats])
        for chat, text in zip(chats, texts, strict=True):
            if chat.messages[0].get("role") == "system" and not self._looked_for_system:
                self._look_for_system(chat, text)
        made: list[Rendered | ValidationError | None] = []
        for chat, text in zip(chats, texts, strict=True):
            made.append(text if isinstance(text, ValidationError) else self._by_form(chat, text))
        left = [number for number, one in enumerate(made) if one is None]
        for number, one in zip(
            left, self._by_marks([chats[n] for n in left], [texts[n] for n in left]), strict=True
        ):
            made[number] = one
        return made  # type: ignore[return-value]  # none is None any more

    def _look_for_system(self, chat: Chat, text: str | ValidationError) -> None:
        """Say, once, that the template has no place for what the system says."""
        first = chat.messages[0]
        said = first.get("content")
        if isinstance(text, ValidationError) or not isinstance(said, str) or not said.strip():
            return
        self._looked_for_system = True
        if said.strip() in text:
            return
        other = self._try([{**first, "content": f"{said} {said}"}, *chat.messages[1:]], chat.options)
        if other == text:
            warnings.warn(
                "The model's chat template leaves out what the system says: neither training nor sampling sees it. "
                "Write it into the first message of the user.",
                stacklevel=2,
            )

    def _by_form(self, chat: Chat, text: str) -> Rendered | ValidationError | None:
        """Find what is learnt of a chat by an earlier one of its form; None if there is none that fits."""
        if chat.options or any(map(_is_special, chat.messages)):
            return None
        contents: list[str] = [message["content"] for message in chat.messages]
        key = (*(message["role"] for message in chat.messages), chat.learnt)
        if key not in self._forms:
            (first,) = self._by_marks([chat], [text])
            self._forms[key] = self._form_of(chat, text, first) if isinstance(first, Rendered) else None
            return first
        form = self._forms[key]
        return form.rendered(contents, text) if form is not None else None

    def _form_of(self, chat: Chat, text: str, rendered: Rendered) -> _Form | None:
        contents = [message["content"] for message in chat.messages]
        hollow = self._try(
            [{**message, "content": chr(MARKS + n)} for n, message in enumerate(chat.messages)], chat.options
        )
        if hollow is None or MARK.findall(hollow) != [chr(MARKS + n) for n in range(len(contents))]:
            return None
        plain = _Form(
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
        return _Form(plain.between, tuple(turns), rendered.unended)

    def _by_marks(
        self, chats: Sequence[Chat], texts: Sequence[str | ValidationError]
    ) -> list[Rendered | ValidationError]:
        runs = [_Runs() for _ in chats]
        marked = self._render_all(
            [(run.marked(chat.messages), chat.options) for run, chat in zip(runs, chats, strict=True)]
        )
        made: list[Rendered | ValidationError] = []
        for chat, run, text, other in zip(chats, runs, texts, marked, strict=True):
            try:
                made.append(
                    text if isinstance(text, ValidationError) else self._label(chat, run, text, other)
                )
            except ValidationError as error:
                made.append(error)
        return made

    def _render_all(self, asked: Sequence[tuple[Messages, Mapping[str, Any]]]) -> list[str | ValidationError]:
        """Render many chats: those without tools and the like in one call."""
        plain = [number for number, (messages, options) in enumerate(asked) if messages and not options]
        texts: dict[int, str | ValidationError] = {}
        with contextlib.suppress(ValidationError):  # of one of them: which, comes out below
            texts.update(zip(plain, self._render_plain([asked[n][0] for n in plain]), strict=True))
        for number, (messages, options) in enumerate(asked):
            if number not in texts:
                try:
                    texts[number] = render(self._tokenizer, messages, options)
                except ValidationError as error:
                    texts[number] = error
        return [texts[number] for number in range(len(asked))]

    def _render_plain(self, many: Sequence[Messages]) -> list[str]:
        try:
            return list(self._tokenizer.apply_chat_template(many, tokenize=False)) if many else []
        except Exception as error:
            raise _refused(error) from error

    def _try(self, messages: Messages, options: Mapping[str, Any], *, opened: bool = False) -> str | None:
        try:
            return render(self._tokenizer, messages, options, opened=opened) if messages else None
        except ValidationError:
            return None

    def _known_under(self, options: Mapping[str, Any]) -> _Known:
        key = repr(sorted(options.items())) if options else ""
        if key not in self._known:
            self._known[key] = self._probe(options)
        return self._known[key]

    def _probe(self, options: Mapping[str, Any]) -> _Known:
        asked: Messages = [{"role": "user", "content": ASKED}]
        answered: Messages = [*asked, {"role": "assistant", "content": REPLY}]
        header = self._header(asked, options)
        text = self._try(answered, options)
        if text is None or REPLY not in text:
            return _Known({header} - {""}, "")
        tail = text[text.rfind(REPLY) + len(REPLY) :]
        return _Known({header} - {""}, self._stop(answered, options, REPLY, tail))

    def _header(self, messages: Messages, options: Mapping[str, Any]) -> str:
        """Return the generation prompt alone, or its last token and what follows."""
        bare, opened = self._try(messages, options), self._try(messages, options, opened=True)
        if opened is None:
            return ""
        own = opened[len(bare) :] if bare and opened.startswith(bare) else ""
        return own if own.strip() else self._since_token(opened, len(opened))

    def _stop(self, messages: Messages, options: Mapping[str, Any], answer: str, tail: str) -> str:
        """Return what ends the last answer: what stands after it, whoever speaks next."""
        longer = self._try([*messages, {"role": "user", "content": NEXT}], options)
        going = tail
        if longer is not None:
            until = longer.rfind(NEXT)
            at = longer.rfind(answer, 0, max(until, 0))
            going = longer[at + len(answer) : until] if 0 <= at < until else tail
        shared = _shared_start(tail, going)
        if shared == tail:
            return self._to_end_token(tail) or tail.rstrip()
        return self._to_end_token(shared) or self._first_token(tail) or shared.rstrip()

    def _first_token(self, text: str) -> str:
        """Return the blanks and the one token that a text begins with, or ""."""
        blank = len(text) - len(text.lstrip())
        token = self._token.match(text, blank)
        return text[: token.end()] if token else ""

    def _to_end_token(self, text: str) -> str:
        """Return the tokens and blanks at the start of a text as far as the tokenizer's end token; "" without one."""
        at = 0
        while self._end and (first := self._first_token(text[at:])):
            at += len(first)
            if first.lstrip() == self._end:
                return text[:at]
        return ""

    def _since_token(self, text: str, until: int) -> str:
        """Return the last token before a place and what follows it up to there; "" if none is near."""
        tokens = list(self._token.finditer(text, max(0, until - LOOK_BACK), until))
        return text[tokens[-1].start() : until] if tokens else ""

    def _off_token(self, text: str, at: int) -> int:
        for token in self._token.finditer(text, max(0, at - 100), at + 100):
            if token.start() < at < token.end():
                return token.start()
        return at

    def _label(self, chat: Chat, runs: _Runs, text: str, marked: str | ValidationError) -> Rendered:
        known = self._known_under(chat.options)
        if isinstance(marked, str) and MARK.sub("", marked) == text:
            said = _found(marked, runs)
        else:
            said = self._last_by_prompt(chat, text)
        last, local = len(chat.messages) - 1, list[tuple[str, int]]()
        spans, stop = [], None
        for number in chat.learnt:
            message, one = chat.messages[number], said.get(number)
            if one is None and _is_empty(message):
                one = self._empty(chat, number, text)
            if one is None or (message.get("tool_calls") and not one.calls):
                if number == last or message.get("tool_calls"):
                    raise ValidationError(_left_out(message))
                continue
            start = self._start(chat, number, text, one, known, local)
            if message.get("tool_calls"):
                stop, end = None, self._end_of_call(chat, number, text, start, said, known)
            else:
                stop = self._stop_of(chat, number, text, one, known)
                end = None if stop is None else one.end + len(stop)
            if end is not None:
                spans.append((start, end))
        if chat.learnt and not spans:
            raise ValidationError(
                "The model's chat template ends no answer of this chat as it ends the last answer of a chat, so that "
                "none can be learnt. Let the chat end with the assistant's answer."
            )
        unended = stop == "" and chat.learnt[-1] == last
        return Rendered(text[: spans[-1][1]] if unended else text, tuple(spans), unended)

    def _last_by_prompt(self, chat: Chat, text: str) -> dict[int, _Said]:
        """Find the last answer after the prompt that sampling gives, where the template minds the marks."""
        last = len(chat.messages) - 1
        answer = chat.messages[last].get("content")
        prompt = self._try(chat.messages[:last], chat.options, opened=True)
        if last in chat.learnt and isinstance(answer, str) and prompt is not None and text.startswith(prompt):
            core = THOUGHT.split(answer)[-1].strip()
            at = text.rfind(core, len(prompt))
            if core and at >= 0:
                before = answer[: answer.rfind(core)]
                return {
                    last: _Said(at, at + len(core), before, answer[len(before) + len(core) :], calls=False)
                }
        raise ValidationError(
            "The model's chat template makes another text of this answer, in which it cannot be found again. Give the "
            "row as 'prompt' and 'completion'."
        )

    def _empty(self, chat: Chat, number: int, text: str) -> _Said | None:
        """Find the place of an answer that says nothing: what is learnt of it is that it ends at once."""
        prompt = self._try(chat.messages[:number], chat.options, opened=True)
        if prompt is None or not text.startswith(prompt):
            return None
        stop = self._known_under(chat.options).stop
        at = text.find(stop, len(prompt)) if stop else len(prompt)
        return None if at < 0 or text[len(prompt) : at].strip("\n ") else _Said(at, at, "", "", calls=False)

    def _start(
        self, chat: Chat, number: int, text: str, one: _Said, known: _Known, local: list[tuple[str, int]]
    ) -> int:
        """Return where a turn starts: where the prompt ends that sampling would give for it.

        Most turns follow a generation prompt that was seen before, and need no rendering of their own. `local` holds
        what else was seen in this chat: (what stood before an answer, how much of it the assistant had said).
        """
        with_blanks = one.start - len(one.before) if text.endswith(one.before, 0, one.start) else one.start
        for at in (one.start, with_blanks):
            if any(text.endswith(header, 0, at) for header in known.headers):
                return at
        for header, own in local:
            if text.endswith(header, 0, one.start):
                return one.start - own
        prompt = self._try(chat.messages[:number], chat.options, opened=True)
        if (
            prompt is None
        ):  # nothing was said before: what the template puts after the prompt is learnt with the answer
            ends = len(text[: one.start].rstrip())
            return ends if any(text.endswith(header, 0, ends) for header in known.headers) else one.start
        if text.startswith(prompt) and len(prompt) <= one.start:
            start = len(prompt)
            if start == with_blanks and (header := self._header(chat.messages[:number], chat.options)):
                known.headers.add(header)
        else:
            shared = len(_shared_start(text, prompt))
            unopened = self._try(chat.messages[:number], chat.options) or ""
            same = text.startswith(_shared_start(unopened, prompt).rstrip())
            start = self._off_token(text, min(one.start, shared)) if same and unopened else one.start
        if header := self._since_token(text, start):
            local.append((header + text[start : one.start], one.start - start))
        return start

    def _stop_of(self, chat: Chat, number: int, text: str, one: _Said, known: _Known) -> str | None:
        """Return what ends a turn, after the answer's own blanks; None where it is not what ends a last turn."""
        blanks = one.after if text.startswith(one.after, one.end) else ""
        for own in dict.fromkeys(("", blanks)):
            if known.stop and text.startswith(known.stop, one.end + len(own)):
                return own + known.stop
        if number == len(chat.messages) - 1:
            if known.stop and THOUGHT.search(one.after) and (at := text.find(known.stop, one.end)) >= 0:
                return (
                    text[one.end : at] + known.stop
                )  # a thought and nothing else: the template closes it its own way
            tail = text[one.end + len(blanks) :]
            if tail not in known.tails:
                known.tails[tail] = self._stop(
                    chat.messages, chat.options, text[one.start : one.end] + blanks, tail
                )
            return blanks + known.tails[tail] if known.tails[tail] or blanks.strip() else known.tails[tail]
        return None if known.stop else self._to_end_token(text[one.end :])

    def _end_of_call(
        self, chat: Chat, number: int, text: str, start: int, said: dict[int, _Said], known: _Known
    ) -> int | None:
        """Return the end of a turn that calls tools, or of the call where later turns change what the turn was."""
        one, following = said[number], number + 1
        tokens = self._token.findall(known.stop)
        mark = tokens[-1] if tokens else known.stop.strip()
        until = said[following].start if following in said else len(text)
        at = text.find(mark, one.end, until) if mark else -1
        form = (text[start : one.start], text[one.end : at])
        if at >= 0 and form in known.calls:
            return at + len(mark)
        closed = (self._try(chat.messages[:following], chat.options) or "").rstrip()
        if len(closed) >= one.end and text.startswith(closed):
            if 0 <= at <= len(closed) - len(mark):
                known.calls.add(form)
                return at + len(mark)
            return len(closed)
        token = self._token.search(text, one.end, until)
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
        raise _refused(error) from error
    if not isinstance(text, str):
        raise ValidationError(f"The model's chat template makes no text of this chat, but {as_given(text)}.")
    return text


def token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return what finds the added tokens of a tokenizer in a text; nothing where there are none."""
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {""}
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")


def _is_special(message: Mapping[str, Any]) -> bool:
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


def _is_empty(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return not message.get("tool_calls") and (
        content is None or (isinstance(content, str) and not content.strip())
    )


def _left_out(message: Mapping[str, Any]) -> str:
    what = "a call of tools" if message.get("tool_calls") else "the assistant's answer"
    return (
        f"The model's chat template leaves {what} out, so that it cannot be learnt. Use a model whose template writes "
        f"it, or give the row as 'prompt' and 'completion'."
    )


def _refused(error: Exception) -> ValidationError:
    said = str(error).strip() or type(error).__name__
    return ValidationError(f"The model's chat template refuses this chat: {said}")
