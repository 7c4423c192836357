"""A sink, as whoever forwards metrics knows it; a plain function, or one of the known kinds, is made one here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest

KINDS = {"tensorboard": "TensorBoard", "trackio": "Trackio", "mlflow": "MLflow", "wandb": "WeightsAndBiases"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkRun:
    """A run as a sink is told of it; operations called one by one are a run that has their training client's id.

    Attributes:
        run_id: `<training_client_id>/<n>`, the same in every sink.
        name: What it is called; its id where it has no name.
        config: The configuration, flat: "training.optimizer.learning_rate", "run.steps" and so on.
        tags: Words to find it by.
        notes: What its user says of it.
    """

    run_id: str
    name: str
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    notes: str = ""


class Sink(Protocol):
    """Takes what is measured. All methods are called on one thread, in the order in which things happened.

    One that raises ends the forwarding to it, with an alarm; the training goes on. One that has a method
    `describe(run)` as well is told when a run gets another name, other tags or notes.
    """

    def begin(self, run: SinkRun) -> None:
        """A run has begun."""

    def metrics(self, run: SinkRun, step: int, values: Mapping[str, float], time: float) -> None:
        """Values were measured at a step, at a time in Unix seconds; after a rollback steps come again."""

    def text(self, run: SinkRun, step: int, name: str, text: str, time: float) -> None:
        """Something was said: an alarm ("alarms/…"), or, if it was asked for, samples; in Markdown."""

    def end(self, run: SinkRun, state: str) -> None:
        """A run has ended: FINISHED, STOPPED or FAILED; INTERRUPTED if no more is told though it has no end."""

    def close(self) -> None:
        """Nothing follows."""


class FunctionSink:
    """Calls `function(values, step)` with everything that is measured."""

    def __init__(self, function: Callable[[Mapping[str, float], int], object]) -> None:
        self._function = function

    def begin(self, run: SinkRun) -> None: ...

    def metrics(self, run: SinkRun, step: int, values: Mapping[str, float], time: float) -> None:
        self._function(values, step)

    def text(self, run: SinkRun, step: int, name: str, text: str, time: float) -> None: ...
    def end(self, run: SinkRun, state: str) -> None: ...
    def close(self) -> None: ...


def sink_of(given: Any, where: str | Path | None, options: Mapping[str, Any]) -> tuple[str, Sink]:
    """Return the name of a sink, and the sink: of a known kind, an object of the user's, or a function.

    Raises:
        ValidationError: No such kind, its package is not installed, or what it was given does not fit.
    """
    if isinstance(given, str):
        if given not in KINDS:
            raise ValidationError(f"log_to: there is no sink {as_given(given)}.{nearest(given, KINDS)}")
        made = getattr(import_module(f"tensafe_nb.history.sinks.{given}"), KINDS[given])
        try:
            sink: Sink = made(**({} if where is None else {"where": where}), **options)
        except ValidationError:
            raise
        except Exception as error:  # theirs: a server that is not there, a folder that cannot be written
            raise ValidationError(
                f"log_to({given!r}): {type(error).__name__}: {str(error).rstrip('.')}."
            ) from error
        return given, sink
    if where is not None or options:
        raise ValidationError(
            "log_to: `where` and further options go with a sink that is named, such as log_to('tensorboard', 'runs')."
        )
    name = getattr(given, "__name__", type(given).__name__)
    if isinstance(given, type):
        raise ValidationError(f"log_to takes an object, not the class {name}: log_to({name}(…)).")
    if hasattr(given, "metrics"):
        missing = [method for method in methods() if not callable(getattr(given, method, None))]
        if missing:
            raise ValidationError(
                f"log_to: the sink {name} has no {', '.join(missing)}; the Protocol "
                f"tensafe_nb.history.sinks.sink.Sink says what each is for."
            )
        return name, given
    if not callable(given):
        raise ValidationError(
            f"log_to takes {', '.join(map(repr, KINDS))}, a function of (values, step), or an object with the methods "
            f"{', '.join(methods())}, not {as_given(given)}."
        )
    return name, FunctionSink(given)


def methods() -> list[str]:
    """Return the names of a sink's methods."""
    return [name for name in vars(Sink) if not name.startswith("_")]


def installed(module: str, package: str) -> ModuleType:
    """Return a module of a package that is no dependency of ours.

    Raises:
        ValidationError: It is not installed; says the line that does it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if error.name is not None and module.startswith(error.name):
            raise ValidationError(
                f"log_to({package.partition('-')[0]!r}) needs a package that is not here: pip install {package}"
            ) from error
        raise ValidationError(f"log_to: {package} is installed, and cannot be imported: {error}.") from error


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield the entries of a configuration by their dotted names; what is no number is told as a text."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)
