"""The collector, while much is imported that stays, and what an interrupted cell leaves."""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.lifetimes import MANY, Circle, uncollected


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    gc.enable()


def test_the_collector_rests_until_the_last_import_has_ended() -> None:
    within, over = threading.Event(), threading.Event()

    def import_much() -> None:
        with uncollected():
            within.set()
            over.wait()

    other = threading.Thread(target=import_much)
    with uncollected():
        assert not gc.isenabled()
        other.start()
        within.wait()
    assert not gc.isenabled()
    over.set()
    other.join()
    assert gc.isenabled()


def test_the_collector_goes_on_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError("no such module")
    assert gc.isenabled()


def test_who_has_switched_the_collector_off_finds_it_off() -> None:
    gc.disable()
    with uncollected(), uncollected():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize("made", [1, 2 * MANY])
def test_what_was_made_meanwhile_is_old_if_it_is_much_and_not_frozen(made: int) -> None:
    gc.unfreeze()  # what the tests began with
    try:
        with uncollected():
            circles = [Circle() for _ in range(made)]
        assert gc.get_freeze_count() == 0
        assert any(one is circles for one in gc.get_objects(generation=2)) == (made > MANY)
    finally:
        gc.freeze()


def test_what_somebody_has_frozen_stays_frozen() -> None:
    gc.freeze()
    with uncollected():
        _ = [[] for _ in range(2 * MANY)]
    assert gc.get_freeze_count() > 0


def test_a_client_that_an_interrupted_cell_was_not_given_ends(
    service: tn.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tn.TrainingClient, "__init__", interrupted)
        service.create_training_client(model_ref="builtin:sums")
    for thread in threading.enumerate():
        if thread.name.startswith("tsnb-worker"):
            thread.join()
    assert service.list_training_clients() == []
