"""Functions on their way to scoring processes: as they are in this process, not as their files are now.

Functions and classes of the user's own modules are pickled by value, like those of a notebook. Modules that they use,
also by an import inside a function, go with them, with the names that are used. Packages are imported there.
"""

import io
import linecache
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import cloudpickle  # type: ignore[import-untyped, unused-ignore]

from tensafe_nb.rlvr.rewards.identity import local_modules, place_of

_OF_PACKAGE = ("__file__", "__path__", "__package__")
_BY_VALUE = threading.Lock()  # cloudpickle's register is one for the process


def shipped(thing: Any, modules: "Mapping[str, frozenset[str] | None] | None" = None) -> bytes:
    """Return a thing as bytes for `arrived`.

    Args:
        thing: What is sent.
        modules: The user's modules it reaches, with the names it uses of each; None for all of them.

    Raises:
        Exception: Whatever pickling user objects raises.
    """
    reached = modules or {}
    known = [sys.modules[name] for name in reached if name in sys.modules]
    buffer = io.BytesIO()
    with pickled_by_value(local_modules()):
        pickler = ModulePickler(buffer, reached)
        pickler.dump((thing, known, pickler.cells))  # in this order: what is pickled first fills in the last
    return buffer.getvalue()


def arrived(blob: bytes) -> Any:
    """Return what was shipped, in the process it was sent to; its modules can be imported there from now on."""
    thing, _, cells = cloudpickle.loads(blob)
    linecache.cache.update(cells)  # so that an error can show its line
    return thing


@contextmanager
def pickled_by_value(modules: Iterable[types.ModuleType]) -> Iterator[None]:
    """Let functions and classes of these modules be pickled with their code, not by name."""
    with _BY_VALUE:
        already = cloudpickle.list_registry_pickle_by_value()
        added = [module for module in modules if module.__name__ not in already]
        for module in added:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in added:
                cloudpickle.unregister_pickle_by_value(module)


class ModulePickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    """Pickles modules of the user's too: their name, and of their variables those that are used."""

    def __init__(self, file: io.BytesIO, modules: "Mapping[str, frozenset[str] | None]") -> None:
        super().__init__(file)
        self._modules = modules
        self.cells: dict[str, Any] = {}  # source of the notebook's cells whose functions go

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.FunctionType):
            source = linecache.cache.get(obj.__code__.co_filename, ())
            if len(source) == 4 and source[1] is None:  # no file's: it has no time of its last change
                self.cells[obj.__code__.co_filename] = source
        if (
            isinstance(obj, types.ModuleType)
            and obj.__name__ != "__main__"
            and place_of(obj.__name__) == "local"
        ):
            used = self._modules.get(obj.__name__)
            state = {
                name: value
                for name, value in list(vars(obj).items())
                if name in _OF_PACKAGE or (not name.startswith("__") and (used is None or name in used))
            }
            return shipped_module, (obj.__name__,), state, None, None, _fill
        return super().reducer_override(obj)


def shipped_module(name: str) -> types.ModuleType:
    """Return the module of this name that was shipped before, or a new one."""
    module = sys.modules.get(name)
    if not isinstance(module, ShippedModule):
        module = sys.modules[name] = ShippedModule(name)
    return module


class ShippedModule(types.ModuleType):
    """A module of the notebook's, with what the reward uses of it."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self.__name__}.{name} was not sent with the reward, whose code does not name it. Name it there, or pass "
            f"reward_timeout=None to call the reward in the notebook itself."
        )


def _fill(module: types.ModuleType, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
