"""The queue's rules, without a thread: what is put, cancelled and taken, in any order."""

from hypothesis import given
from hypothesis import strategies as st

from tensafe_nb.core.queue import Job, JobQueue
from tensafe_nb.protocol.operations import ForwardBackward, OptimStep
from tensafe_nb.protocol.results import FutureStatus

KINDS = {"fb": ForwardBackward, "opt": OptimStep}


def job(kind: str) -> Job:
    return Job(None, KINDS[kind])


@given(st.lists(st.one_of(st.just("put"), st.just("take"), st.integers(0, 9)), max_size=40))
def test_jobs_are_taken_in_the_order_they_were_put_without_those_cancelled(actions: list[object]) -> None:
    queue, put, taken, cancelled = JobQueue(), [], [], set()
    for action in [*actions, *["take"] * 40]:
        if action == "put":
            put.append(job("fb"))
            queue.put(put[-1])
        elif action == "take":
            if (next_job := queue.take()) is not None:
                taken.append(next_job)
        elif isinstance(action, int) and action < len(put) and put[action].promise.cancel_pending():
            cancelled.add(put[action])
    assert taken == [each for each in put if each not in cancelled]
    assert all(each.promise.state is FutureStatus.RUNNING for each in taken)


@given(st.lists(st.tuples(st.sampled_from(["fb", "opt"]), st.booleans()), max_size=20))
def test_an_optimiser_step_fails_exactly_when_its_own_window_is_broken(jobs: list[tuple[str, bool]]) -> None:
    queue, broken = JobQueue(), False
    for kind, is_cancelled in jobs:
        each = job(kind)
        queue.put(each)
        if is_cancelled:
            each.promise.cancel_pending()
        taken = queue.take()
        if is_cancelled:
            broken = kind == "fb" or (broken and kind != "opt")  # a cancelled step ends its window
            assert taken is None
        elif kind == "opt":
            assert (queue.end_window() is not None) == broken
            broken = False


def test_depth_and_position_count_only_what_is_wanted() -> None:
    queue, jobs = JobQueue(), [job("fb") for _ in range(3)]
    for each in jobs:
        queue.put(each)
    jobs[0].promise.cancel_pending()
    assert (queue.depth, queue.position(jobs[2]), queue.position(jobs[0])) == (2, 1, None)
