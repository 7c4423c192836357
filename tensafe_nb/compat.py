"""Stands in for the packages `tg_tinker` and `tensafe`, so that code written for them runs as it is.

`import tensafe_nb.compat` once; then `from tg_tinker import BatchData`, `from tensafe.training.losses import
resolve_loss` and `from tensafe.rlvr import REINFORCE` give this package's own objects, loaded when first used.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from tensafe_nb.errors import ValidationError

STANDS_FOR = {
    "tg_tinker": "tensafe_nb",
    "tensafe": "tensafe_nb",
    "tensafe.training": "tensafe_nb",
    "tensafe.training.losses": "tensafe_nb.losses",
    "tensafe.rlvr": "tensafe_nb.rlvr",
}


class StandIn(ModuleType):
    """A module whose names are those of another, `target`."""

    def __init__(self, name: str, target: str) -> None:
        super().__init__(name, f"Stands for {target}; made by tensafe_nb.compat.")
        self.__spec__ = ModuleSpec(name, loader=None, origin=__name__, is_package=True)
        self.__path__: list[str] = []
        self._target = target

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name in ("__all__", "__version__"):  # introspection loads nothing
            target = import_module(self._target)
            if name == "__all__" or name in target.__all__:
                return getattr(target, name)
        raise AttributeError(f"module {self.__name__!r}, which stands for {self._target}, has no {name!r}")

    def __dir__(self) -> list[str]:
        return sorted(import_module(self._target).__all__)


def place_of(package: str) -> str | None:
    """Return where somebody else's package of this name lies; None when there is none."""
    module = sys.modules.get(package)
    spec = find_spec(package) if module is None else module.__spec__
    if spec is None:
        return None if module is None else "imported already"
    if spec.origin == __name__:
        return None
    return spec.origin or ", ".join(spec.submodule_search_locations or ())


def stand_in() -> None:
    """Put the stand-ins where Python looks for modules.

    Raises:
        ValidationError: A package of one of these names is installed.
    """
    for package in ("tg_tinker", "tensafe"):
        place = place_of(package)
        if place is not None:
            raise ValidationError(
                f"There is a package {package!r} already ({place}), and tensafe_nb.compat does not take its place. "
                f"Import from tensafe_nb instead, or remove that package."
            )
    for name, target in STANDS_FOR.items():
        module = sys.modules[name] = StandIn(name, target)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


stand_in()
