"""How a reward function is called, and how what it returns is read into one `Outcome` for each rollout.

Ours, and those people bring from TRL, verl, OpenRLHF, verifiers and reasoning-gym. This file runs in the scoring
processes too and imports nothing heavy.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from typing import Any, NamedTuple

from tensafe_nb.errors import ValidationError

MAX_ERROR_TEXT = 500
_RETURNS = "expected a finite number or None"
_NO_LOG: dict[str, list[Any]] = {}


class Style(StrEnum):
    """Whose calling convention a reward function follows."""

    OURS = "tensafe_nb"
    TRL = "TRL"
    VERL = "verl"
    OPENRLHF = "OpenRLHF"
    VERIFIERS = "verifiers"
    GYM = "reasoning-gym"


class RewardSample(NamedTuple):
    """What a reward function may know of a rollout."""

    prompt: str
    response: str
    meta: Mapping[str, Any]
    tokens: Sequence[int] = ()


class Outcome(NamedTuple):
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
        conversational: Completions go as lists of one chat message instead of texts.
    """

    function: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    style: Style = Style.OURS
    names: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    open: bool = False
    positional: int = 3
    conversational: bool = False

    @property
    def batched(self) -> bool:
        """One call scores many rollouts, of different prompts."""
        return self.style in (Style.TRL, Style.OPENRLHF)

    @property
    def asynchronous(self) -> bool:
        """Its calls are awaited."""
        function = self.function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  # an object whose __call__ is a coroutine function
        )

    def units(self, samples: Sequence[RewardSample]) -> list[list[RewardSample]]:
        """Return the rollouts of each call."""
        if self.batched:
            return [list(samples)] if samples else []
        return [[sample] for sample in samples]

    def invoke(self, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> Any:
        """Call the function on the rollouts of one call; `log` takes what it logs by the way."""
        if self.style is Style.OURS:
            return self._ours(unit[0])
        return self.function(**self._chosen(_OFFERS[self.style](self, unit, log)))

    def read(
        self, value: Any, unit: Sequence[RewardSample], log: Mapping[str, list[Any]] = _NO_LOG
    ) -> list[Outcome]:
        """Return the outcome of each rollout of one call.

        Raises:
            ValidationError: A batch function gave another number of rewards than there are rollouts.
        """
        if not self.batched:
            return [read_value(value)]
        rewards, extras = _columns(value)
        if len(rewards) != len(unit):
            raise ValidationError(
                f"it returned {len(rewards)} rewards for {len(unit)} completions: return one for each."
            )
        parts = {name: column for name, column in {**extras, **log}.items() if len(column) == len(unit)}
        return [
            _with_parts(read_value(reward), {name: column[row] for name, column in parts.items()})
            for row, reward in enumerate(rewards)
        ]

    def _ours(self, sample: RewardSample) -> Any:
        tokens = {}
        if "tokens" in self.names and "tokens" not in self.kwargs:
            tokens["tokens"] = sample.tokens
        positional = (sample.prompt, sample.response, sample.meta)[: self.positional]
        return self.function(*positional, **tokens, **self.kwargs)

    def _chosen(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        missing = self.required - set(offered) - set(self.kwargs)
        if missing:
            raise ValidationError(
                f"the {self.style} reward function asks for {', '.join(sorted(missing))}, which the prompts do not "
                f'have. Give prompts as {{"prompt": …, "{min(missing)}": …}}.'
            )
        chosen = {name: value for name, value in offered.items() if self.open or name in self.names}
        return {**chosen, **self.kwargs}

    def _said(self, role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if self.conversational else text


def outcomes_of(call: Call, unit: Sequence[RewardSample]) -> list[Outcome]:
    """Make one call and return the outcome of each of its rollouts; what it raises becomes text."""
    log: dict[str, list[Any]] = {}
    try:
        return call.read(call.invoke(unit, log), unit, log)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # user code may raise anything: kept as text, counted
        return [failed(error)] * len(unit)


async def awaited_outcomes(call: Call, unit: Sequence[RewardSample]) -> list[Outcome]:
    """Do the same with a coroutine function."""
    log: dict[str, list[Any]] = {}
    try:
        return call.read(await call.invoke(unit, log), unit, log)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # as above
        return [failed(error)] * len(unit)


def failed(error: BaseException) -> Outcome:
    """Return the outcome of a call that raised."""
    return Outcome(error=f"{type(error).__name__}: {error}"[:MAX_ERROR_TEXT])


def read_value(value: Any) -> Outcome:
    """Read what a function returned for one rollout: a number, None, or a dict with `score` and parts."""
    if not isinstance(value, Mapping):
        return _number_or_error(value)
    if "score" not in value:
        return Outcome(error=f"returned a dict without 'score' ({', '.join(map(str, value))}), {_RETURNS}")
    return _with_parts(_number_or_error(value["score"]), {k: v for k, v in value.items() if k != "score"})


def _number_or_error(value: Any) -> Outcome:
    if value is None:
        return Outcome()
    number = _number(value)
    if number is None:
        return Outcome(error=f"returned {str(value)[:80]!r}, {_RETURNS}")
    return Outcome(number)


def _number(value: Any) -> float | None:
    """Return a finite number, or None for anything else; a text is no number."""
    try:
        value = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars
        number = float(value) if isinstance(value, Real) else math.nan
    except (OverflowError, ValueError, RuntimeError, TypeError):
        return None
    return number if math.isfinite(number) else None


def _with_parts(outcome: Outcome, further: Mapping[str, Any]) -> Outcome:
    """Keep the parts that are numbers; the texts some functions return beside them are not scores."""
    numbers = {str(name): number for name, value in further.items() if (number := _number(value)) is not None}
    return outcome._replace(parts={**(outcome.parts or {}), **numbers} or None)


def _columns(value: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the rewards and the further columns of a batch function's result."""
    if not isinstance(value, Mapping):
        return _list(value), {}
    if "rewards" not in value:
        raise ValidationError(f"it returned a dict without 'rewards' ({', '.join(map(str, value))}).")
    logs = value.get("extra_logs") or {}
    return _list(value["rewards"]), {name: _list(column) for name, column in logs.items()}


def _list(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValidationError(
            f"it returned {str(value)[:80]!r}, expected a list with one reward a completion."
        )
    return list(value)


def _verl(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    (sample,) = unit
    meta = sample.meta
    offered = {
        "data_source": meta.get("data_source"),
        "solution_str": sample.response,
        "extra_info": meta.get("extra_info", meta),
    }
    columns = {**meta, **meta.get("reward_model", {})}
    gold = [columns[name] for name in ("ground_truth", "answer") if name in columns]
    return offered | ({"ground_truth": gold[0]} if gold else {})


def _verifiers(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    (sample,) = unit
    offered = {
        "prompt": call._said("user", sample.prompt),
        "completion": call._said("assistant", sample.response),
        "task": sample.meta.get("task", "default"),
        "info": sample.meta.get("info", sample.meta),
    }
    if "answer" in sample.meta:
        offered["answer"] = sample.meta["answer"]
    return offered | {"state": dict(offered)}


def _trl(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    def log_extra(column: str, values: Sequence[Any]) -> None:
        log[column] = list(values)

    def log_metric(name: str, value: float) -> None:
        log[name] = [value] * len(unit)

    columns = dict.fromkeys(name for sample in unit for name in sample.meta)
    return {
        **{name: [sample.meta.get(name) for sample in unit] for name in columns},
        "prompts": [call._said("user", sample.prompt) for sample in unit],
        "completions": [call._said("assistant", sample.response) for sample in unit],
        "completion_ids": [list(sample.tokens) for sample in unit],
        "log_extra": log_extra,
        "log_metric": log_metric,
    }


def _openrlhf(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    def label(meta: Mapping[str, Any]) -> Any:
        return next((meta[name] for name in ("label", "labels", "answer") if name in meta), None)

    return {
        "queries": [sample.prompt + sample.response for sample in unit],
        "prompts": [sample.prompt for sample in unit],
        "labels": [label(sample.meta) for sample in unit],
    }


def _gym(call: Call, unit: Sequence[RewardSample], log: dict[str, list[Any]]) -> dict[str, Any]:
    (sample,) = unit
    missing = {"answer", "metadata"} - set(sample.meta)
    if missing:
        raise ValidationError(
            f"the prompts have no {' and no '.join(sorted(missing))}: take them from the same data set, with "
            f"tensafe_nb.rlvr.gym_prompts(dataset)."
        )
    entry = {"question": sample.prompt, "answer": sample.meta["answer"], "metadata": sample.meta["metadata"]}
    return {"answer": sample.response.strip(), "entry": entry}


_OFFERS: dict[Style, Callable[[Call, Sequence[RewardSample], dict[str, list[Any]]], dict[str, Any]]] = {
    Style.TRL: _trl,
    Style.VERL: _verl,
    Style.OPENRLHF: _openrlhf,
    Style.VERIFIERS: _verifiers,
    Style.GYM: _gym,
}
