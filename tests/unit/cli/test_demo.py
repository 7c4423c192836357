"""`tensafe-nb demo`: what it shows as its code is code; the whole of it runs in `tests/soak/test_wheel.py`."""

from collections.abc import Callable
from typing import Any

import pytest

from tensafe_nb.cli import demo


@pytest.mark.parametrize("function", [demo.fine_tune, demo.reinforce])
def test_the_code_on_the_page_is_what_ran_and_needs_no_more_than_it_shows(
    function: Callable[..., Any],
) -> None:
    there: dict[str, Any] = {}
    exec(demo._code_of(function), there)
    needed = {name for name in function.__code__.co_names if hasattr(demo, name)}
    assert needed <= set(there)
    assert there[function.__name__].__code__.co_names == function.__code__.co_names
