"""The contract between the engine and a loss function: what a loss sees, and what it may return.

A loss is `fn(outputs, batch, **keywords)`. Of a batch with B rows of T positions, N of them labelled, it sees

- `outputs`: a `LossOutputs`, views of what the model says, each computed when it is first read;
- `batch`: `labels` (N,), `sequence_index` (N,) (the row of each label), `input_ids` and `attention_mask` (B, T), and
  the batch's own entries: per token flattened to (N,), per sequence (B,) or (B, K).

It returns a scalar mean or one value per row (B,), alone or as {"loss": …, "metrics": {name: number}, "weight": …}.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.losses.views import LossOutputs
from tensafe_nb.protocol.batch import REFERENCE, TICKET, BatchData
from tensafe_nb.protocol.losses import LossDeclaration, no_such_loss
from tensafe_nb.registry import Registry, check_keywords, name_of, signature_of

LossFunction: TypeAlias = Callable[..., "Tensor | Mapping[str, Any]"]
ALWAYS_ALLOWED = frozenset(
    {"example_ids", "unit_ids", "record_id", TICKET}
)  # travel along, no loss reads them
RESERVED = frozenset({"loss", "grad_norm", "learning_rate", "param_delta_norm"})  # curves every step has
RETURNED = frozenset({"loss", "metrics", "weight"})


class LossValue(NamedTuple):
    """A checked return value: `total` is what is differentiated, `weight` what it is divided by in the end."""

    total: Tensor
    weight: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a loss says of itself when it is registered; `register_loss` says what each means."""

    prenormalised: bool = False
    splittable: bool = True
    group: int = 1
    per: Literal["token", "row"] = "token"
    extras: tuple[str, ...] | None = None
    optional_extras: tuple[str, ...] = ()
    per_row: bool = False
    reference: bool = False

    def rows_at_a_time(self, rows: int, fitting: int) -> int:
        """Return how many of a batch's rows to compute together where `fitting` of them fit: whole groups."""
        return max(1, fitting // self.group) * self.group if self.splittable else rows


@dataclass(frozen=True, slots=True, repr=False)
class Loss:
    """A loss function with its keywords bound: `loss(outputs, batch)` gives the checked value."""

    name: str
    function: LossFunction
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    declares: Declaration = field(default_factory=Declaration)
    spec: str | None = None  # the name or path it was resolved from, which can leave this process
    _can_be_called: bool = field(default=False, init=False, compare=False)  # it was looked at before

    def bind(self, **kwargs: Any) -> "Loss":
        """Return the loss with further keywords; they override those bound before.

        Raises:
            ValidationError: A keyword the function does not name.
        """
        if not kwargs:
            return self
        check_keywords(self.function, kwargs, "loss", positional=2)
        return replace(self, kwargs={**self.kwargs, **kwargs})

    def check(self, batch: BatchData) -> None:
        """Refuse, before anything is computed, a batch that does not fit, or keywords that are missing.

        Raises:
            ValidationError: Groups that are not whole, entries that are missing or would be dropped silently.
        """
        self.check_call()
        if len(batch) % self.declares.group:
            raise ValidationError(
                f"The loss {as_given(self.name)} takes rows in groups of {self.declares.group}, one after the other; "
                f"the batch has {len(batch)}. tensafe_nb.data.batches lays out pairs."
            )
        self.check_extras(set(batch.extras))

    def check_extras(self, names: set[str]) -> None:
        """Refuse what the loss would silently drop, and the lack of what it needs."""
        if self.declares.extras is None:
            return
        known = {*self.declares.extras, *self.declares.optional_extras}
        for name in sorted(names - known - ALWAYS_ALLOWED):
            raise ValidationError(
                f"The loss {as_given(self.name)} does not use the batch entry {as_given(name)}.{nearest(name, known)}"
            )
        for name in sorted(set(self.declares.extras) - names):
            raise ValidationError(
                f"The loss {as_given(self.name)} needs the batch entry {as_given(name)}; the batch has {sorted(names)}."
            )

    def __call__(self, outputs: LossOutputs, batch: Mapping[str, Tensor], **overrides: Any) -> LossValue:
        loss = self.bind(**overrides) if overrides else self
        answer = loss._answer(loss.function(outputs, batch, **loss.kwargs))
        rows = len(batch["input_ids"])
        value = self._tensor(answer.get("loss"), rows)
        metrics = self._metrics(answer.get("metrics", {}))
        if value.ndim == 1:  # (B,): a mean over rows, so that the weight is their number
            if "weight" in answer:
                raise self._refusal("a weight beside one value per row", "a weight belongs to a scalar mean")
            return LossValue(value.sum(), float(rows), metrics)
        if self.declares.prenormalised:
            return LossValue(value, 1.0, metrics)
        counted = rows if self.declares.per == "row" else len(batch["labels"])
        weight = self._number(answer.get("weight", counted), "the weight")
        if not (math.isfinite(weight) and weight >= 0):
            raise self._refusal(f"the weight {weight}", "it must be a finite number ≥ 0")
        return LossValue(value * weight, weight, metrics)

    def row_values(
        self, outputs: LossOutputs, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return one value per row (B,), or the scalar of a loss that has no such, and the metrics.

        Each value is of its row alone, and none is divided by how many rows there are: what DP-SGD clips.
        """
        keywords = {**self.kwargs, "per_row": True} if self.declares.per_row else self.kwargs
        answer = self._answer(self.function(outputs, batch, **keywords))
        value = self._tensor(answer.get("loss"), len(batch["input_ids"]))
        return value, self._metrics(answer.get("metrics", {}))

    def __repr__(self) -> str:
        bound = ", ".join(f"{name}={value!r}" for name, value in self.kwargs.items())
        return f"<Loss {self.name}({bound})>"

    def check_call(self) -> None:
        """Refuse keywords that are missing, or more than the function takes."""
        if self._can_be_called:
            return
        if isinstance(self.function, nn.modules.loss._Loss):
            raise ValidationError(
                f"{type(self.function).__name__} is a loss of an input and a target; a loss here is a function of the "
                f"model's outputs and the batch: lambda outputs, batch: loss(outputs.logits, batch['labels'])."
            )
        try:
            signature = signature_of(self.function)
        except ValueError:  # some functions written in C do not tell theirs
            return
        try:
            signature.bind(None, None, **self.kwargs)
        except TypeError as error:
            keywords = "".join(f", {name}=…" for name in self.kwargs)
            raise ValidationError(
                f"The loss {as_given(self.name)} cannot be called as {self.name}(outputs, batch{keywords}): {error}. "
                f"Keywords are given by loss_kwargs or resolve_loss."
            ) from error
        object.__setattr__(self, "_can_be_called", True)  # frozen: what it says stays true

    def _answer(self, returned: object) -> Mapping[str, Any]:
        answer = returned if isinstance(returned, Mapping) else {"loss": returned}
        for name in answer:
            if name not in RETURNED:
                raise self._refusal(
                    f"an entry {as_given(name)}",
                    f"numbers to watch go in 'metrics'.{nearest(name, RETURNED)}",
                )
        return answer

    def _tensor(self, value: object, rows: int) -> Tensor:
        if not isinstance(value, Tensor):
            raise self._refusal(
                f"{type(value).__name__}", 'return a tensor, or {"loss": tensor, "metrics": {…}}'
            )
        if value.shape not in ((), (rows,)):
            raise self._refusal(
                f"shape {tuple(value.shape)}", f"return a scalar mean, or one value per row ({rows},)"
            )
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValidationError(
                f"The loss {as_given(self.name)} does not depend on the model: its value carries no gradient. "
                f"Was it detached, or made with .item()?"
            )
        return value

    def _metrics(self, metrics: object) -> dict[str, float]:
        if not isinstance(metrics, Mapping):
            raise self._refusal(f"metrics of type {type(metrics).__name__}", "return {name: number}")
        for name in RESERVED & metrics.keys():
            raise self._refusal(
                f"a metric {as_given(name)}", "every step has a curve of that name: choose another"
            )
        for name in metrics:
            if not isinstance(name, str):
                raise self._refusal(f"a metric named {as_given(name)}", "a metric's name is a text")
        return {
            name: self._number(metric, f"the metric {as_given(name)}") for name, metric in metrics.items()
        }

    def _number(self, value: object, what: str) -> float:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real):
            raise self._refusal(f"{what} as {as_given(value)}", "expected a number")
        return float(value)

    def _refusal(self, what: str, how: str) -> ValidationError:
        return ValidationError(f"The loss {as_given(self.name)} returned {what}: {how.rstrip('.')}.")


_LOSSES: Registry[LossFunction] = Registry("loss")


@checked
def register_loss(
    name: str,
    *,
    overwrite: bool = False,
    prenormalised: bool = False,
    splittable: bool = True,
    group: int = 1,
    per: Literal["token", "row"] = "token",
    extras: tuple[str, ...] | None = None,
    optional_extras: tuple[str, ...] = (),
    per_row: bool = False,
    reference: bool = False,
) -> Callable[[LossFunction], LossFunction]:
    """Return a decorator that registers `fn(outputs, batch, **kwargs)` as a loss.

    Args:
        name: What `resolve_loss` and `forward_backward(loss_fn=…)` know it by.
        overwrite: Replace a different function of this name. Running a cell again needs no overwrite.
        prenormalised: The loss is a weighted sum that is never divided (policy losses).
        splittable: The mean over a batch is the mean over its parts. False where rows are compared with all others.
        group: So many rows, one after the other, belong together (2 for pairs) and are never parted.
        per: What a scalar is the mean over, when it says no weight: labelled tokens, or rows. A loss "per row" is
            also asked about rows without labels.
        extras: Batch entries it needs besides; None accepts any.
        optional_extras: Batch entries it uses when they are there.
        per_row: It takes the keyword `per_row`; when that is True it returns one value per row (B,), the row's own
            mean. Differential privacy clips row by row, and is much quicker with it than one row at a time. The
            engine may compute such a loss on any rows of a batch together: those of like length.
        reference: It compares with a reference policy: the engine adds `reference_logprobs` (B,), the
            `sequence_logprobs` of the reference (see `TrainingClient.freeze_reference`), where a batch has none.

    Raises:
        ValidationError: The name is taken by a different function.

    Example:
        >>> @register_loss("brier")
        ... def brier(outputs, batch):
        ...     return (1 - outputs.logprobs.exp()).square().mean()
    """
    if group < 1:
        raise ValidationError(f"register_loss({as_given(name)}): group={group} must be at least 1.")
    if reference:
        optional_extras = (*optional_extras, REFERENCE)
    declaration = Declaration(
        prenormalised, splittable, group, per, extras, optional_extras, per_row, reference
    )

    def decorate(function: LossFunction) -> LossFunction:
        if not hasattr(function, "__dict__") or inspect.ismethod(function):
            raise ValidationError(
                f"register_loss: {as_given(name)} is a bound method or built in: register a function that calls it."
            )
        _LOSSES.register(name, overwrite=overwrite)(function)
        function.declares = declaration  # type: ignore[attr-defined]
        return function

    return decorate


def resolve_loss(spec: "str | LossFunction | Loss", **kwargs: Any) -> Loss:
    """Return the loss that `spec` means, with keywords bound.

    Args:
        spec: A registered name, "package.module:attribute", or a callable `fn(outputs, batch, **kwargs)`.
        kwargs: Keywords of the function.

    Raises:
        ValidationError: An unknown name or keyword, with the nearest spelling.

    Example:
        >>> loss_fn = resolve_loss("token_ce", label_smoothing=0.1)
    """
    if isinstance(spec, Loss):
        return spec.bind(**kwargs)
    if isinstance(spec, str) and ":" not in spec and spec not in _LOSSES:
        raise no_such_loss(spec, _LOSSES)
    function = _LOSSES.resolve(spec)
    name = spec if isinstance(spec, str) else name_of(function)
    declaration = getattr(function, "declares", Declaration())
    given = spec if isinstance(spec, str) else None
    return Loss(name, function, declares=declaration, spec=given).bind(**kwargs)


def get_registered_losses() -> list[str]:
    """Return the names of all registered losses."""
    return list(_LOSSES)


def declared_losses(dotted: Iterable[str] = ()) -> list[LossDeclaration]:
    """Return what every registered loss takes, and those of some dotted paths, as plain data."""
    return [_declared(name) for name in (*_LOSSES, *dotted)]


def _declared(name: str) -> LossDeclaration:
    loss = resolve_loss(name)
    parameters = list(inspect.signature(loss.function).parameters.values())[2:]  # behind outputs and batch
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return LossDeclaration(
        name,
        keywords=tuple(p.name for p in named),
        required=tuple(p.name for p in named if p.default is p.empty),
        group=loss.declares.group,
        extras=loss.declares.extras,
        optional_extras=loss.declares.optional_extras,
    )
