"""Arms: what is compared. A recipe, or a function that starts a run, with one choice of what varies."""

import asyncio
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tensafe_nb import widgets
from tensafe_nb.config import TrainingConfig
from tensafe_nb.display import as_given, short
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.recipes.recipe import LAYOUT, Recipe, load_config, misplaced, recipe_fields
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.service import ServiceClient

Vary: TypeAlias = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None
OWN = ("service", "seed", "resume_from")  # what every arm is given
MOST_ARMS = 50
RECIPES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """One of those that are compared.

    Attributes:
        name: What it is called in chart and table.
        varied: What is different about it.
        idea: What starts its runs.
        parent: The arm that it was forked from, and at which step.
        steps: How many steps its runs are to take, where that is known.
    """

    name: str
    varied: Mapping[str, Any]
    idea: "Idea"
    parent: tuple[str, int] | None = None

    def start(self, service: ServiceClient, seed: int, resume_from: str | None) -> TrainingRun:
        """Start the run of a seed; nothing of it is shown.

        Raises:
            ValidationError: The function returned no run.
        """
        with widgets.nothing_shown():
            return self.idea.start(service, seed, self.varied, resume_from)


@dataclass(frozen=True, slots=True, eq=False)
class FunctionIdea:
    """A function `arm(service, seed, **varied)` that returns a run it has started."""

    function: Callable[..., Any]
    steps: int | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def check(self, varied: Mapping[str, Any]) -> None:
        """Refuse what the function does not take, before anything is trained.

        Raises:
            ValidationError: Says which, with the nearest.
        """
        signature = inspect.signature(self.function)
        known = [name for name in signature.parameters if name not in OWN]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for name in varied:
            if name not in known and not takes_all:
                raise ValidationError(
                    f"compare: {self.name}{signature} takes no {as_given(name)}, which is to vary."
                    f"{nearest(name, known)}"
                )
        try:
            signature.bind(object(), 0, **self._with_steps(varied))
        except TypeError as error:
            raise ValidationError(
                f"compare: an arm is called as {self.name}(service, seed{''.join(f', {n}=…' for n in varied)}), and "
                f"{self.name}{signature} cannot be: {error}."
            ) from error

    @property
    def resumes(self) -> bool:
        """Whether it can be told to go on from a checkpoint."""
        return "resume_from" in inspect.signature(self.function).parameters

    def _with_steps(self, varied: Mapping[str, Any]) -> dict[str, Any]:
        takes_steps = "steps" in inspect.signature(self.function).parameters
        return {**({"steps": self.steps} if self.steps and takes_steps else {}), **varied}

    def start(
        self, service: ServiceClient, seed: int, varied: Mapping[str, Any], resume_from: str | None
    ) -> TrainingRun:
        """Call it."""
        resumed = {} if resume_from is None else {"resume_from": resume_from}
        run = self.function(service, seed, **self._with_steps(varied), **resumed)
        if inspect.iscoroutine(run):
            run = asyncio.run(run)
        if not isinstance(run, TrainingRun):
            returns = "It has no return" if run is None else "Return the run"
            raise ValidationError(
                f"compare: {self.name}(service, seed, …) must return the run that it started, and returned "
                f"{as_given(run)}. {returns}: return tc.fit(…, show=False), or trainer.run(steps=…, show=False)."
            )
        return run


@dataclass(frozen=True, slots=True, eq=False)
class RecipeIdea:
    """A recipe with the rows it is trained on; each seed is the recipe's seed, so that all arms see the same order."""

    recipe: Recipe
    name: str
    data: Any
    eval_data: Any = None
    made: dict[str, Recipe] = field(default_factory=dict)  # what is varied, as text → the recipe

    resumes = True

    def check(self, varied: Mapping[str, Any]) -> None:
        """Refuse what the recipe does not have, or what does not fit it.

        Raises:
            ValidationError: Says which, with the nearest.
        """
        self.recipe_with(varied)

    def recipe_with(self, varied: Mapping[str, Any]) -> Recipe:
        """Return the recipe with some entries changed."""
        values: dict[str, Any] = self.recipe.model_dump()
        for name, value in varied.items():
            put(values, path_of(values, name), value)
        try:
            return Recipe(**values)
        except ValidationError as error:
            told = ", ".join(f"{name}={as_given(value)}" for name, value in varied.items())
            raise ValidationError(f"compare: {told} makes no recipe: {error}") from error

    def start(
        self, service: ServiceClient, seed: int, varied: Mapping[str, Any], resume_from: str | None
    ) -> TrainingRun:
        """Make a training client of the recipe and start it."""
        recipe = self.recipe_with(varied)
        recipe = recipe.replace(training=recipe.training.replace(seed=seed))
        client = service.create_training_client(recipe.training)
        return recipe.start(client, self.data, self.eval_data, resume_from=resume_from, show=False)


Idea: TypeAlias = FunctionIdea | RecipeIdea


def arms_of(arm: Any, vary: Vary, data: Any, eval_data: Any, steps: int | None) -> list[Arm]:
    """Return what is to be compared.

    Args:
        arm: A recipe, a function, or a list of these.
        vary: A dict of lists, whose combinations are the arms; or a list of dicts, each of them an arm.
        data: What recipes are trained on.
        eval_data: And measured on.
        steps: How many.

    Raises:
        ValidationError: Something that is no arm, or a choice that does not fit it.
    """
    several = isinstance(arm, Sequence) and not isinstance(arm, str)
    given = list(arm) if several else [arm]
    if not given:
        raise ValidationError("compare: the list of arms is empty: give at least one.")
    ideas = [idea_of(one, number, data, eval_data, steps) for number, one in enumerate(given, 1)]
    arms: list[Arm] = []
    for idea, varied in itertools.product(ideas, choices_of(vary)):
        idea.check(varied)
        parts = [*([idea.name] if several else []), *name_parts(varied)]
        arms.append(Arm(", ".join(parts) or idea.name, varied, idea))
    names = [one.name for one in arms]
    for name in names:
        if names.count(name) > 1:
            raise ValidationError(
                f"compare: two arms are both called {as_given(name)}: nothing tells them apart. Leave one out, or give "
                f"what varies a name of its own."
            )
    if len(arms) > MOST_ARMS:
        raise ValidationError(
            f"compare: {len(arms)} arms are more than {MOST_ARMS}: with so many, chance alone makes some look better. "
            f"Vary less at a time."
        )
    return arms


def idea_of(arm: Any, number: int, data: Any, eval_data: Any, steps: int | None) -> Idea:
    """Return what starts the runs of an arm.

    Raises:
        ValidationError: It is none, or has no data.
    """
    if callable(arm) and not isinstance(arm, Recipe | TrainingConfig):
        if data is not None or eval_data is not None:
            raise ValidationError(
                "compare: data= and eval_data= are for recipes; a function reads its own rows."
            )
        return FunctionIdea(arm, steps)
    name = f"arm {number}"
    match arm:
        case Recipe():
            recipe = arm
        case TrainingConfig():
            recipe = Recipe(training=arm)
        case Mapping():
            for _, problem in misplaced(arm):
                raise ValidationError(f"compare: {problem}")
            recipe = Recipe(**recipe_fields(arm))
        case str() | Path():
            if Path(arm).suffix.lower() not in RECIPES:
                raise ValidationError(
                    f"compare: arm={as_given(str(arm))} is no recipe: give a .yaml file as `tensafe-nb run` reads it, "
                    f"a Recipe, a dict of its sections, or a function arm(service, seed, …)."
                )
            recipe, name = load_config(Path(arm)), Path(arm).stem
        case _:
            raise ValidationError(
                f"compare: arm={as_given(arm)} must be a function arm(service, seed, …) that returns a run, a recipe, "
                f"or a list of these."
            )
    if data is None:
        raise ValidationError("compare: a recipe does not say what it is trained on: give data=rows.")
    if steps is not None:
        recipe = recipe.replace(steps=steps)
    if recipe.rlvr is not None and recipe.steps is None:
        raise ValidationError("compare: a recipe of mode rlvr needs a number of steps: give steps=….")
    return RecipeIdea(recipe, name, several_times(data), several_times(eval_data))


def several_times(rows: Any) -> Any:
    """Return rows that each run can read: what can be iterated only once is kept as a list."""
    return list(rows) if isinstance(rows, Iterator) else rows


def choices_of(vary: Vary) -> list[dict[str, Any]]:
    """Return what varies, one dict for each arm; a single empty one where nothing does.

    Raises:
        ValidationError: It is no dict of lists, and no list of dicts.
    """
    if vary is None:
        return [{}]
    if isinstance(vary, Mapping):
        for name, values in vary.items():
            if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
                raise ValidationError(
                    f"compare: vary={{{as_given(name)}: {as_given(values)}}} must hold a list of values, one for each "
                    f"arm: vary={{{as_given(name)}: [{as_given(values)}, …]}}."
                )
        lists = {name: list(values) for name, values in vary.items()}
        empty = next((name for name, values in lists.items() if not values), None)
        if empty is not None:
            raise ValidationError(f"compare: vary[{as_given(empty)}] is empty: there would be no arm.")
        choices = [dict(zip(lists, one, strict=True)) for one in itertools.product(*lists.values())]
    elif isinstance(vary, Sequence) and vary and all(isinstance(one, Mapping) for one in vary):
        choices = [dict(one) for one in vary]
    else:
        raise ValidationError(
            f"compare: vary={as_given(vary)} must be a dict of lists, whose combinations are the arms, or a list of "
            f"dicts, each of them an arm."
        )
    for name in {name for one in choices for name in one}:
        if not isinstance(name, str):
            raise ValidationError(f"compare: what varies is named by text, not by {as_given(name)}.")
        if name in OWN:
            meant = "seeds=[…]" if name == "seed" else f"the argument that gives {name}"
            raise ValidationError(f"compare: {name} does not vary between arms: use {meant}.")
    return choices


def name_parts(varied: Mapping[str, Any]) -> list[str]:
    """Return what is varied, in words: `learning_rate=0.001`."""
    return [
        f"{name.rpartition('.')[2]}={getattr(value, '__name__', None) or short(value)}"
        for name, value in varied.items()
    ]


def path_of(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the place in a recipe that a name means: its whole path, the end of one, or its place in a file.

    Raises:
        ValidationError: There is none, or there are several; says the nearest.
    """
    wanted = tuple(name.split("."))
    for place, at in LAYOUT.items():  # as a file says it: lora.rank, batch.batch_size
        if wanted[: len(place)] == place:
            return (*map(str, at), *wanted[len(place) :])
    paths = list(paths_of(values))
    found = [path for path in paths if path[-len(wanted) :] == wanted]
    if not found:  # a keyword that has its default: …kwargs.NAME
        opened = [path for path in paths if path[-1] == "kwargs" and len(wanted) > 1]
        found = [(*path, wanted[-1]) for path in opened if path[-len(wanted) + 1 :] == wanted[:-1]]
    shortest = [path for path in found if len(path) == min(map(len, found))]
    if len(shortest) == 1:
        return shortest[0]
    if shortest:
        listed = ", ".join(".".join(path) for path in shortest)
        raise ValidationError(f"compare: {as_given(name)} may mean {listed}: write which.")
    known = [part for path in paths for part in (".".join(path), path[-1])]
    raise ValidationError(
        f"compare: the recipe has no {as_given(name)}, which is to vary.{nearest(name, known)}"
    )


def paths_of(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every entry, those that hold others among them."""
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, Mapping):
            yield from paths_of(value, (*above, name))


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set an entry; one that holds others is replaced whole."""
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value
