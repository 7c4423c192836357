"""Reward functions: named, resolved, composed and called. A reward that failed is None, never 0."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import RewardError, ValidationError, nearest
from tensafe_nb.registry import Registry, check_keywords, load_dotted, name_of
from tensafe_nb.rlvr.rewards.builtin import answers, code, parsed, shaping
from tensafe_nb.rlvr.rewards.composite import Part, combined, read_parts
from tensafe_nb.rlvr.rewards.conventions import Call, Conversation, RewardSample, Style, Verdict
from tensafe_nb.rlvr.rewards.identity import Identity, identity_of
from tensafe_nb.rlvr.rewards.judge import LLMJudge
from tensafe_nb.rlvr.rewards.signatures import call_for
from tensafe_nb.rlvr.scoring.lasting import LOOP
from tensafe_nb.store.home import Home

RewardFunction: TypeAlias = Callable[..., Any]

_REWARDS: Registry[RewardFunction] = Registry("reward")
_BUILTINS = {**answers.BUILTINS, **parsed.BUILTINS, **shaping.BUILTINS, **code.BUILTINS}
_CHECKS = {builtin.function: builtin.check for builtin in _BUILTINS.values() if builtin.check}
_INLINE = {builtin.function for builtin in _BUILTINS.values() if builtin.inline}
_EXTRAS = {"math": ("tensafe_nb.rlvr.rewards.builtin.math:math", "math")}  # name → function, extra it needs


def register_reward(name: str, *, overwrite: bool = False) -> Callable[[RewardFunction], RewardFunction]:
    """Return a decorator that registers `fn(prompt, response, meta=None) -> float` as a reward.

    Args:
        name: What `resolve_reward` and `RLVRTrainer(reward=…)` know it by.
        overwrite: Replace a different function of this name. Running a cell again needs no overwrite.

    Raises:
        ValidationError: The name is taken by a different function.

    Example:
        >>> @register_reward("short")
        ... def short(prompt, response, meta=None):
        ...     return 1.0 if len(response) < 20 else 0.0
    """
    return _REWARDS.register(name, overwrite=overwrite)


def get_registered_rewards() -> list[str]:
    """Return the names of all registered rewards."""
    return sorted({*_REWARDS, *_EXTRAS, "judge"})


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function with its keywords bound: `reward(prompt, response, meta)` gives a number or None.

    Called like this it runs here and now, and shows the function's own exceptions. A run scores through a
    `Scorer`, which outlives them.

    Attributes:
        name: What a person calls it.
        function: The user's own.
        kwargs: Its bound keywords.
        call: How it is called; None for a composite, which is its parts.
        parts: What a composite adds up.
    """

    name: str
    function: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    call: Call | None = None
    parts: tuple[Part, ...] = ()

    def __call__(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        response: str,
        meta: Mapping[str, Any] | None = None,
        *,
        tokens: Sequence[int] = (),
    ) -> float | None:
        """Score one response.

        Args:
            prompt: The question, a text or chat messages.
            response: The answer.
            meta: Further columns of the prompt.
            tokens: The response's token ids, for rewards that count them.

        Raises:
            RewardError: The function returned what is no score.
        """
        outcome = self.outcome(prompt, response, meta, tokens)
        if outcome.error is not None:
            raise RewardError(f"The reward {as_given(self.name)} {outcome.error}.")
        return outcome.score

    def outcome(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        response: str,
        meta: Mapping[str, Any] | None = None,
        tokens: Sequence[int] = (),
    ) -> Verdict:
        """Do the same, and return the parts beside the score."""
        if self.call is None:
            outcomes = [part.reward.outcome(prompt, response, meta, tokens) for part in self.parts]
            return combined(self.parts, outcomes)
        given: Any = meta if self.call.style is Style.OURS else (meta or {})
        messages = None if isinstance(prompt, str) else Conversation(prompt)
        text = prompt if isinstance(prompt, str) else str(messages)
        return call_here(self.call, RewardSample(text, response, given, tokens, messages))

    @property
    def batched(self) -> bool:
        """Whether one call sees rollouts of several prompts, in this reward or a part of it."""
        return any(call.batched for _, call in self.leaves())

    @property
    def judged(self) -> bool:
        """Whether it, or a part of it, sends prompts and answers to a judge."""
        return any(isinstance(leaf.function, LLMJudge) for leaf, _ in self.leaves())

    @property
    def inline(self) -> bool:
        """Whether it is a built-in that cannot hang: it needs no process of its own."""
        return inspect.isfunction(self.function) and self.function in _INLINE

    @property
    def true(self) -> str | None:
        """The name of the part that is marked as the true aim, if one is."""
        return next((part.name for part in self.parts if part.true), None)

    @property
    def version(self) -> str:
        """A digest of its code and all that this uses, as it is now: scores of two versions are not comparable.

        It ends in "-partial" where something lies beyond what can be looked into; `identity.beyond` names it.
        """
        return self.identity.version

    @property
    def identity(self) -> Identity:
        """What its scores depend on."""
        return identity_of(self)

    def identified(self) -> list[Any]:
        """Return what its scores depend on, for `identity_of`."""
        if self.call is None:
            return ["composite", *self.parts]
        return [self.function, dict(self.kwargs), self.call.style.value, self.call.conversational]

    def leaves(self) -> "Iterator[tuple[Reward, Call]]":
        """Yield the functions it is made of, each with its call: itself, or those of its parts."""
        if self.call is not None:
            yield self, self.call
        for part in self.parts:
            yield from part.reward.leaves()


RewardSpec: TypeAlias = str | RewardFunction | Reward | Sequence[Any] | Mapping[Any, Any]


@checked
def resolve_reward(spec: Any, *, conversational: bool | None = None, **kwargs: Any) -> Reward:
    """Return the reward that `spec` means, with keywords bound.

    A function's parameters say how it is called:

    - `(prompt, response[, meta])`: ours, one response at a time; a parameter `tokens` gets its token ids.
      It returns a number, None to abstain, or a dict with `score` and further parts.
    - `completions`, with `prompts`, `completion_ids` and columns: TRL's, all completions of a step at once.
    - `solution_str`, with `data_source`, `ground_truth`, `extra_info`: verl's; all plural: its batch functions.
    - `queries, prompts, labels`: OpenRLHF's.
    - `completion`, with `prompt`, `answer`, `state`, `task`, `info`, `parser`: verifiers', single turn.
    - an object with `score_answer`: a reasoning-gym data set.

    Coroutine functions of each are awaited, on a thread of ours. Prompts that are chat messages reach functions of
    ours, TRL's and verifiers' as messages; `prompt: str` declares that ours wants their text.

    Args:
        spec: A registered name, "package.module:attribute", a callable, or a reasoning-gym data set; or several: a
            list, or a dict of weights ({"exact_match": 1.0, f: 0.2}) or names ({"right": f, "short": (g, 0.2)}).
        conversational: Whether a TRL or verifiers function gets chat messages or texts; None: as the prompts are.
        kwargs: Further keywords of the function; `weights=[…]` of a list.

    Raises:
        ValidationError: An unknown name or keyword, or a function with another signature.

    Example:
        >>> reward = resolve_reward("keyword_contains", keywords=["solution", "answer"])
        >>> reward("What is 3 * 4?", "The answer is 12")
        1.0
    """
    if isinstance(spec, Reward):
        if not kwargs:
            return spec
        again = resolve_reward(
            spec.function,
            conversational=spec.call is not None and spec.call.conversational,
            **{**spec.kwargs, **kwargs},
        )
        return replace(again, name=spec.name)
    if isinstance(spec, list | tuple | Mapping):
        try:
            parts = read_parts(spec, resolve_reward, kwargs.pop("weights", None))
        except RecursionError:
            raise ValidationError(
                f"{as_given(spec)} holds itself, or is nested too deeply: no reward."
            ) from None
        check_keywords(composite, kwargs, "reward", 3)
        return Reward("composite", composite, {"parts": parts}, parts=parts)
    if isinstance(spec, str) and spec == "judge" and spec not in _REWARDS:
        check_keywords(judge, kwargs, "reward", 0)
        if not {"url", "model", "rubric"} <= set(kwargs):
            raise ValidationError("The reward judge needs url=…, model=… and rubric=…, as in rlvr.judge(…).")
        return judge(**kwargs)
    function = function_named(spec)
    name = spec if isinstance(spec, str) else name_of(function)
    if function is composite:
        parts = read_parts(kwargs.pop("parts", None), resolve_reward)
        check_keywords(composite, kwargs, "reward", 3)
        return Reward(name, composite, {"parts": parts}, parts=parts)
    call = call_for(function, name, kwargs, conversational)
    if inspect.isfunction(function) and function in _CHECKS:
        _CHECKS[function](**kwargs)
    return Reward(name, function, kwargs, call)


def function_named(spec: Any) -> Any:
    """Return what a name, a path or a callable means.

    Raises:
        ValidationError: There is none of this name, or it is no function.
    """
    if hasattr(spec, "score_answer"):
        return spec
    if hasattr(spec, "funcs") and hasattr(spec, "weights"):
        raise ValidationError(
            f"{type(spec).__name__} is a rubric: give its functions, resolve_reward(rubric.funcs, "
            f"weights=rubric.weights)."
        )
    if isinstance(spec, str) and spec in _EXTRAS and spec not in _REWARDS:
        path, extra = _EXTRAS[spec]
        try:
            return load_dotted(path, "reward")
        except ValidationError as error:
            raise ValidationError(f"{error} It is an extra: pip install 'tensafe_nb[{extra}]'.") from error
    if isinstance(spec, str) and ":" not in spec and spec not in _REWARDS:
        raise ValidationError(
            f"There is no reward named {as_given(spec)}.{nearest(spec, get_registered_rewards())}"
        )
    return _REWARDS.resolve(spec)


def call_here(call: Call, sample: RewardSample) -> Verdict:
    """Call the function once, here, and let its exceptions through."""
    log: dict[str, list[Any]] = {}
    value = call.invoke([sample], log)
    if inspect.isawaitable(value):
        value = result_of(value)
    return call.read(value, [sample], log)[0]


def result_of(value: Awaitable[Any]) -> Any:
    """Await a value on the lasting loop and wait; where that loop waits for us, on one of its own."""

    async def awaited() -> Any:
        return await value

    if LOOP.here():
        with ThreadPoolExecutor(1, thread_name_prefix="tsnb-reward") as thread:
            return thread.submit(asyncio.run, awaited()).result()
    future, _ = LOOP.submit(awaited())
    try:
        return future.result()
    finally:
        future.cancel()  # an interrupted cell waits for nothing any more


@checked
def judge(
    url: str,
    model: str,
    rubric: str,
    *,
    columns: Sequence[str] = (),
    scale: Sequence[float] = (0.0, 10.0),
    key_env: str | None = None,
    concurrency: int = 8,
    retries: int = 4,
    timeout: float = 60.0,
    options: Mapping[str, Any] | None = None,
    cache: Path | str | bool = True,
    name: str = "judge",
) -> Reward:
    """Return a reward that asks a language model for a score, over an OpenAI-compatible endpoint.

    **Prompts, answers and `columns` are sent to that address.** With differential privacy a trainer refuses it: what
    is sent is covered by no ε. A judgement that fails, or gives no score, leaves the answer unscored, never 0. The
    limits here hold instead of a scorer's `timeout`. `reward.function.counts` adds up what was asked.

    Args:
        url: Of the API, such as "http://127.0.0.1:8000/v1": `/chat/completions` is put behind it.
        model: What the endpoint calls the model.
        rubric: What makes an answer good, in words. How to answer (reasons, then "Score: N") is added to it.
        columns: Columns of the prompt that the judge sees beside question and answer, such as ["answer"].
        scale: The lowest and the highest score it may give; the reward is 0 at the one and 1 at the other.
        key_env: Name of the environment variable with the API key. None sends no key.
        concurrency: Questions under way at once.
        retries: How often a question is asked again after 408, 425, 429, 5xx or a broken connection: as Retry-After
            says, else after 0.5 s, 1 s, 2 s and so on.
        timeout: Seconds a judgement may take, retries and waiting for them included.
        options: Further fields of the request; None as a value leaves out one of `temperature` (0) and `max_tokens`
            (512).
        cache: Keep answers that gave a score, by all that was asked: True in the home folder, a path there, False
            nowhere, so that every question is asked anew.
        name: What it is called in metrics and charts.

    Raises:
        ValidationError: An address that carries a secret, a key instead of a variable's name, a variable that is not
            set, or an option out of range.

    Example:
        >>> polite = judge("http://127.0.0.1:8000/v1", "judge-model", "Polite, and answers the question.")
    """
    low, high = scale if len(scale) == 2 else (0.0, 0.0)
    if not (low < high and math.isfinite(high - low)):
        raise ValidationError(f"judge: scale={as_given(scale)} is the lowest score and the highest: (0, 10).")
    if not (concurrency >= 1 and retries >= 0 and 0 < timeout <= 86_400):
        raise ValidationError(
            f"judge: concurrency={concurrency} must be at least 1, retries={retries} at least 0, and "
            f"timeout={timeout:g} from above 0 to 86400 seconds."
        )
    if not (url and model and rubric):
        raise ValidationError("judge: url, model and rubric each need a text.")
    folder = Home.of_environment().judgements() if cache is True else Path(cache) if cache else None
    shown = (columns,) if isinstance(columns, str) else columns
    made = LLMJudge(
        url, model, rubric, shown, (float(low), float(high)), key_env, concurrency, retries, float(timeout),
        options or {}, folder,
    )  # fmt: skip
    return replace(resolve_reward(made), name=name)


@_REWARDS.register("composite")
def composite(
    prompt: str, response: str, meta: Mapping[str, Any] | None = None, *, parts: Any = ()
) -> float | None:
    """Add up several rewards, each with a weight.

    A part that abstains is left out of the sum. A part that fails makes the whole unscored, unless its weight
    is 0.

    Args:
        prompt: Given to each part.
        response: Given to each part.
        meta: Given to each part.
        parts: {"exact_match": 1.0, "format_compliance": 0.2}, or a list of `Part`s or of dicts with `reward`,
            and `weight`, `name`, `true`, `kwargs` if wanted. Weight 0 is a metric only; `true` marks the one
            part that says what you really want.

    Raises:
        ValidationError: No parts, two of one name, or two marked as true.

    Example:
        >>> reward = resolve_reward("composite", parts={"exact_match": 1.0, "format_compliance": 0.2})
    """
    return resolve_reward(composite, parts=parts)(prompt, response, meta)


for _name, _builtin in _BUILTINS.items():
    _REWARDS.register(_name)(_builtin.function)
