"""Lifetimes of training clients: frees those that only a reference cycle or a notebook's output history still holds.

Whoever ends a cell with `tc` wants to see it, not to own its model for as long as the kernel lives: `Out` and `_` keep
results, no models. So, when a variable has let go of something of ours, and before another model is loaded, the history
steps aside for a moment: what lives on without it is put back, and in place of the rest stands what it leaves behind.
"""

import functools
import gc
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from tensafe_nb.errors import ClientClosedError

OUTPUT = re.compile(r"_{1,3}|_\d+")  # the names under which IPython files outputs among the variables
MANY = 10_000  # objects, that imports have made
_collecting = threading.Lock()
_pausing = threading.Lock()
_pauses: list[bool] = []  # one for each thread that imports; whether the collector goes on behind them
_named: set[int] = set()  # ids of what variables referred to after the latest cell


class Circle:
    """Something that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def collect() -> None:
    """Collect circles, for certain: a collection asked for while another thread is in one does nothing at all."""
    with _collecting:
        for _ in range(20):
            witness = weakref.ref(Circle())  # gone if a collection has taken place
            gc.collect()
            if witness() is None:
                return
            time.sleep(0.01)


@contextmanager
def uncollected() -> Iterator[None]:
    """Import what makes many objects that stay, without the collector going through all of them again and again.

    Behind it they count as old: what of them, or of anything else, becomes garbage is still found.
    """
    with _pausing:
        _pauses.append(gc.isenabled() or any(_pauses))
        gc.disable()
    try:
        yield
    finally:
        with _pausing:
            goes_on = _pauses.pop()
            if goes_on and not _pauses:
                # few are soon looked through; and what somebody has frozen is to stay so
                if gc.get_count()[0] > MANY and gc.get_freeze_count() == 0:
                    gc.freeze()
                    gc.unfreeze()  # into the oldest generation, without a look at anything
                gc.enable()


class Freed:
    """What a training client leaves behind: its words, and its history where it had one."""

    def __init__(self, words: str, **kept: Any) -> None:
        vars(self).update(kept, _words=words)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ClientClosedError(
            f"{self._words} was freed: nothing but the notebook's output history referred to it. Keep it in a variable "
            f"(tc = …) for as long as you need it. What it recorded is in list_runs(); a checkpoint comes back with "
            f"service.restore(…)."
        )

    def __repr__(self) -> str:
        return f"{self._words}, freed"


def before_loading() -> None:
    """Called in the cell that makes a training client: the history shall not keep those of earlier cells."""
    shell = _shell()
    if shell is None:
        return
    if after_cell not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", after_cell)
    if any(True for _ in places_of(shell)):
        step_aside(shell)


def step_aside(shell: Any) -> None:
    """Take what is ours out of the output history, collect what nothing else refers to, and put back the rest."""
    forget_latest_error()
    places = list(places_of(shell))
    for _, fill in places:
        fill(None)
    collect()
    for make, fill in places:
        fill(make())


def after_cell(_result: object = None) -> None:
    """Step aside once a variable has let go of something: it was deleted, or its cell was run again."""
    shell = _shell()
    if shell is None:
        return
    names = (value for name, value in list(shell.user_ns.items()) if not OUTPUT.fullmatch(name))
    now = {id(value) for value in names if _is_ours(value)}
    let_go = _named - now
    _named.clear()
    _named.update(now)
    if let_go:
        step_aside(shell)


def in_notebook() -> bool:
    """Whether there is an output history; never imports IPython."""
    # it is not there while it is being imported
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "user_ns")


def _shell() -> Any:
    """Return IPython's shell, on whose thread this must be; None elsewhere."""
    here = threading.current_thread() is threading.main_thread()
    return sys.modules["IPython"].get_ipython() if here and in_notebook() else None


def _is_ours(value: object) -> bool:
    return hasattr(type(value), "_left_behind")


def places_of(shell: Any) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Yield, for every place of the history with something of ours, what makes its content anew, and what fills it."""
    spaces = [shell.user_ns.get("_oh") or {}, shell.user_ns, shell.user_ns_hidden]
    spaces += [
        vars(holder) for holder in (shell.displayhook, shell.last_execution_result) if holder is not None
    ]
    twins: dict[int, Callable[[], Any]] = {}  # one for each value, however many places hold it
    for number, space in enumerate(spaces):
        for name, value in list(space.items()):
            filed = number == 0 or name == "result" or OUTPUT.fullmatch(str(name))
            if filed and (make := _maker(value, twins)) is not None:
                yield make, functools.partial(space.__setitem__, name)


def _maker(value: Any, twins: dict[int, Callable[[], Any]]) -> Callable[[], Any] | None:
    """Return what gives back a value of ours, or what it left behind, without keeping it; None for any other value."""
    if _is_ours(value):
        if id(value) not in twins:
            twins[id(value)] = made_again(value)
        return twins[id(value)]
    if type(value) in (tuple, list) and any(_is_ours(item) for item in value):
        makers, kind = [_maker(item, twins) for item in value], type(value)
        kept = [item if make is None else None for item, make in zip(value, makers, strict=True)]
        return lambda: kind(item if make is None else make() for item, make in zip(kept, makers, strict=True))
    return None


def made_again(value: Any) -> Callable[[], Any]:
    """Return what gives back a value while it lives, then what it left behind."""
    alive, behind = weakref.ref(value), value._left_behind()

    def make() -> Any:
        found = alive()
        return behind if found is None else found

    return make


def forget_latest_error() -> None:
    """Empty the frames of this package that the latest error keeps: in one of a method, `self` is a client."""
    error: BaseException | None = getattr(sys, "last_value", None)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        trace = error.__traceback__
        while trace is not None:
            empty_frame(trace.tb_frame)
            trace = trace.tb_next
        error = error.__cause__ or error.__context__


def empty_frame(frame: FrameType) -> None:
    """Let go of what a frame of this package holds."""
    if str(frame.f_globals.get("__name__", "")).startswith("tensafe_nb"):
        with suppress(RuntimeError):  # it is still running
            frame.clear()
            _ = frame.f_locals  # brings up to date the copy that the printing of the traceback has made
