"""Environments that ship: small ones, to try a run with before yours is written."""

from collections.abc import Generator, Mapping
from typing import Any

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.environment import Outcome, Told, Turn, environment


@environment(name="sums", max_turns=8)
def sums(row: Mapping[str, Any]) -> Generator[Told | Turn, str, Outcome]:
    """Ask one sum after the other, and reward each right answer with its share of 1.

    The row has a list of sums in the column `sums`, each with `prompt` and `answer`: those of `datasets.sums`.

    Raises:
        ValidationError: It has none.
    """
    asked = row.get("sums")
    if not isinstance(asked, list | tuple) or not asked:
        raise ValidationError("the environment 'sums' needs a column sums: a list of rows of datasets.sums")
    right: list[bool] = []
    for question in asked:
        said = yield Turn(question["prompt"], reward=right[-1] / len(asked) if right else None)
        right.append(said.strip() == question["answer"])
    return Outcome(right[-1] / len(asked), {f"sum {number}": one for number, one in enumerate(right, 1)})
