"""The renderer that fits the place: a notebook kernel, a terminal or a log. One answer for everything that is shown."""

import os
import sys
from enum import StrEnum
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest

VARIABLE = "TENSAFE_NB_RENDERER"


class Renderer(StrEnum):
    """The ways to show progress."""

    WIDGET = "widget"  # the live panel, with a static part beneath for viewers that run nothing
    HTML = "html"  # the static part alone, refreshed
    TEXT = "text"  # a bar, or lines where the output is no terminal


def choose() -> Renderer:
    """Return what TENSAFE_NB_RENDERER asks for, else the widget in a notebook kernel and text elsewhere.

    Raises:
        ValidationError: The variable names no renderer.
    """
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if not asked:
        return Renderer.WIDGET if in_kernel() else Renderer.TEXT
    if asked not in list(Renderer):
        raise ValidationError(
            f"{VARIABLE}={as_given(asked)} is none of widget, html, text.{nearest(asked, list(Renderer))}"
        )
    return Renderer(asked) if in_kernel() else Renderer.TEXT


def in_kernel() -> bool:
    """Whether cells of a notebook run here; never imports IPython."""
    return hasattr(shell(), "kernel")


def shell() -> Any:
    """Return IPython's shell, or None where there is none."""
    get_shell = getattr(
        sys.modules.get("IPython"), "get_ipython", None
    )  # none yet while it is being imported
    return None if get_shell is None else get_shell()


def in_marimo() -> bool:
    """Whether this is a marimo notebook with a page or an export; never imports marimo."""
    is_running = getattr(
        sys.modules.get("marimo"), "running_in_notebook", None
    )  # none yet while it is being imported
    return is_running is not None and bool(is_running())


def execution_count() -> int:
    """Return the number of the cell that runs, or ran last."""
    return int(shell().execution_count) if in_kernel() else 0
