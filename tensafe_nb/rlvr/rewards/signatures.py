"""The conventions of reward functions, read off their parameters; what fits none is refused with what would."""

import inspect
from collections.abc import Mapping
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.registry import check_keywords
from tensafe_nb.rlvr.rewards.conventions import Call, Style

_COLUMNS = frozenset(
    {"answer", "ground_truth", "label", "target", "solution", "gold", "reference", "expected"}
)
_NOT_META = _COLUMNS | {"completion"}
_NOT_PROMPT = _COLUMNS | {"response", "completion", "output", "prediction", "pred", "generation", "generated"}
_KNOWN = {  # what a function of a style may need; which columns there are is known when the prompts are
    Style.OPENRLHF: frozenset({"queries", "prompts", "labels"}),
    Style.VERL_BATCH: frozenset({"data_sources", "solution_strs", "ground_truths", "extra_infos"}),
}


def call_for(spec: Any, name: str, kwargs: Mapping[str, Any], conversational: bool | None) -> Call:
    """Find out how to call a function.

    Args:
        spec: A callable, or an object with `score_answer`.
        name: What a person calls it, for messages.
        kwargs: Keywords to bind.
        conversational: Whether prompts and completions are to go as chat messages; None: as the prompts are given.

    Raises:
        ValidationError: A signature that is none of those known, or an unknown keyword.
    """
    if hasattr(spec, "score_answer"):
        if kwargs:
            raise ValidationError(
                f"The reward {as_given(name)} is a data set's score_answer and takes no keywords."
            )
        return Call(spec.score_answer, {}, Style.GYM, frozenset({"answer", "entry"}))
    signature = signature_of(spec, name)
    style = style_of(signature)
    positional = positional_count(signature, name, kwargs) if style is Style.OURS else 0
    check_keywords(spec, dict(kwargs), "reward", positional)
    if conversational and style not in (Style.TRL, Style.VERIFIERS):
        raise ValidationError(
            f"The reward {as_given(name)}: conversational=True is for TRL's and verifiers' functions, this one has "
            f"the signature {signature}."
        )
    parameters = list(signature.parameters.values())
    if style is Style.OURS and parameters[0].annotation in (str, "str"):  # it wants the text of messages
        conversational = False
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    call = Call(
        spec,
        dict(kwargs),
        style,
        names=frozenset(p.name for p in named),
        required=frozenset(p.name for p in named if p.default is p.empty),
        open=any(p.kind is p.VAR_KEYWORD for p in parameters),
        positional=positional,
        conversational=conversational,
    )
    refuse_unbound(call, name)
    return call


def signature_of(spec: Any, name: str) -> inspect.Signature:
    """Return the signature of what can be called once for a score; refuse what cannot."""
    if inspect.isclass(spec):
        raise ValidationError(f"The reward {as_given(name)} is a class: give an object of it, {name}(…).")
    for function in (spec, getattr(spec, "__call__", None)):  # noqa: B004  # of an object, its __call__
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ValidationError(
                f"The reward {as_given(name)} yields: a reward returns its number (or list of numbers)."
            )
    try:
        signature = inspect.signature(spec)
    except (TypeError, ValueError) as error:
        raise ValidationError(
            f"The reward {as_given(name)} does not say which parameters it takes ({error}): wrap it, "
            f"lambda prompt, response: … ."
        ) from error
    names = list(signature.parameters)
    if "trace" in names and not {"response", "completion", "completions"} & set(names):
        raise ValidationError(
            f"The reward {as_given(name)} is one of verifiers v1: it needs the trace of a verifiers rollout, which "
            f"there is none of here. Write what it compares as\n"
            f"async def {name}(completion, answer): return float(completion[-1]['content'] == str(answer))"
        )
    if names[:1] in (["self"], ["cls"]):
        raise ValidationError(
            f"The reward {as_given(name)} is a method without its object: give that of an object, Judge(…).{name}"
        )
    kinds = {p.kind for p in signature.parameters.values()}
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} and names:
        raise ValidationError(
            f"The reward {as_given(name)} has the signature {signature}, which hides what it takes. If it is "
            f"decorated, put @functools.wraps(function) on the wrapper inside the decorator; else name its parameters, "
            f"fn(prompt, response, meta=None)."
        )
    return signature


def style_of(signature: inspect.Signature) -> Style:
    """Return whose convention the names of the parameters are of."""
    names = set(signature.parameters)
    if {"completions", "environments"} & names:
        return Style.TRL
    if "solution_str" in names:
        return Style.VERL
    if "solution_strs" in names:
        return Style.VERL_BATCH
    if {"queries", "prompts"} <= names:
        return Style.OPENRLHF
    if "completion" in names and not {"response", "meta"} & names:
        return Style.VERIFIERS
    return Style.OURS


def refuse_unbound(call: Call, name: str) -> None:
    """Refuse a foreign function that needs what nobody can give it."""
    if call.style is Style.TRL and "environments" in call.required - set(call.kwargs):
        raise ValidationError(
            f"The reward {as_given(name)} needs environments, which are TRL's for several turns: "
            f"rlvr.trl_environment(factory, reward={name}) has them. Elsewhere score a text: "
            f"def {name}(completions, **columns)."
        )
    needed = call.required - set(call.kwargs)
    missing = (
        needed & {"parser"} if call.style is Style.VERIFIERS else needed - _KNOWN.get(call.style, needed)
    )
    if missing:
        raise ValidationError(
            f"The reward {as_given(name)} needs {', '.join(sorted(missing))}: bind it with "
            f"resolve_reward(function, {min(missing)}=…)."
        )


def positional_count(signature: inspect.Signature, name: str, kwargs: Mapping[str, Any]) -> int:
    """Return how many of (prompt, response, meta) a function of our style takes: 3 or 2."""
    names = list(signature.parameters)
    ambiguous = bool(
        set(names[:1]) & _NOT_PROMPT
        or set(names[1:2]) & _COLUMNS
        or set(names[2:3]) & (_NOT_META - set(kwargs))
    )
    keywords = set(kwargs) | ({"tokens"} & set(names[2:]))
    third = list(signature.parameters.values())[2:3]
    # A third parameter with a default of its own is an option, as in fn(prompt, response, limit=20): no meta.
    option = any(
        p.default is not p.empty and p.default is not None and not p.name.startswith("meta") for p in third
    )
    most = 2 if option else 3
    counts = [count for count in (3, 2) if count <= most and binds(signature, count, keywords)]
    if counts and not ambiguous:
        return counts[0]
    hint = ""
    if ambiguous:
        hint = (
            " The prompt comes first, the response second, and columns of the prompts in meta: read meta['answer'], "
            "and name the response 'response'."
        )
    raise ValidationError(
        f"The reward {as_given(name)} has the signature {signature}: expected fn(prompt, response, meta=None) -> "
        f"float, or the signature of a TRL, verl, OpenRLHF or verifiers function.{hint}"
    )


def binds(signature: inspect.Signature, count: int, keywords: set[str]) -> bool:
    """Whether a function can be called with so many positional arguments and these keywords."""
    known = {name for name in keywords if name in signature.parameters}  # unknown ones are refused elsewhere
    try:
        signature.bind(*range(count), **dict.fromkeys(known))
    except TypeError:
        return False
    return True
