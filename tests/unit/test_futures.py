import asyncio
import copy
import pickle
import signal
import threading
import time
import typing
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.futures import FutureHandle, Promise, combine, completed
from tensafe_nb.protocol import results as types
from tensafe_nb.protocol.results import FutureStatus, OptimStepResult

RESULT = OptimStepResult(step=3, learning_rate=0.1, grad_norm=1.0, policy_version=3, param_delta_norm=0.5)


def handle_of(promise: Promise[Any]) -> FutureHandle[Any]:
    return FutureHandle(
        promise,
        operation="optim_step",
        future_id="fut-1",
        training_client_id="tc-1",
        result_type=OptimStepResult,
        cancel=promise.cancel_pending,
        position=lambda: 2,
    )


@pytest.fixture
def promise() -> Promise[Any]:
    return Promise()


def test_a_result_can_be_read_any_number_of_times_from_any_thread(promise: Promise[Any]) -> None:
    handle = handle_of(promise)
    seen: list[Any] = []
    threads = [threading.Thread(target=lambda: seen.append(handle.result())) for _ in range(3)]
    for thread in threads:
        thread.start()
    promise.start()
    promise.succeed(RESULT)
    for thread in threads:
        thread.join()
    assert [handle.result(), *seen] == [RESULT] * 4


def test_a_handle_lends_the_fields_of_its_result(promise: Promise[Any]) -> None:
    promise.succeed(RESULT)
    handle = handle_of(promise)
    assert (handle.step, handle.learning_rate) == (3, 0.1)
    assert "learning_rate" in dir(handle)


def test_only_declared_names_are_lent_and_nothing_else_waits(promise: Promise[Any]) -> None:
    handle = handle_of(promise)
    with pytest.raises(AttributeError, match="no 'stepp'"):
        _ = handle.stepp
    assert not hasattr(handle, "_ipython_display_")
    assert "PENDING, 2 before it" in repr(handle)
    assert copy.copy(handle) is handle
    assert copy.deepcopy(handle) is handle
    assert "PENDING" in handle._repr_html_()
    with pytest.raises(tn.ValidationError, match="cannot be pickled"):
        pickle.dumps(handle)


def test_result_fields_and_the_handles_own_names_are_kept_apart() -> None:
    own = {name for name in vars(FutureHandle) if not name.startswith("_")}
    own |= {"operation", "future_id", "training_client_id"}
    for result_type in typing.get_args(types.Result):
        assert own.isdisjoint(result_type.__slots__), result_type


def test_a_timeout_ends_the_waiting_and_not_the_operation(promise: Promise[Any]) -> None:
    handle = handle_of(promise)
    with pytest.raises(tn.FutureTimeoutError, match=r"was not done after 0.01 s.*cancel"):
        handle.result(timeout=0.01)
    promise.succeed(RESULT)
    assert handle.result(timeout=0) == RESULT


def test_wait_for_ends_the_await_and_not_the_operation(promise: Promise[Any]) -> None:
    handle = handle_of(promise)

    async def main() -> Any:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        assert not handle.done()
        threading.Timer(0.01, promise.succeed, [RESULT]).start()
        return await handle

    assert asyncio.run(main()) == RESULT


def test_gather_and_as_completed_work(promise: Promise[Any]) -> None:
    other: Promise[Any] = Promise()
    first, second = handle_of(promise), handle_of(other)

    async def main() -> list[Any]:
        threading.Timer(0.01, promise.succeed, [RESULT]).start()
        threading.Timer(0.02, other.succeed, [RESULT]).start()
        both = await asyncio.gather(first, second)
        return both + [await done for done in asyncio.as_completed([first, second])]

    assert asyncio.run(main()) == [RESULT] * 4


def test_result_works_inside_a_running_event_loop(promise: Promise[Any]) -> None:
    async def main() -> Any:
        threading.Timer(0.01, promise.succeed, [RESULT]).start()
        return handle_of(promise).result()

    assert asyncio.run(main()) == RESULT


@pytest.mark.alone  # it interrupts the main thread, and measures time
def test_an_interrupt_reaches_the_waiter_within_half_a_second(promise: Promise[Any]) -> None:
    import _thread

    handle = handle_of(promise)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        started = time.monotonic()
        threading.Timer(0.05, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            handle.result()
        assert time.monotonic() - started < 0.55
    finally:
        signal.signal(signal.SIGINT, before)
    assert handle.state is FutureStatus.PENDING


def test_our_errors_are_raised_as_they_are_and_foreign_ones_wrapped(promise: Promise[Any]) -> None:
    error = tn.ValidationError("no")
    promise.fail(error)
    assert handle_of(promise).exception() is error
    foreign: Promise[Any] = Promise()
    foreign.fail(ZeroDivisionError("division by zero"))
    with pytest.raises(tn.FutureFailedError, match="ZeroDivisionError: division by zero") as caught:
        handle_of(foreign).result()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_cancelled_handle_raises_our_error_and_not_asyncios(promise: Promise[Any]) -> None:
    handle = handle_of(promise)
    assert handle.cancel() is True
    assert handle.cancel() is False

    async def main() -> None:
        with pytest.raises(tn.FutureCancelledError):
            await handle

    asyncio.run(main())


def test_a_callback_that_raises_harms_nobody(promise: Promise[Any], caplog: pytest.LogCaptureFixture) -> None:
    handle = handle_of(promise)
    seen: list[Any] = []
    handle.add_done_callback(lambda h: 1 / 0)
    handle.add_done_callback(seen.append)
    promise.succeed(RESULT)
    assert seen == [handle]
    assert "done-callback failed" in caplog.text


def test_a_callback_that_cannot_be_called_is_refused(promise: Promise[Any]) -> None:
    with pytest.raises(tn.ValidationError, match="takes a function of the handle, not 5"):
        handle_of(promise).add_done_callback(5)  # type: ignore[arg-type]


def test_several_handles_combine_into_one() -> None:
    promises: list[Promise[Any]] = [Promise(), Promise()]
    handles = [handle_of(p) for p in promises]
    both = combine(handles, lambda results: results[1], operation="update", result_type=OptimStepResult)
    promises[0].succeed(RESULT)
    assert not both.done()
    promises[1].succeed(RESULT)
    assert both.step == 3


def test_a_combination_fails_with_its_first_failure() -> None:
    promises: list[Promise[Any]] = [Promise(), Promise()]
    both = combine(
        [handle_of(p) for p in promises], lambda r: r[0], operation="update", result_type=OptimStepResult
    )
    promises[0].fail(tn.NonFiniteLossError("nan"))
    promises[1].succeed(RESULT)
    with pytest.raises(tn.NonFiniteLossError):
        both.result()


def test_a_completed_handle_needs_no_waiting() -> None:
    handle = completed(RESULT, operation="update", training_client_id="tc-1")
    assert handle.done()
    assert handle.step == 3


def test_nested_asyncio_is_switched_on_with_its_caveat(monkeypatch: pytest.MonkeyPatch) -> None:
    nest_asyncio = pytest.importorskip("nest_asyncio")
    monkeypatch.setitem(__import__("sys").modules, "nest_asyncio2", None)
    applied: list[bool] = []
    monkeypatch.setattr(nest_asyncio, "apply", lambda: applied.append(True))
    with pytest.warns(UserWarning, match="panel buttons may be lost or delayed"):
        tn.enable_nested_asyncio()
    assert applied == [True]


def test_all_who_wait_are_told_of_the_end(promise: Promise[Any]) -> None:
    waiting = [threading.Thread(target=promise.wait) for _ in range(5)]
    for thread in waiting:
        thread.start()
    promise.succeed(1)
    for thread in waiting:
        thread.join()
    assert promise.wait(0) and promise.wait(None)
