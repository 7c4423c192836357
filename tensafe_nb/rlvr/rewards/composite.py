"""Composite rewards: the parts they are made of, whichever way those are given, and their weighted sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.rlvr.rewards.conventions import Verdict, number_of


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a composite reward.

    Attributes:
        reward: What scores it: a name, a function, or a resolved reward when it has keywords.
        weight: Its factor in the sum; 0 makes it a metric that trains nothing.
        name: In metrics and `reward_parts`; the reward's own when empty.
        true: It is what you really want, a held-out check on the rest. At most one part is.
    """

    reward: Any
    weight: float = 1.0
    name: str = ""
    true: bool = False

    def identified(self) -> list[Any]:
        """Return what its scores depend on."""
        return [self.reward, self.weight, self.name, self.true]


def read_parts(
    given: Any, resolve: Callable[..., Any], weights: Sequence[float] | None = None
) -> "tuple[Part, ...]":
    """Read the parts of a composite, whichever way they were given.

    Args:
        given: {reward: weight}, {name: function}, or a list of rewards, (reward, weight) pairs, `Part`s or dicts.
        resolve: Makes a reward of what stands for one.
        weights: Of a list, one for each.

    Raises:
        ValidationError: No parts, two of one name, no weight but 0, or two marked as true.
    """
    given = parts_listed(given, weights)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValidationError(
            'composite needs parts: {"exact_match": 1.0, "format_compliance": 0.2}, or a list of Part(reward, weight).'
        )
    parts = tuple(read_part(part, resolve) for part in given)
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ValidationError(
            f"composite has two parts of one name ({', '.join(names)}): give each a name=…, as in "
            f'{{"first": f, "second": g}} or [Part(f, name="first"), …].'
        )
    if sum(part.true for part in parts) > 1:
        raise ValidationError(
            "composite has more than one part with true=True: one at most can be the true aim."
        )
    if not any(part.weight for part in parts):
        raise ValidationError("composite: the weight of every part is 0, so there is nothing to learn from.")
    return parts


def parts_listed(given: Any, weights: Sequence[float] | None) -> Any:
    """Return parts as a list: of a mapping, whose values are weights, or functions under names of their own."""
    if isinstance(given, Mapping):
        if weights is not None:
            raise ValidationError("composite: weights=[…] goes with a list; a dict has them as its values.")
        return [part_of(key, value) for key, value in given.items()]
    if weights is None or not isinstance(given, Sequence) or isinstance(given, str):
        return given
    if not hasattr(weights, "__len__") or isinstance(weights, range | str):
        raise ValidationError(f"composite: weights is a list of numbers, not {as_given(weights)}.")
    if len(weights) != len(given):
        raise ValidationError(
            f"composite: {len(given)} rewards and the weights {as_given(weights)}: give one for each."
        )
    return [Part(reward, weight) for reward, weight in zip(given, weights, strict=True)]


def part_of(key: Any, value: Any) -> Part:
    """Return the part that an entry of a mapping stands for: {reward: weight} or {name: reward}."""
    if isinstance(value, Part):
        return replace(value, name=value.name or str(key))
    if isinstance(value, tuple) and len(value) == 2:
        return Part(value[0], value[1], name=str(key))
    named = callable(value) or hasattr(value, "leaves")
    return Part(value, name=str(key)) if named else Part(key, value)


def read_part(given: Any, resolve: Callable[..., Any]) -> Part:
    """Read one part: a reward, a pair with its weight, a dict or a `Part`.

    Raises:
        ValidationError: A key that no part has, no reward, or a weight that is no number.
    """
    if isinstance(given, Mapping):
        known = {"reward", "weight", "name", "true", "kwargs"}
        for key in set(given) - known:
            raise ValidationError(f"composite: a part has no {as_given(key)}.{nearest(str(key), known)}")
        if "reward" not in given:
            raise ValidationError(
                f"composite: the part {as_given(dict(given))} does not say which reward it is."
            )
        values = {key: given[key] for key in ("weight", "name", "true") if key in given}
        given = Part(resolve(given["reward"], **given.get("kwargs", {})), **values)
    if isinstance(given, tuple) and len(given) == 2:
        given = Part(*given)
    part = given if isinstance(given, Part) else Part(given)
    reward = resolve(part.reward)
    weight = None if isinstance(part.weight, bool) else number_of(part.weight)
    if weight is None:
        raise ValidationError(
            f"composite: the weight of {as_given(reward.name)} is {as_given(part.weight)}, expected a number."
        )
    return Part(reward, weight, part.name or reward.name, part.true)


def combined(parts: Sequence[Part], outcomes: Sequence[Verdict]) -> Verdict:
    """Return the outcome of a composite from those of its parts, in their order."""
    named = list(zip(parts, outcomes, strict=True))
    failures = [f"{part.name}: {outcome.error}" for part, outcome in named if outcome.error]
    # A failed part leaves a hole in the sum, and a hole is no 0; of weight 0 it is only a metric that is missing.
    fatal = any(outcome.error and part.weight for part, outcome in named)
    # Σ w_i r_i over the parts that gave a score: one that abstains adds nothing.
    terms = [part.weight * o.score for part, o in named if part.weight and o.score is not None]
    return Verdict(
        None if fatal or not terms else sum(terms),
        {name: value for part, outcome in named for name, value in named_parts(part.name, outcome).items()},
        "; ".join(failures) or None,
        any(outcome.timed_out for outcome in outcomes),
    )


def named_parts(name: str, outcome: Verdict) -> dict[str, float]:
    """Return a function's score under its name, and what else it returned under "name/…"."""
    own = {} if outcome.score is None else {name: outcome.score}
    return own | {f"{name}/{key}": value for key, value in (outcome.parts or {}).items()}
