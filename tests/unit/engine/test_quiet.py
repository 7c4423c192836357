"""Warnings that a library raises on one thread, left out there and nowhere else."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from tensafe_nb.engine.quiet import quiet


def test_a_warning_on_a_quiet_thread_is_left_out_and_one_after_it_is_heard() -> None:
    with pytest.warns(UserWarning) as heard:
        with quiet():
            warnings.warn("of the library", stacklevel=1)
            with quiet():
                pass
            warnings.warn("of the library, later", stacklevel=1)
        warnings.warn("of the user", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["of the user"]


def test_while_one_thread_is_quiet_others_are_heard_and_their_filters_stay() -> None:
    within, leave = threading.Event(), threading.Event()

    def load() -> None:
        with quiet():
            within.set()
            leave.wait()
            warnings.warn("of the library", stacklevel=1)

    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings():
        loading = pool.submit(load)
        within.wait()
        with pytest.warns(UserWarning, match="of the user"):
            warnings.warn("of the user", stacklevel=1)
        warnings.filterwarnings("ignore", "a filter of the user's")
        leave.set()
        loading.result()
        assert any("a filter" in getattr(item[1], "pattern", "") for item in warnings.filters)


def test_what_a_user_asks_of_all_warnings_holds_on_threads_that_are_not_quiet() -> None:
    with warnings.catch_warnings():
        with quiet():
            pass
        warnings.simplefilter("error")
        with quiet():
            warnings.warn("of the library", stacklevel=1)
        with pytest.raises(UserWarning, match="of the user"):
            warnings.warn("of the user", stacklevel=1)
