"""A comparison as its chart and the part that stays in the file show it."""

from typing import Any

from tensafe_nb.comparing.results import ComparisonResult, facts_of
from tensafe_nb.display import short
from tensafe_nb.widgets.still.race import Shown

COLUMNS = ("arm", "mean", "interval", "seeds", "step")
NUMBERS = ("mean", "interval", "step")


def shown_of(
    result: ComparisonResult, comparison_id: str, *, active: bool, steer: bool, reason: str | None
) -> Shown:
    """Return what is shown of a comparison.

    Args:
        result: How it stands.
        comparison_id: Its id.
        active: Whether it is under way.
        steer: Whether it can be paused and stopped from here.
        reason: Why it failed.
    """
    told = result.standings
    metric = told.measure.metric if told.measure is not None else None
    labels = tuple(told.arms)
    curves: dict[str, Any] = {}
    for number, arm in enumerate(labels):
        at, mean, reach = told.curve(arm)
        curves |= {str(number): (at, mean), f"{number}±": (at, reach)}
    columns = [*COLUMNS, *(["ε"] if result.private else []), "note"]
    rows = [
        [short(value) for value in ({"arm": arm.name} | facts_of(arm, private=result.private)).values()]
        for arm in result.arms
    ]
    title = f"comparison {comparison_id}" + (f" “{told.name}”" if told.name != comparison_id else "")
    verdicts = [[str(difference), difference.seen] for difference in result.differences]
    return Shown(
        title=title,
        sentence="; ".join([result.headline, *result.verdicts()]),
        labels=labels,
        metric=metric,
        curves=curves,
        status={
            "state": told.state,
            "id": comparison_id,
            "head": result.headline.partition(", ")[2],
            "curve": metric,
            "labels": list(labels),
            "of": told.measure.planned if told.measure is not None else None,
            "step": result.step,
            "active": active,
            "steer": steer,
            "dp": result.private,
            "reason": reason,
        },
        standing={
            "columns": columns,
            "numbers": [name in NUMBERS for name in columns],
            "rows": rows,
            "verdicts": verdicts,
            "notes": result.notes(),
        },
        table=result._repr_html_(),
        text=repr(result),
        active=active,
    )
