"""Calls of reward functions by the conventions they follow; what they return becomes an `Verdict` for each rollout.

Ours, and those people bring from TRL, verl, OpenRLHF, verifiers and reasoning-gym. This file runs in the scoring
processes too and imports nothing heavy.
"""

import copy
import inspect
import linecache
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from numbers import Real
from typing import Any, NamedTuple

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, users_frames
from tensafe_nb.rlvr.rewards.builtin.answers import is_missing

MAX_ERROR_TEXT = 500
_RETURNS = "expected a finite number or None"
_NO_LOG: dict[str, list[Any]] = {}


class Style(StrEnum):
    """Whose calling convention a reward function follows."""

    OURS = "tensafe_nb"
    TRL = "TRL"
    VERL = "verl"
    VERL_BATCH = "verl (batch)"
    OPENRLHF = "OpenRLHF"
    VERIFIERS = "verifiers"
    GYM = "reasoning-gym"


class Conversation(list[Any]):
    """Chat messages, as a list of dicts with `role` and `content`.

    Functions written for texts meet them too, and many of those take whatever fails for a wrong answer. So it answers
    as its text would where a list has no answer: `"words" in messages`, `messages == "words"`, `messages + "words"`,
    `messages.strip()`, `messages.count("words")`, `str(messages)`. Length, items and all else are a list's.
    """

    __hash__ = None

    def __str__(self) -> str:
        return "\n".join(map(text_of, self))

    def __contains__(self, item: object) -> bool:
        return item in str(self) if isinstance(item, str) else super().__contains__(item)

    def __eq__(self, other: object) -> bool:
        return str(self) == other if isinstance(other, str) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __add__(self, other: Any) -> Any:
        return str(self) + other if isinstance(other, str) else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return other + str(self) if isinstance(other, str) else [*other, *self]

    def count(self, item: Any) -> int:
        return str(self).count(item) if isinstance(item, str) else super().count(item)

    def index(self, item: Any, *within: Any) -> int:
        return str(self).index(item, *within) if isinstance(item, str) else super().index(item, *within)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(str, name):
            raise AttributeError(f"a list of chat messages has no {as_given(name)}, and neither has its text")
        return getattr(str(self), name)


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be missing (a tool call) or in parts."""
    content = message.get("content")
    if isinstance(content, str | None):
        return content or ""
    return "".join(part.get("text") or "" if isinstance(part, Mapping) else str(part) for part in content)


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, for functions written for TRL.

    Attributes:
        global_step: Steps taken before this one.
        max_steps: Steps there will be.
    """

    global_step: int = 0
    max_steps: int = 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has global_step and max_steps here, but no {as_given(name)}")


class RewardSample(NamedTuple):
    """What a reward function may know of a rollout.

    Attributes:
        prompt: Text of the prompt.
        response: Text of the response.
        meta: The prompt's further columns.
        tokens: The response's token ids.
        messages: The prompt as it was given, if that was chat messages.
        state: Where the run stands.
    """

    prompt: str
    response: str
    meta: Mapping[str, Any]
    tokens: Sequence[int] = ()
    messages: Sequence[Mapping[str, Any]] | None = None
    state: TrainerState = TrainerState()

    def copied(self) -> "RewardSample":
        """Return a copy that a function may change without changing the prompt, which other rollouts share."""
        try:
            return self._replace(meta=copy.deepcopy(self.meta), messages=copy.deepcopy(self.messages))
        except TypeError:  # something in it cannot be copied, such as a lock
            return self._replace(meta=self.meta and dict(self.meta))


class Verdict(NamedTuple):
    """What scoring a rollout gave: a score, an abstention (all None), or an error."""

    score: float | None = None
    parts: dict[str, float] | None = None
    error: str | None = None
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A function with its keywords bound, and how to call it.

    Attributes:
        function: The user's own.
        kwargs: Its bound keywords.
        style: Whose convention it follows.
        names: Parameters it declares.
        required: Those it cannot do without.
        open: It takes any keyword.
        positional: How many of (prompt, response, meta) it takes, in our own style.
        conversational: Prompts and completions go as chat messages, or as texts; None: as the prompts were given.
    """

    function: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    style: Style = Style.OURS
    names: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    open: bool = False
    positional: int = 3
    conversational: bool | None = None

    @property
    def batched(self) -> bool:
        """One call scores many rollouts, of different prompts."""
        return self.style in (Style.TRL, Style.OPENRLHF, Style.VERL_BATCH)

    @property
    def asynchronous(self) -> bool:
        """Its calls are awaited."""
        called = getattr(self.function, "__call__", None)  # noqa: B004  # of an object, it may be a coroutine function
        wrapped = inspect.unwrap(self.function)
        return any(map(inspect.iscoroutinefunction, (self.function, called, wrapped)))

    @property
    def limits_itself(self) -> bool:
        """Its function keeps its own time, and decides how many calls are under way: a judge."""
        return getattr(type(self.function), "limits_itself", False) is True

    def answered(self, unit: Sequence[RewardSample]) -> list[Any]:
        """Make one call, for a pipe: return score, parts and error of each rollout."""
        return [verdict[:3] for verdict in outcomes_of(self, unit)]

    def units(self, samples: Sequence[RewardSample]) -> list[list[RewardSample]]:
        """Return the rollouts of each call."""
        if self.batched:
            return [list(samples)] if samples else []
        return [[sample] for sample in samples]

    def invoke(self, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> Any:
        """Call the function on the rollouts of one call; `log` takes what it logs by the way."""
        if self.style is Style.OURS:
            return self.call_ours(unit[0])
        offered = _ARGUMENTS[self.style](self, unit, log)
        missing = self.required - set(offered) - set(self.kwargs)
        if missing:
            raise ValidationError(
                f"the {self.style} reward function asks for {', '.join(sorted(missing))}, which the prompts do not "
                f'have. Give prompts as {{"prompt": …, "{min(missing)}": …}}.'
            )
        chosen = {name: value for name, value in offered.items() if self.open or name in self.names}
        return self.function(**{**chosen, **self.kwargs})

    def read(
        self, value: Any, unit: Sequence[RewardSample], log: Mapping[str, list[Any]] = _NO_LOG
    ) -> list[Verdict]:
        """Return the outcome of each rollout of one call.

        Raises:
            ValidationError: A batch function gave another number of rewards than there are rollouts.
        """
        if not self.batched:
            return [read_value(value)]
        rewards, extras = columns_of(value)
        if len(rewards) != len(unit):
            raise ValidationError(
                f"it returned {len(rewards)} rewards for {len(unit)} completions: return one for each."
            )
        parts = {name: column for name, column in {**extras, **log}.items() if len(column) == len(unit)}
        return [
            _with_parts(read_value(reward), {name: column[row] for name, column in parts.items()})
            for row, reward in enumerate(rewards)
        ]

    def call_ours(self, sample: RewardSample) -> Any:
        """Call a function of our own convention: (prompt, response[, meta]), and the tokens where it names them."""
        tokens = {}
        if "tokens" in self.names and "tokens" not in self.kwargs:
            tokens["tokens"] = sample.tokens
        prompt = self.prompt_of(sample) if self.conversational is not False else sample.prompt
        positional = (prompt, sample.response, sample.meta)[: self.positional]  # fn(prompt, response[, meta])
        columns = {}
        if self.open and self.positional == 2:  # fn(prompt, response, **columns)
            taken = self.names | set(self.kwargs)
            columns = {name: value for name, value in (sample.meta or {}).items() if name not in taken}
        return self.function(*positional, **columns, **tokens, **self.kwargs)

    def is_chat(self, sample: RewardSample) -> bool:
        """Whether it gets messages."""
        return sample.messages is not None if self.conversational is None else self.conversational

    def prompt_of(self, sample: RewardSample) -> Any:
        """Return the prompt as the function gets it: a text, or messages."""
        if not self.is_chat(sample):
            return sample.prompt
        return Conversation(sample.messages or [{"role": "user", "content": sample.prompt}])

    def completion_of(self, sample: RewardSample) -> Any:
        """Return the response likewise."""
        if not self.is_chat(sample):
            return sample.response
        return Conversation([{"role": "assistant", "content": sample.response}])

    def hint(self, unit: Sequence[RewardSample]) -> str:
        """Say how prompts and completions came, to somebody who took them for something else."""
        if self.style is Style.OURS:
            if self.conversational is False or not any(sample.messages for sample in unit):
                return ""
            return (
                " (the prompt is a list of chat messages: read prompt[-1]['content'] or str(prompt), or declare it as "
                "prompt: str to get its text)"
            )
        if self.style not in (Style.TRL, Style.VERIFIERS):
            return ""
        if any(map(self.is_chat, unit)):
            return (
                " (prompts and completions are lists of chat messages here: read completion[-1]['content'], or take "
                "resolve_reward(function, conversational=False) to get texts)"
            )
        return (
            " (prompts and completions are texts here, as the prompts were given: give prompts as messages, or take "
            "resolve_reward(function, conversational=True))"
        )


def outcomes_of(call: Call, unit: Sequence[RewardSample]) -> list[Verdict]:
    """Make one call and return the outcome of each of its rollouts; what it raises becomes text."""
    log: dict[str, list[Any]] = {}
    try:
        value = call.invoke([sample.copied() for sample in unit], log)
        if inspect.iscoroutine(value):
            value.close()
            raise ValidationError("it returned a coroutine: write the function itself as async def")
        return call.read(value, unit, log)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # user code may raise anything: kept as text, counted
        return [failed(error, call.hint(unit))] * len(unit)


async def awaited_outcomes(call: Call, unit: Sequence[RewardSample]) -> list[Verdict]:
    """Do the same with a coroutine function."""
    log: dict[str, list[Any]] = {}
    try:
        value = call.invoke([sample.copied() for sample in unit], log)
        return call.read(await value if inspect.isawaitable(value) else value, unit, log)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # as above
        return [failed(error, call.hint(unit))] * len(unit)


def failed(error: BaseException, hint: str = "") -> Verdict:
    """Return the outcome of a call that raised; the hint goes with errors of the wrong kind of thing."""
    try:
        text = f"{type(error).__name__}: {error}"[:MAX_ERROR_TEXT]
    except Exception:  # noqa: BLE001  # its __str__ is user code too
        text = f"{type(error).__name__}, whose text cannot be made"
    text += line_of(error)
    return Verdict(error=text + hint if isinstance(error, TypeError | AttributeError) else text)


def line_of(error: BaseException) -> str:
    """Say where in the user's own code a call raised, counted from the first line of that function, if it was there."""
    trace, _ = users_frames(error.__traceback__)
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    line = linecache.getline(code.co_filename, trace.tb_lineno).strip()  # of a cell, in its own process only
    return f" (line {trace.tb_lineno - code.co_firstlineno + 1} of {code.co_name}{line and f': {line}'})"


def read_value(value: Any) -> Verdict:
    """Read what a function returned for one rollout: a number, None, or a dict with `score` and parts."""
    if not isinstance(value, Mapping):
        return _number_or_error(value)
    if "score" not in value:
        return Verdict(error=f"returned a dict without 'score' ({', '.join(map(str, value))}), {_RETURNS}")
    return _with_parts(_number_or_error(value["score"]), {k: v for k, v in value.items() if k != "score"})


def _number_or_error(value: Any) -> Verdict:
    if value is None:
        return Verdict()
    number = number_of(value)
    if number is None:
        return Verdict(error=f"returned {str(value)[:80]!r}, {_RETURNS}")
    return Verdict(number)


def number_of(value: Any) -> float | None:
    """Return a finite number, or None for anything else; a text is no number."""
    try:
        value = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars
        number = float(value) if isinstance(value, Real | Decimal) else math.nan
    except (OverflowError, ValueError, RuntimeError, TypeError):
        return None
    return number if math.isfinite(number) else None


def _with_parts(outcome: Verdict, further: Mapping[str, Any]) -> Verdict:
    """Keep the parts that are numbers; the texts some functions return beside them are not scores."""
    numbers = {
        str(name): number for name, value in further.items() if (number := number_of(value)) is not None
    }
    return outcome._replace(parts={**(outcome.parts or {}), **numbers} or None)


def columns_of(value: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the rewards and the further columns of a batch function's result."""
    if not isinstance(value, Mapping):
        return _list(value), {}
    if "rewards" not in value:
        raise ValidationError(f"it returned a dict without 'rewards' ({', '.join(map(str, value))}).")
    logs = value.get("extra_logs") or {}
    return _list(value["rewards"]), {name: _list(column) for name, column in logs.items()}


def _list(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    value = list(value) if isinstance(value, Iterator) else value
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValidationError(
            f"it returned {str(value)[:80]!r}, expected a list with one reward a completion."
        )
    return list(value)


def _verl_row(sample: RewardSample) -> dict[str, Any]:
    """Return what verl knows of a rollout; without `ground_truth` where the prompt has none."""
    meta = sample.meta
    row = {
        "data_source": meta.get("data_source"),
        "solution_str": sample.response,
        "extra_info": meta.get("extra_info", meta),
    }
    rules = meta.get("reward_model")  # where verl's own data sets keep the answer
    columns = {**meta, **(rules if isinstance(rules, Mapping) else {})}
    gold = [columns[name] for name in ("ground_truth", "answer") if not is_missing(columns.get(name))]
    return row | ({"ground_truth": gold[0]} if gold else {})


def verl_arguments(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the arguments of a verl function."""
    (sample,) = unit
    prompt = {"prompt": call.prompt_of(sample)} if "prompt" in call.names else {}
    return _verl_row(sample) | prompt


def verl_batch_arguments(
    call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]
) -> dict[str, Any]:
    """Return those of one of verl's batch functions, whose names are plural."""
    rows = [_verl_row(sample) for sample in unit]
    without = sum("ground_truth" not in row for row in rows)
    if without and "ground_truths" in call.required:
        raise ValidationError(
            f"{without} of {len(rows)} prompts have no ground truth. Give prompts as "
            f'{{"prompt": …, "ground_truth": …}}.'
        )
    plural = {"data_sources": "data_source", "solution_strs": "solution_str", "extra_infos": "extra_info"}
    columns = {many: [row[one] for row in rows] for many, one in plural.items()}
    return columns | {"ground_truths": [row.get("ground_truth") for row in rows]}


def verifiers_arguments(
    call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]
) -> dict[str, Any]:
    """Return those of a verifiers function of a single turn."""
    (sample,) = unit
    offered = {
        **{name: value for name, value in sample.meta.items() if name != "answer" or not is_missing(value)},
        "prompt": call.prompt_of(sample),
        "completion": call.completion_of(sample),
        "task": sample.meta.get("task", "default"),
        "info": sample.meta.get("info", sample.meta),
    }
    return offered | {"state": dict(offered)}


def trl_arguments(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    """Return those of a TRL function: all completions and columns, the trainer's state, and two ways to log."""
    logged: dict[str, list[float]] = {}

    def log_extra(column: str, values: Sequence[Any]) -> None:
        if len(values) != len(unit):
            raise ValidationError(
                f"log_extra({as_given(column)}) has {len(values)} values for {len(unit)} completions: give one for "
                f"each."
            )
        log[column] = list(values)

    def log_metric(name: str, value: float) -> None:
        values = logged.setdefault(name, [])
        values.append(float(value))
        log[name] = [sum(values) / len(values)] * len(unit)

    columns = dict.fromkeys(name for sample in unit for name in sample.meta)
    return {
        **{name: [sample.meta.get(name) for sample in unit] for name in columns},
        "prompts": [call.prompt_of(sample) for sample in unit],
        "completions": [call.completion_of(sample) for sample in unit],
        "completion_ids": [list(sample.tokens) for sample in unit],
        "trainer_state": unit[0].state,
        "log_extra": log_extra,
        "log_metric": log_metric,
    }


def openrlhf_arguments(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    """Return those of an OpenRLHF function."""

    def label(meta: Mapping[str, Any]) -> Any:
        return next((meta[name] for name in ("label", "labels", "answer") if name in meta), None)

    return {
        "queries": [sample.prompt + sample.response for sample in unit],
        "prompts": [sample.prompt for sample in unit],
        "labels": [label(sample.meta) for sample in unit],
    }


def gym_arguments(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    """Return those of a reasoning-gym data set's `score_answer`."""
    (sample,) = unit
    missing = {"answer", "metadata"} - set(sample.meta)
    if missing:
        raise ValidationError(
            f"the prompts have no {' and no '.join(sorted(missing))}: take them from the same data set, with "
            f"tensafe_nb.rlvr.gym_prompts(dataset)."
        )
    entry = {"question": sample.prompt, "answer": sample.meta["answer"], "metadata": sample.meta["metadata"]}
    return {"answer": sample.response.strip(), "entry": entry}


_ARGUMENTS: dict[Style, Callable[[Call, Sequence[RewardSample], dict[str, list[Any]]], dict[str, Any]]] = {
    Style.TRL: trl_arguments,
    Style.VERL: verl_arguments,
    Style.VERL_BATCH: verl_batch_arguments,
    Style.OPENRLHF: openrlhf_arguments,
    Style.VERIFIERS: verifiers_arguments,
    Style.GYM: gym_arguments,
}
