"""Configurations of training: frozen, checked where a user types them, named in the field's standard terms."""

import contextlib
import difflib
import fnmatch
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import pydantic

from tensafe_nb.checks import LONGEST_NAME as LONGEST_NAME_OF_FILE
from tensafe_nb.checks import LONGEST_PATH
from tensafe_nb.display import Facts, as_given, shown, with_article
from tensafe_nb.errors import LONGEST_NAME, ValidationError, nearest

P = ParamSpec("P")
R = TypeVar("R")
Seed = Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, pydantic.Field(gt=0, lt=1 << 31)]  # more of anything is a slip
NonNegativeFloat = pydantic.NonNegativeFloat
NONE_IS_NONE = pydantic.BeforeValidator(lambda given: () if given is None else given)
TextList = Annotated[  # None is none, and one text a list of one
    tuple[str, ...],
    pydantic.BeforeValidator(
        lambda given: () if given is None else (given,) if isinstance(given, str) else given
    ),
]
Keywords = Annotated[dict[str, Any], pydantic.BeforeValidator(lambda given: {} if given is None else given)]
Precision = Literal["exact", "bfloat16", "int8", "auto"]  # of the weights that sample
SamplingEngine = Literal["torch", "llama.cpp"]
MOST_ENTRIES = 10_000  # of one field
LLAMA_ENDS = ("model.embed_tokens", "lm_head")  # the names of embedding and head in models of Llama's kind
MOST_PROBLEMS = 20  # that one message tells
MOST_TOP_LOGPROBS = 128  # of one place
KINDS = {"tuple": "a list", "string": "a text", "float": "a number"}  # pydantic's names of kinds, in ours
MIN_TEMPERATURE = 1e-4  # below, the logits leave the range of numbers; 0 means greedy


@shown
class Config(pydantic.BaseModel):
    """Base of all configurations: immutable, unknown names refused with the nearest spelling."""

    NUMBER: ClassVar[str] = ""  # the field that a bare number in its place may have meant
    BESIDE: ClassVar[Mapping[str, Any]] = {}  # what is needed beside that, by way of example
    ELSEWHERE: ClassVar[
        Mapping[str, str]
    ] = {}  # what other libraries call a field, where no spelling is near
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**{name: self._bounded(name, value) for name, value in values.items()})
        except pydantic.ValidationError as error:
            found = nearest_kinds(type(self), error.errors())
            problems = [each for problem in found for each in problems_of(type(self), problem)]
            told = " ".join(text for _, text in problems[:MOST_PROBLEMS])
            more = len(problems) - MOST_PROBLEMS
            message = f"{told} And {more} more." if more > 0 else told
            raise ValidationError(message, details={"problems": problems}) from None

    @classmethod
    def _bounded(cls, name: str, value: Any) -> Any:
        """Return the value of a field, refused before anything walks it if it is larger than a setting can be."""
        if isinstance(value, str | bytes | pydantic.BaseModel):
            return value
        if type(value).__module__ in ("numpy", "torch") and getattr(value, "shape", None) == ():
            return value.item() if hasattr(value, "item") else value  # a number
        if isinstance(value, Iterator):  # it may have no end
            value = tuple(itertools.islice(value, MOST_ENTRIES + 1))
        try:
            size = len(value) if isinstance(value, Sized) else 0
        except Exception:  # noqa: BLE001  # a length that fails, or is no number: pydantic is not to ask for it either
            raise cls._refusal(name, f"its length cannot be told (got {as_given(value)})") from None
        if size > MOST_ENTRIES:
            raise cls._refusal(
                name, f"a setting has at most {MOST_ENTRIES:,} entries, not {size:,} (got {as_given(value)})"
            )
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise cls._refusal(name, f"its entries are named by texts (got {as_given(value)})")
        return value

    @classmethod
    def _refusal(cls, name: str, reason: str) -> ValidationError:
        text = f"{cls.__name__}.{name}: {reason}."
        return ValidationError(text, details={"problems": [((name,), text)]})

    def _facts(self) -> Facts:
        return {name: getattr(self, name) for name in type(self).model_fields}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    def change(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; a dict changes only the fields it names of a configuration inside.

        Example:
            >>> config.change(optimizer={"learning_rate": 1e-3})  # the rest of the optimiser stays
        """
        changes = {name: self._bounded(name, value) for name, value in changes.items()}
        inner = {
            name: getattr(self, name).replace(**value)
            for name, value in changes.items()
            if isinstance(value, dict) and isinstance(getattr(self, name, None), Config)
        }
        return self.replace(**(changes | inner))


def joins(kind: type[Config], name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a method that spells the fields of a configuration as keywords, for completion and for help.

    The method gets one configuration, checked, as its parameter `name`: that which its caller gave, with those fields
    on top that the caller gave as well. The defaults it spells are the configuration's own.

    Raises:
        ValidationError: Something else than such a configuration, or a field that does not fit.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        parameters = list(inspect.signature(method).parameters)
        others = {parameter for parameter in parameters if parameter not in kind.model_fields}
        place = parameters.index(name)

        @functools.wraps(method)
        def call(*args: Any, **keywords: Any) -> R:
            fields = {key: keywords.pop(key) for key in list(keywords) if key not in others}
            given = args[place] if len(args) > place else keywords.pop(name, None)
            if given is not None and not isinstance(given, kind):
                raise ValidationError(
                    f"{method.__name__}() takes {with_article(kind.__name__)}, or its fields as keywords, such as "
                    f"{next(iter(kind.model_fields))}=…, not {as_given(given)}."
                )
            joined = kind(**fields) if given is None else given.replace(**fields)
            if len(args) > place:
                return method(*args[:place], joined, *args[place + 1 :], **keywords)  # type: ignore[arg-type]
            return method(*args, **keywords | {name: joined})

        return call

    return decorate


class AsItIs:
    """The default of a field that is not to be changed."""

    def __repr__(self) -> str:
        return "as it is"


def spells(kind: type[Config], but: Sequence[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a method whose `**changes` are fields of a configuration: completion and help see each of them.

    Args:
        kind: The configuration.
        but: Fields that cannot be changed.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(method)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        spelled = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=AsItIs(), annotation=field.annotation
            )
            for name, field in kind.model_fields.items()
            if name not in but
        ]
        method.__signature__ = signature.replace(parameters=[*own, *spelled])  # type: ignore[attr-defined]
        return method

    return decorate


def nearest_kinds(config: type[Config], problems: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield what pydantic found; of a field of several kinds, what a value lacks of the kind that it is nearest to.

    Pydantic tells of each kind what is wrong, and names the kind like a key: "target_modules.tuple[str, ...].0".
    """

    def nearness(problem: Mapping[str, Any]) -> tuple[int, bool]:
        return len(problem["loc"]), not problem["type"].endswith(("_type", "_parsing"))

    for place, group in itertools.groupby(problems, lambda problem: problem["loc"][:1]):
        found = list(group)
        field = config.model_fields.get(str(*place)) if place else None
        annotation = field.annotation if field else None
        kinds = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else set()
        if len(kinds - {NoneType}) < 2 or 1 in (len(problem["loc"]) for problem in found):
            yield from found
            continue
        best = max(found, key=nearness)
        if nearness(best) == (2, False):
            wanted = " or ".join(KINDS[problem["type"].partition("_")[0]] for problem in found)
            yield {"loc": place, "type": "kind", "msg": wanted, "input": best["input"]}
            continue
        for problem in found:
            if problem["loc"][:2] == best["loc"][:2]:
                yield {**problem, "loc": (*place, *problem["loc"][2:])}


def problems_of(config: type[Config], problem: Mapping[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    """Return where and what, one by one, of a problem that pydantic found.

    A configuration inside this one has found its own already.
    """
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, ValidationError) and (found := inner.details.get("problems")):
        return [((*problem["loc"], *at), text) for at, text in found]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        inside = [
            name
            for name, field in config.model_fields.items()
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, Config) and where in kind.model_fields
        ]
        belongs = f" It is a field of {inside[0]}: {inside[0]}={{{where!r}: …}}." if inside else ""
        meant = f" Did you mean {config.ELSEWHERE[where]!r}?" if where in config.ELSEWHERE else ""
        text = f"{config.__name__} has no field {where!r}.{belongs or meant or nearest(where, config.model_fields)}"
    elif problem["type"] == "model_type":
        text = f"{config.__name__}.{instead_of(config, where, problem['input'])}"
    elif problem["type"] == "tuple_type":
        given = as_given(problem["input"])
        is_pair = "..." not in str(config.model_fields[where].annotation)  # tuple[float, float]
        some = f"{given}, {given}" if is_pair else given
        text = f"{config.__name__}.{where}: a list is expected, such as [{some}], not {given}."
    elif problem["type"] == "too_long" or (problem["type"] == "missing" and 1 in problem["loc"]):
        name = problem["loc"][0]
        text = f"{config.__name__}.{name}: two values are expected, not {as_given(problem['input'])}."
    elif problem["type"] == "kind":
        text = f"{config.__name__}.{where}: {problem['msg']} is expected, not {as_given(problem['input'])}."
    else:
        reason = problem["msg"].removeprefix("Value error, ")
        text = f"{config.__name__}.{where}: {reason} (got {as_given(problem['input'])})."
        if not where:  # of several fields, which the reason names
            text = f"{config.__name__}: {reason.rstrip('.')}."
    return [(problem["loc"], text)]


def instead_of(config: type[Config], name: str, given: Any) -> str:
    """Return what to write where a configuration was expected and a bare value given, which some field may take."""
    field = config.model_fields[name]
    kinds = (field.annotation, *get_args(field.annotation))
    inner = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config))
    wanted = f"{name} is {with_article(inner.__name__)}, or a dict of its fields, not {as_given(given)}."
    return f"{wanted} Write {name}={inner.__name__}({example_of(inner, given)})."


def example_of(kind: type[Config], given: Any) -> str:
    """Return fields of a configuration, as a call has them, that a bare value may have meant.

    It is the value of the first field, if that takes it; of a few texts to choose from the nearest; else a number in
    the field that the class says a bare number means; else what stands there by default.
    """
    first, field = next(iter(kind.model_fields.items()))
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices and isinstance(given, str):
        close = difflib.get_close_matches(given[:LONGEST_NAME].casefold(), choices, n=1)
        return f"{first}={(close or choices)[0]!r}"
    meant = kind.NUMBER or first
    for fields in ({first: given}, {meant: given, **kind.BESIDE}):
        if not isinstance(given, bool):
            with contextlib.suppress(ValidationError):
                kind(**fields)
                return ", ".join(f"{key}={as_given(value)}" for key, value in fields.items())
    usual = {meant: kind.model_fields[meant].default, **kind.BESIDE}
    return ", ".join(f"{key}={as_given(value)}" for key, value in usual.items())


class LoRAConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) · B·A.

    Args:
        rank: Rank of the two factors.
        alpha: Scale; the adapter's output is multiplied by alpha / rank.
        dropout: Probability with which an input of the adapter is dropped while training.
        target_modules: Names of the layers to adapt (linear ones, embeddings, the head); or "all-linear": every linear
            layer but the head; or a regular expression that the whole name of a layer must match.
        bias: Which biases are trained besides: "none", "all", or "lora_only".
        modules_to_save: Names of modules that are trained whole and kept with the adapter, such as "embed_tokens" and
            "lm_head".
        use_rslora: Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
        rank_pattern: Other ranks, by name of a layer or regular expression.
        alpha_pattern: Other alphas, by name of a layer or regular expression.
        exclude_modules: Names of layers to leave out; or a regular expression.
        layers_to_transform: Numbers of the blocks to adapt; None adapts all.
        target_parameters: Names of parameters to adapt that belong to no linear layer, such as those of experts.
            "all-linear" takes the experts of the known architectures with it.
        freeze_a: Train B alone, and keep A as it was drawn (FFA-LoRA, Sun et al. 2024, arXiv:2403.12313): half of the
            numbers, and with the same A in all of them (the same seed), the mean of clients' B is the mean of their
            B·A. Private training then has no product of two noisy factors.
    """

    ELSEWHERE = {"r": "rank"}

    rank: int = pydantic.Field(default=16, gt=0, le=65_536)
    alpha: pydantic.PositiveFloat = 32
    dropout: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: tuple[str, ...] | str = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: TextList = ()
    use_rslora: bool = False
    rank_pattern: dict[str, Positive] = pydantic.Field(default_factory=dict)
    alpha_pattern: dict[str, pydantic.PositiveFloat] = pydantic.Field(default_factory=dict)
    exclude_modules: Annotated[tuple[str, ...] | str, NONE_IS_NONE] = ()
    layers_to_transform: tuple[pydantic.NonNegativeInt, ...] | None = None
    target_parameters: TextList = ()
    freeze_a: bool = False

    @pydantic.field_validator("target_modules", "exclude_modules")
    @classmethod
    def _regular_expressions_can_be_read(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"a string is a regular expression, and this is none ({error})") from None
        return value

    @pydantic.model_validator(mode="after")
    def _a_regular_expression_names_its_blocks_itself(self) -> Self:
        is_expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform is not None and is_expression:
            raise ValueError(
                f"layers_to_transform is for names of layers and for 'all-linear'; target_modules="
                f"{as_given(self.target_modules)} is a regular expression, which has to name the blocks itself: "
                f"r'.*\\.layers\\.(1|2)\\..*_proj'"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _a_module_is_adapted_or_trained_whole(self) -> Self:
        both = set(self.modules_to_save) & set(
            self.target_modules if isinstance(self.target_modules, tuple) else ()
        )
        if both:
            raise ValueError(
                f"{sorted(both)} stands in target_modules and in modules_to_save: a module is adapted, or trained whole"
            )
        return self

    @property
    def adapted_ends(self) -> list[str]:
        """Which of embedding and head are adapted, of models whose modules have the names that Llama's have."""

        def named(names: tuple[str, ...] | str, end: str) -> bool:
            if isinstance(names, str):
                return re.fullmatch(names, end) is not None
            return any(f".{end}".endswith(f".{name}") for name in names)

        adapts, leaves_out = (
            functools.partial(named, names) for names in (self.target_modules, self.exclude_modules)
        )
        every = self.layers_to_transform is None  # neither is in a block
        return [end for end in LLAMA_ENDS if every and adapts(end) and not leaves_out(end)]


ADAMS = ("adamw", "adam")  # the optimisers that have betas and eps


class OptimizerConfig(Config):
    """The optimiser and its learning-rate schedule.

    Args:
        name: "adamw", "adam", "sgd" or "adafactor", from torch.optim.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled for adamw and adafactor, added to the gradient for adam and sgd.
        betas: Decay rates of adam's moments.
        eps: Added to adam's denominator.
        momentum: For sgd.
        max_grad_norm: Global norm to which gradients are scaled down; None leaves them.
        schedule: "constant", or "linear" or "cosine" down to 0 at `total_steps`.
        warmup_steps: Steps over which the rate rises linearly from 0.
        total_steps: Length of the schedule; needed by "linear" and "cosine".
    """

    NUMBER, ELSEWHERE = "learning_rate", {"lr": "learning_rate"}

    name: Literal["adamw", "adam", "sgd", "adafactor"] = "adamw"
    learning_rate: pydantic.PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: pydantic.PositiveFloat = 1e-8
    momentum: float = pydantic.Field(default=0.9, ge=0.0, lt=1.0)
    max_grad_norm: pydantic.PositiveFloat | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: pydantic.NonNegativeInt = 0
    total_steps: Positive | None = None

    @pydantic.model_validator(mode="after")
    def _schedule_has_an_end(self) -> Self:
        if self.schedule != "constant" and self.total_steps is None:
            raise ValueError(
                f"schedule={self.schedule!r} needs total_steps: the optimiser steps after which the rate is 0"
            )
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than total_steps={self.total_steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self


class StepConfig(Config):
    """What one optimiser step does otherwise than the client's OptimizerConfig says; the next does as that says.

    Args:
        learning_rate: Of this step, whatever the schedule says; 0 moves no weight.
        weight_decay: As in OptimizerConfig.
        betas: For adamw and adam, like `eps`.
        eps: Added to adam's denominator.
        max_grad_norm: Global norm to which gradients are scaled down; 0 leaves them.
    """

    NUMBER = "learning_rate"

    learning_rate: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    betas: tuple[float, float] | None = None
    eps: pydantic.PositiveFloat | None = None
    max_grad_norm: NonNegativeFloat | None = None

    def applied_to(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        """Return an optimiser's configuration as it counts for this step; the learning rate stays the schedule's.

        Raises:
            ValidationError: The optimiser has no such setting.
        """
        given = {name: value for name, value in dict(self).items() if value is not None}
        given.pop("learning_rate", None)
        foreign = {"betas", "eps"} & given.keys() if optimizer.name not in ADAMS else ()
        if foreign:
            raise ValidationError(
                f"optim_step: {' and '.join(sorted(foreign))} belong to adamw and adam, and this client trains with "
                f"{optimizer.name!r}. Leave them out, or create a client with OptimizerConfig(name='adamw')."
            )
        if given.get("max_grad_norm") == 0:
            given["max_grad_norm"] = None
        return optimizer.replace(**given) if given else optimizer


UNCHANGED = StepConfig()  # a step as the OptimizerConfig says


class LossConfig(Config):
    """The loss of a training client, where an operation names no other.

    Args:
        type: A registered name, or "package.module:attribute".
        kwargs: Keywords of the loss function.
    """

    type: str = "token_ce"
    kwargs: Keywords = pydantic.Field(default_factory=dict)


class SamplingConfig(Config):
    """How tokens are drawn.

    Args:
        max_new_tokens: Longest completion, in tokens.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keep the smallest set of tokens whose probability reaches this (nucleus sampling).
        top_k: Keep the k most likely tokens; 0 keeps all.
        num_samples: Completions per prompt.
        stop: Strings that end a completion; they are cut from its text. A special token can be one, as it is written.
        stop_tokens: Tokens that end a completion, as the model's end token does; they are no part of its text.
        seed: Fixes every row's random stream; None takes the client's next one.
        ignore_end: Go on past end tokens, so that every completion has `max_new_tokens` ("fixed").
        top_logprobs: Also return, for each sampled token, the most likely tokens of its place, so many.
        prompt_logprobs: Also return the log-probability of each token of the prompt, which is read once more for it.
        top_prompt_logprobs: Also return the most likely tokens of each place in the prompt, so many.
        precision: Of the weights that tokens are drawn with: "exact", those that train; on a CPU also copies in
            "bfloat16" or "int8", with the adapter beside them, which draw from nearly the same distribution in less
            time; or "auto", the quickest of these that pays here, which the result names.
        alone: Draw beside no other sample, and from nothing that was read for one: then logprobs, too, are the same to
            the last bit whoever asks at the same time. Rollouts of runs are drawn so.
        engine: What computes: "torch", with the weights that are trained, or "llama.cpp" on the processor, with a GGUF
            file of the base and the adapter beside it, where llama-cpp-python is installed. Its `logprobs` are those of
            the distribution that it draws from, which is not quite the trained one.
    """

    ELSEWHERE = {"n": "num_samples", "num_return_sequences": "num_samples", "max_length": "max_new_tokens"}

    max_new_tokens: Positive = 64
    temperature: NonNegativeFloat = 1.0
    top_p: float = pydantic.Field(default=1.0, gt=0.0, le=1.0)
    top_k: pydantic.NonNegativeInt = 0
    num_samples: int = pydantic.Field(default=1, gt=0, le=65_536)
    stop: TextList = ()
    stop_tokens: Annotated[tuple[pydantic.NonNegativeInt, ...], NONE_IS_NONE] = ()
    seed: Seed | None = None
    ignore_end: bool = False
    top_logprobs: int = pydantic.Field(default=0, ge=0, le=MOST_TOP_LOGPROBS)
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = pydantic.Field(default=0, ge=0, le=MOST_TOP_LOGPROBS)
    precision: Precision = "exact"
    alone: bool = False
    engine: SamplingEngine = "torch"

    @pydantic.field_validator("max_new_tokens", mode="before")
    @classmethod
    def _a_completion_fits_some_context(cls, value: Any) -> Any:
        if isinstance(value, int) and value >= 1 << 31:
            raise ValueError(
                "no model reads so many tokens: a prompt and its completion have to fit in the model's context together"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _stop_strings_can_stop(self) -> Self:
        if self.ignore_end and (self.stop or self.stop_tokens):
            raise ValueError(
                "ignore_end goes on past every end, so that stop strings and stop_tokens have no effect: give one of "
                "them"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _another_engine_has_a_precision_of_its_own(self) -> Self:
        if self.engine != "torch" and self.precision != "exact":
            raise ValueError(
                f"precision={self.precision!r} is of engine='torch'; llama.cpp computes with the GGUF file's own: give "
                f"one of them"
            )
        return self

    @property
    def is_exact(self) -> bool:
        """Whether the weights that tokens are drawn with are those that train."""
        return self.engine == "torch" and self.precision == "exact"

    def as_drawn(self, precision: str) -> Self:
        """Return this with the precision that a result names, which "auto" has chosen; other engines have their own."""
        return self.replace(precision=precision) if self.engine == "torch" else self

    @property
    def drawn_in(self) -> str:
        """What tokens are drawn with, in a word: a precision of torch's, or another engine."""
        return self.precision if self.engine == "torch" else self.engine

    @property
    def reads_prompts(self) -> bool:
        """Whether something is wanted of the tokens of prompts themselves."""
        return self.prompt_logprobs or self.top_prompt_logprobs > 0

    @pydantic.field_validator("temperature")
    @classmethod
    def _temperature_is_zero_or_not_tiny(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"a temperature is 0 (the most likely token) or at least {MIN_TEMPERATURE}")
        return value

    @pydantic.field_validator("stop")
    @classmethod
    def _stop_strings_are_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text for text in value):
            raise ValueError("a stop string must not be empty")
        return value


UNSOUND = {
    "moments": "hand-made moments bounds report less epsilon than is spent",
    "gdp": "the central-limit accountant of subsampled noise reports less epsilon than is spent",
}


class DPConfig(Config):
    """Differentially private training: DP-SGD (Abadi et al. 2016, arXiv:1607.00133) and what it is accounted by.

    Args:
        enabled: False trains without privacy, as if there were no DPConfig.
        noise_multiplier: Sigma: the noise's standard deviation, in units of `max_grad_norm`. 0 gives no privacy.
        max_grad_norm: C: the norm to which each privacy unit's gradient is clipped.
        target_epsilon: The step that would spend more is refused; None never refuses.
        target_delta: The probability that epsilon does not cover; choose it well below 1 / `dataset_size`.
        accountant_type: "rdp", or "prv" (tighter, slower).
        sampling: "poisson": draws of `tc.dp_batches`. "worst_case": your own batches with `example_ids`, without
            amplification by sampling.
        dataset_size: N, the number of privacy units, which becomes public; needed for "poisson".
        expected_batch_size: L, units per step on average; None takes batch_size · gradient_accumulation_steps.
        dataset_id: Names the account that training on the same data shares; None is this client and its forks.
    """

    NUMBER, BESIDE = "target_epsilon", {"dataset_size": 10_000}

    enabled: bool = True
    noise_multiplier: NonNegativeFloat = 1.0
    max_grad_norm: pydantic.PositiveFloat = 1.0
    target_epsilon: pydantic.PositiveFloat | None = 8.0
    target_delta: float = pydantic.Field(default=1e-5, gt=0.0, lt=1.0)
    accountant_type: Literal["rdp", "prv"] = "rdp"
    sampling: Literal["poisson", "worst_case"] = "poisson"
    dataset_size: Positive | None = None
    expected_batch_size: Positive | None = None
    dataset_id: str | None = pydantic.Field(default=None, min_length=1, max_length=200)

    @pydantic.field_validator("accountant_type", mode="before")
    @classmethod
    def _accountants_that_report_too_little_are_refused(cls, value: Any) -> Any:
        if isinstance(value, str) and value in UNSOUND:
            raise ValueError(f"{UNSOUND[value]}; use 'rdp' or 'prv'")
        return value

    @pydantic.model_validator(mode="after")
    def _the_rate_is_known(self) -> Self:
        if self.enabled and self.sampling == "poisson" and self.dataset_size is None:
            raise ValueError(
                "sampling='poisson' needs dataset_size, the number of examples (or of people, with unit_ids), which "
                "becomes public: without it there is no sampling rate. Or account for batches of your own: "
                "sampling='worst_case'"
            )
        return self


class TrainingConfig(Config):
    """Everything that makes a training client.

    Args:
        model_ref: A built-in ("builtin:tiny", "builtin:sums"), a local folder, a .gguf file, or a hub id.
        lora_config: Adapters to train; None trains all weights.
        optimizer: The optimiser.
        loss: The loss, where an operation names no other.
        batch_size: Rows per batch, read by the data helpers and `fit`.
        gradient_accumulation_steps: Batches per optimiser step, read by `fit`.
        micro_batch_tokens: The engine splits batches into micro-batches of at most this many tokens.
        gradient_checkpointing: Keep of each layer its input alone, and compute the rest again in the backward pass:
            less memory, about a third more time, the same gradients (activation checkpointing, arXiv:1604.06174).
        seed: Fixes initialisation, dropout and sampling.
        dtype: "float32", "bfloat16" (bf16 compute, fp32 trained weights), or "auto".
        device: "cpu", "cuda", "mps", or "auto".
        value_head: Add a scalar head on the hidden states, for PPO with advantage="gae".
        dp_config: Train with differential privacy; None trains without.
        ignore_weights: Weights that a model's file may hold though the model has no place for them: regular
            expressions, found anywhere in the name, as in transformers' own lists ("v_head"), or shell patterns
            ("*.inv_freq").
        resize_embeddings: Give the model rows for tokens that its tokenizer has and it lacks. The new rows begin as the
            mean of the others.
    """

    model_ref: str = "builtin:tiny"
    lora_config: LoRAConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    micro_batch_tokens: Positive = 16_384
    gradient_checkpointing: bool = False
    seed: Seed = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    value_head: bool = False
    dp_config: DPConfig | None = None
    ignore_weights: TextList = ()
    resize_embeddings: bool = False

    @pydantic.field_validator("model_ref", mode="before")
    @classmethod
    def _a_path_is_its_text_and_a_model_in_memory_is_none(cls, value: Any) -> Any:
        if hasattr(value, "save_pretrained"):
            raise ValueError(
                "a model is read from a folder: model.save_pretrained(folder), tokenizer.save_pretrained(folder), and "
                "model_ref=folder"
            )
        return str(value) if isinstance(value, Path) else value

    @pydantic.field_validator("model_ref")
    @classmethod
    def _a_model_can_be_looked_for(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("name a model: a built-in, a folder, a .gguf file or a hub id")
        if len(value) > LONGEST_PATH or max(map(len, value.split("/"))) > LONGEST_NAME_OF_FILE:
            raise ValueError("no file, no folder and no hub id has so long a name")
        return value

    @pydantic.field_validator("ignore_weights")
    @classmethod
    def _patterns_name_something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty pattern would cover every weight: name those that may be left out")
        return value

    @property
    def expected_units(self) -> int:
        """L of a private step: the privacy units it holds on average, as declared."""
        declared = self.dp_config.expected_batch_size if self.dp_config is not None else None
        return declared or self.batch_size * self.gradient_accumulation_steps


def check_engine(sampling: SamplingConfig, config: TrainingConfig) -> None:
    """Refuse a client whose training llama.cpp has no place for, as far as its configuration tells.

    Raises:
        ValidationError: The client trains something else than LoRA of the layers' matrices.
    """
    if sampling.engine != "llama.cpp":
        return
    lora = config.lora_config
    if lora is None:
        raise without_llama_cpp(
            "this client trains all weights, which would have to be handed over whole after each step",
            "train an adapter (lora_config=)",
        )
    others = {
        "bias": lora.bias != "none",
        "modules_to_save": lora.modules_to_save,
        "target_parameters": lora.target_parameters,
        "target_modules": lora.adapted_ends,
    }
    if found := [name for name, is_set in others.items() if is_set]:
        ends = f" ({' and '.join(lora.adapted_ends)})" if found[0] == "target_modules" else ""
        raise without_llama_cpp(
            f"LoRAConfig.{found[0]}{ends} trains what an adapter of llama.cpp has no place for",
            "leave it out",
        )


def without_llama_cpp(why: str, instead: str) -> ValidationError:
    """Return the refusal of `engine="llama.cpp"`, with its reason and what else could be done."""
    return ValidationError(f"engine='llama.cpp': {why}. Sample with engine='torch', or {instead}.")


def covers(patterns: Iterable[str], name: str) -> bool:
    """Whether one of `ignore_weights` covers the name of a weight."""
    return any(weight_pattern(text).search(name) for text in patterns)


def weight_pattern(text: str) -> re.Pattern[str]:
    """Return one of `ignore_weights`, ready to search with."""
    try:
        return re.compile(text)
    except re.error:  # "*.inv_freq", which means what it does in a shell
        return re.compile(fnmatch.translate(text))
