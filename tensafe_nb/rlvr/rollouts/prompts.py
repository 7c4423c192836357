"""reasoning-gym's data sets as prompts: the data set itself is their reward. Needs tensafe_nb[gym]."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

FIELDS = {"question", "answer", "metadata"}
MOST_ENTRIES = 1_000_000  # the iteration of some of its data sets has no end


def gym_prompts(dataset: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the questions of a reasoning-gym data set, as prompts for `RLVRTrainer`.

    The data set is also their reward. Its default `score_answer` pays len(answer)/len(response) for a response
    that merely contains the answer: a model will find that out.

    Args:
        dataset: What `reasoning_gym.create_dataset(name, size=…, seed=…)` returned.

    Returns:
        Dicts with `prompt`, and the columns `answer` and `metadata` that scoring needs.

    Example:
        >>> dataset = reasoning_gym.create_dataset("spell_backward", size=256, seed=0)
        >>> trainer = RLVRTrainer(tc, gym_prompts(dataset), dataset)
    """
    entries = list(itertools.islice(dataset, MOST_ENTRIES)) if isinstance(dataset, Iterable) else None
    if entries is None or not all(isinstance(entry, Mapping) and entry.keys() >= FIELDS for entry in entries):
        raise ValidationError(
            f"gym_prompts: a data set of reasoning_gym has entries with {', '.join(sorted(FIELDS))}; this is "
            f"{as_given(dataset)}."
        )
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "metadata": dict(entry["metadata"])}
        for entry in entries
    ]
