"""Labels: the tokens of a row, and which of them the model learns: a completion, or the assistant's turns of a chat.

What is learnt is told by characters. All texts are tokenised in one call, and a token is learnt where it overlaps what
is learnt of the text. Where an answer begins, the tokens before it are those that sampling gives the model as its
prompt: where a token of the whole text would reach over that border, prompt and answer are tokenised apart.
"""

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tensafe_nb.data.chats import (
    LOOK_BACK,
    AddedTokens,
    Chat,
    Template,
    read_chat,
    render,
    template_keywords,
)
from tensafe_nb.data.messages import check_template
from tensafe_nb.data.values import shortened
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import Prompt

Encoded = tuple[list[int], list[bool]]
AT_ONCE = 250  # rows rendered while as many others are tokenised
PROBES = ("a", "1")
HEADS = 16  # headers of turns remembered with their tokens
ANCHORS = ("\x02", "\n", "=", "|", "a")  # put before a text, so that no tokenizer takes it for a beginning


@dataclass(slots=True)
class SourceText:
    """A text to be tokenised, and the characters of it that are learnt."""

    text: str
    spans: Sequence[tuple[int, int]]
    begins: bool  # with the tokenizer's first token
    ends: bool  # with its end token, which is learnt


def encode_many(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Encoded | ValidationError]:
    """Return of each row its tokens, and which of them are to be learnt; or what is wrong with it.

    Args:
        rows: Canonical ones, see `layouts.canonical`: {"text"}, {"prompt", "completion"}, or {"messages"} with "tools",
            "documents" and "chat_template_kwargs" for the template. A message with `weight: 0` is not learnt.
        tokenizer: The model's. Chats are tokenised as the template writes them, everything else between the tokenizer's
            own first token and its end token.
    """
    reader = RowReader(tokenizer)
    if len(rows) <= AT_ONCE:
        return reader.labelled(texts := reader.texts(rows), reader.encodings(texts))
    made: list[Encoded | ValidationError] = []
    before: tuple[Any, Any] | None = None
    with ThreadPoolExecutor(
        max_workers=1
    ) as other:  # the tokenizer needs no GIL: it works while templates render
        for start in range(0, len(rows), AT_ONCE):
            texts = reader.texts(rows[start : start + AT_ONCE])
            encodings = other.submit(reader.encodings, texts)
            if before is not None:
                made += reader.labelled(before[0], before[1].result())
            before = texts, encodings
        if before is not None:
            made += reader.labelled(before[0], before[1].result())
    return made


class RowReader:
    """Rows to labelled tokens, in three steps: texts, their encodings, what is learnt of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens = TextTokens(tokenizer)
        self._template: Template | None = None

    def texts(self, rows: Sequence[Mapping[str, Any]]) -> list[SourceText | ValidationError]:
        texts: dict[int, SourceText | ValidationError] = {}
        chats: dict[int, Chat] = {}
        for number, row in enumerate(rows):
            if "messages" in row:
                try:
                    chats[number] = read_chat(row)
                except ValidationError as error:
                    texts[number] = error
            elif "prompt" in row:
                text = row["prompt"] + row["completion"]
                texts[number] = SourceText(text, [(len(row["prompt"]), len(text))], begins=True, ends=True)
            else:
                texts[number] = SourceText(row["text"], [(0, len(row["text"]))], begins=True, ends=True)
        texts.update(zip(chats, self.chat_texts(list(chats.values())), strict=True))
        return [texts[number] for number in range(len(rows))]

    def chat_texts(self, chats: Sequence[Chat]) -> list[SourceText | ValidationError]:
        if not chats:
            return []
        try:
            self._template = self._template or Template(self._tokenizer)
        except ValidationError as error:
            return [error] * len(chats)
        return [
            one
            if isinstance(one, ValidationError)
            else SourceText(one.text, one.spans, begins=False, ends=one.unended)
            for one in self._template.rendered(chats)
        ]

    def encodings(self, texts: Sequence[SourceText | ValidationError]) -> list[Any]:
        return self._tokens.encodings([text for text in texts if isinstance(text, SourceText)])

    def labelled(
        self, texts: Sequence[SourceText | ValidationError], encodings: Sequence[Any]
    ) -> list[Encoded | ValidationError]:
        good = iter(
            self._tokens.labelled([text for text in texts if isinstance(text, SourceText)], encodings)
        )
        return [text if isinstance(text, ValidationError) else next(good) for text in texts]


def encode_prompt(tokenizer: Any, prompt: Prompt, texts: "TextTokens | None" = None) -> list[int]:
    """Return the token ids of a text, of chat messages (opened for the assistant's answer), or of ids.

    A chat with tools is {"messages", "tools"}, as `data.read_prompts` makes it. A text has the tokenizer's own first
    token and none of its last ones: what is drawn goes on from here. Who asks often brings what tokenises `texts`.
    """
    if isinstance(prompt, str):
        return (texts or TextTokens(tokenizer)).prompt(prompt)
    if isinstance(prompt, Mapping) and "tokens" in prompt:
        return list(prompt["tokens"])
    if isinstance(prompt, Mapping):
        return opened_chat(tokenizer, prompt["messages"], template_keywords(prompt))
    if prompt and isinstance(prompt[0], Mapping):
        return opened_chat(tokenizer, prompt, {})
    return [int(token) for token in prompt]  # type: ignore[arg-type]


def check_context(what: str, length: int, new_tokens: int, context: int | None) -> None:
    """Refuse a prompt of so many tokens that what is to be drawn does not fit behind it; None is no limit.

    Raises:
        ValidationError: With what would fit.
    """
    if context is None or length + new_tokens <= context:
        return
    room = context - length
    advice = (
        f"Set max_new_tokens to {room} or less, or shorten the prompt." if room > 0 else "Shorten the prompt."
    )
    raise ValidationError(
        f"{what} has {length} tokens; with max_new_tokens={new_tokens} that is more than the model's context of "
        f"{context}. {advice}"
    )


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What ends an answer, beside the tokenizer's own end token: some tokens, and texts that are no token."""

    tokens: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, stops: Sequence[str]) -> "TurnEnd":
        """Return the turn end of texts that end turns: where one holds added tokens, its last of them is enough."""
        token = AddedTokens(tokenizer).pattern
        added = [token.findall(stop)[-1] for stop in stops if token.search(stop)]
        ids = tokenizer.convert_tokens_to_ids(added)
        return cls(frozenset(ids), tuple(stop.strip() for stop in stops if not token.search(stop)))


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt; of texts, all at once. See `encode_prompt`."""
    tokens = TextTokens(tokenizer)
    texts = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
    known = dict(zip(texts, tokens.prompts(texts), strict=True))
    return [
        list(known[prompt]) if isinstance(prompt, str) else encode_prompt(tokenizer, prompt)
        for prompt in prompts
    ]


def turn_ends(tokenizer: Any, prompts: Sequence[Prompt]) -> list[TurnEnd]:
    """Return for each prompt what ends a turn in its chat as it is learnt; nothing more for what is no chat."""
    template = Template(tokenizer) if tokenizer.chat_template is not None else None
    known: dict[str, TurnEnd] = {}
    ends = []
    for prompt in prompts:
        chat: Any = {} if not isinstance(prompt, str | Mapping) and isinstance(prompt[0], Mapping) else None
        if isinstance(prompt, Mapping):
            chat = prompt.get("chat") if "tokens" in prompt else prompt
        if template is None or chat is None:
            ends.append(TurnEnd())
            continue
        options = template_keywords(chat)
        key = repr(options)
        if key not in known:
            known[key] = TurnEnd.of(tokenizer, template.turn_ends(options))
        ends.append(known[key])
    return ends


def opened_chat(tokenizer: Any, messages: Sequence[Any], options: Mapping[str, Any]) -> list[int]:
    """Return the tokens of a chat up to where the assistant's next answer begins.

    Raises:
        ValidationError: There is no chat template, or it does not show what is asked.
    """
    if tokenizer.chat_template is None:
        raise ValidationError("This model has no chat template: give prompts as text instead of messages.")
    check_template(tokenizer.chat_template, messages, options.get("tools"))
    chat = [dict(message) for message in messages]
    text = render(tokenizer, chat, options, opened=True)
    asked = chat[-1].get("content")
    if asked and asked.strip() not in text:  # written otherwise, or not at all
        twice = [*chat[:-1], chat[-1] | {"content": f"{asked} {asked}"}]
        if render(tokenizer, twice, options, opened=True) == text:
            raise ValidationError(
                f"The model's chat template leaves out what the last message says ({shortened(asked)!r}): the model "
                f"would not see it. Use a model whose template writes texts, or give the prompt as a text."
            )
    return TextTokens(tokenizer).ids(text)


@dataclass(slots=True)
class TokenPiece:
    """The characters from `low` to `high` of a text, tokenised after an anchor that is left out again."""

    encoding: Any
    low: int
    high: int
    anchor: int = 0
    skip: int = 0  # the anchor's tokens

    def first(self, start: int) -> int | None:
        """Return the first token with a character from `start` on; None if there is none."""
        shift = self.anchor - self.low
        for at in range(start, self.high):
            token = self.encoding.char_to_token(at + shift)
            if token is not None:
                return int(token)
        return None

    def begins(self, token: int) -> int:
        return int(self.encoding.token_to_chars(token)[0]) - self.anchor + self.low

    def learnt(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Return which of the piece's tokens overlap the spans."""
        learnt = [False] * len(self.encoding)
        for start, end in spans:
            first = self.first(max(start, self.low))
            if first is None or end <= self.low or self.begins(first) >= end:
                continue
            last = self.first(end)
            if last is None:
                last = len(learnt)  # the span reaches to the end of the text
            elif self.begins(last) < end:
                last += 1
            learnt[first:last] = [True] * (last - first)
        return learnt[self.skip :] if self.skip else learnt

    def tokens(self) -> list[int]:
        return self.encoding.ids[self.skip :] if self.skip else self.encoding.ids  # type: ignore[no-any-return]


class TextTokens:
    """A tokenizer, asked for many texts at once, by their characters where it has offsets."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._heads: dict[str, list[int]] = {}
        self._added = AddedTokens(tokenizer)
        self._backend: Any = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        self._compared = False

    @cached_property
    def _habits(self) -> tuple[list[int], bool]:
        """Return the tokens that the tokenizer puts before a text, and whether it invents a space there."""
        for probe in PROBES:
            try:
                bare, whole = self.ids(probe), list(self._tokenizer(probe)["input_ids"])
            except ValidationError:  # a small vocabulary
                continue
            at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
            named = self._tokenizer.convert_ids_to_tokens(bare[:1])
            return whole[:at], bool(named) and str(named[0])[:1] in "▁Ġ"
        return [], False

    def ids(self, text: str, what: str = "text") -> list[int]:
        """Return the tokens of a text, and none of the tokenizer's own around them.

        Raises:
            ValidationError: The tokenizer cannot read it.
        """
        try:
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception as error:  # tokenizers raises nothing more specific
            raise untokenisable(what, text, error) from error

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a text that sampling goes on from."""
        return self._begun(self.ids(text, "prompt"))

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each of some texts that sampling goes on from."""
        if len(texts) > 1:
            with contextlib.suppress(Exception):  # one by one, it says which text cannot be read
                each = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
                return [self._begun(list(ids)) for ids in each]
        return [self.prompt(text) for text in texts]

    def _begun(self, ids: list[int]) -> list[int]:
        """Return tokens with those before them that the tokenizer puts before a text."""
        first, _ = self._habits
        return ids if ids[: len(first)] == first else first + ids

    def encodings(self, texts: Sequence[SourceText]) -> list[Any]:
        """Return each text as the tokenizer's backend encodes it, or why it cannot; nothing where that is not all."""
        if not texts or not self.has_offsets(texts[0].text):
            return []
        return self._encodings([text.text for text in texts])

    def labelled(
        self, texts: Sequence[SourceText], encodings: Sequence[Any]
    ) -> list[Encoded | ValidationError]:
        """Return the tokens of each text and which are learnt, or why the tokenizer cannot read it."""
        if not encodings:
            return [self.labelled_apart(text) for text in texts]
        prompts = [self.prompt_to_check(text) for text in texts]
        checks = iter(self._encodings([prompt for prompt in prompts if prompt is not None]))
        made: list[Encoded | ValidationError] = []
        for encoding, text, prompt in zip(encodings, texts, prompts, strict=True):
            check = next(checks) if prompt is not None else None
            if isinstance(encoding, ValidationError):
                made.append(encoding)
                continue
            whole = TokenPiece(encoding, 0, len(text.text))
            tokens, learnt = whole.tokens(), whole.learnt(text.spans)
            # the answer must follow the tokens that sampling gives: else it is tokenised apart from its prompt
            borders = self.borders(whole, tokens, text)
            if check is not None and tokens[: len(check.ids)] != check.ids:
                borders.append(len(prompt or ""))
            if borders:
                edges = pairwise(sorted({0, *borders, len(text.text)}))
                pieces = [self.piece(text.text, low, high) for low, high in edges]
                tokens = [token for piece in pieces for token in piece.tokens()]
                learnt = [one for piece in pieces for one in piece.learnt(text.spans)]
            made.append(self._ended(tokens, learnt, text))
        return made

    def has_offsets(self, text: str) -> bool:
        """Whether the backend says all: some tokenizers do more in Python, and then only their own tokens count.

        Their call also undoes a truncation or a padding that was saved with the tokenizer.
        """
        if self._backend is not None and not self._compared:
            try:
                same = self.ids(text) == self._backend.encode(text, add_special_tokens=False).ids
            except ValidationError:  # the text's fault: it comes out again below, under its number
                return True
            self._compared, self._backend = True, self._backend if same else None
        return self._backend is not None

    def _encodings(self, texts: list[str]) -> list[Any]:
        try:
            return self._encode_batch(texts)
        except ValidationError as error:
            return [error] if len(texts) == 1 else [one for text in texts for one in self._encodings([text])]

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        try:
            return list(self._backend.encode_batch(texts, add_special_tokens=False))
        except Exception as error:  # tokenizers raises nothing more specific
            raise untokenisable("text", texts[0], error) from error

    def borders(self, whole: TokenPiece, tokens: list[int], text: SourceText) -> list[int]:
        """Return where an answer begins in the middle of a token, or after other tokens than its prompt has."""
        apart = []
        for start, end in text.spans:
            token = whole.first(start) if 0 < start < end else None
            if token is not None:
                head = self._head(text.text, start)
                before = tokens[max(0, token - len(head)) : token]
                if whole.begins(token) != start or before != head:
                    apart.append(start)
        return apart

    def _head(self, text: str, until: int) -> list[int]:
        """Return the tokens from the last added one before a place on: what stands before has no say in them."""
        for head, ids in self._heads.items():
            if text.endswith(head, 0, until):
                return ids
        found = list(self._added.pattern.finditer(text, max(0, until - LOOK_BACK), until))
        if not found:
            return []
        head = text[found[-1].start() : until]
        ids = self.ids(head)
        if len(self._heads) < HEADS:
            self._heads[head] = ids
        return ids

    def prompt_to_check(self, text: SourceText) -> str | None:
        """Return the prompt of the last answer, if its tokens are known only once it is tokenised by itself."""
        start = text.spans[-1][0] if text.spans else 0
        return text.text[:start] if start and not self._head(text.text, start) else None

    def piece(self, text: str, low: int, high: int) -> TokenPiece:
        """Tokenise a part of a text as the middle of one: without the space that some tokenizers put first."""
        for anchor in ANCHORS if low and self._habits[1] else ():
            (encoding,) = self._encode_batch([anchor + text[low:high]])
            piece = TokenPiece(encoding, low, high, len(anchor))
            token = piece.first(low)
            if token is not None and piece.begins(token) == low:  # the anchor has kept its tokens for itself
                piece.skip = token
                return piece
        (encoding,) = self._encode_batch([text[low:high]])
        return TokenPiece(encoding, low, high)

    def _ended(self, tokens: list[int], learnt: list[bool], text: SourceText) -> Encoded:
        """Put the first token before a text and the end token after it, unless the text has them already."""
        if not text.begins and not text.ends:
            return tokens, learnt
        # a text that begins or ends with them already, as some data sets do, gets no second one
        first = self._habits[0] if text.begins else []
        first = [] if tokens[: len(first)] == first else first
        end = self._tokenizer.eos_token_id
        due = text.ends and end is not None and not (tokens[-1:] == [end] and learnt[-1])
        return [*first, *tokens, *[end] * due], [*[False] * len(first), *learnt, *[True] * due]

    def labelled_apart(self, text: SourceText) -> Encoded | ValidationError:
        """Tokenise what is learnt and what is not apart, each as the middle of a text."""
        tokens: list[int] = []
        learnt: list[bool] = []
        try:
            for low, high in pairwise(
                sorted({0, len(text.text), *(at for span in text.spans for at in span)})
            ):
                part = self.middle(text.text[low:high]) if low else self.ids(text.text[:high])
                tokens += part
                learnt += [any(start <= low < end for start, end in text.spans)] * len(part)
            whole = self.ids(text.text)
        except ValidationError as error:
            return error
        # other tokens are fine if they say the same: a word may be split where the answer begins
        if tokens != whole and self._tokenizer.decode(tokens) != self._tokenizer.decode(whole):
            return ValidationError(
                f"The model's tokenizer ({type(self._tokenizer).__name__}) does not say which characters a token "
                f"stands for, and {as_given(shortened(text.text))} cannot be tokenised in parts. "
                f"Use the model's fast tokenizer."
            )
        return self._ended(tokens, learnt, text)

    def middle(self, text: str) -> list[int]:
        for anchor in ANCHORS if self._habits[1] else ():
            before, both = self.ids(anchor), self.ids(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.ids(text)


def untokenisable(what: str, text: str, error: Exception) -> ValidationError:
    return ValidationError(
        f"The model's tokenizer cannot read the {what} {as_given(shortened(text))}: {error}."
    )
