"""Which points of a curve led to the weights as they are."""

from pathlib import Path

from tensafe_nb.events import CheckpointSaved, Event, Metrics, RunState, RunStep, StateLoaded
from tensafe_nb.history.log import RunHistory


def told(*events: Event) -> RunHistory:
    history = RunHistory(Path("none.jsonl"))
    for seq, event in enumerate(events, 1):
        history.add(event)
        assert seq
    return history


def losses(*steps: int) -> list[Event]:
    return [Metrics(step=step, values={"loss": 1.0}) for step in steps]


def saved(name: str, step: int) -> Event:
    return CheckpointSaved(artifact_id=name, step=step, size_bytes=1, content_hash="sha256:0")


def test_until_a_state_is_loaded_all_points_count() -> None:
    assert told(*losses(1, 2), saved("a", 2), *losses(3)).spans("loss") == [(0, None)]
    assert told().spans("never") == [(0, None)]


def test_what_was_trained_behind_a_checkpoint_is_given_up_at_once_when_it_is_loaded() -> None:
    begun = [*losses(1, 2), saved("a", 2), *losses(3, 4, 5), StateLoaded(artifact_id="a", step=2)]
    assert told(*begun).spans("loss") == [(0, 2), (5, None)]
    assert told(*begun, *losses(3)).spans("loss") == [(0, 2), (5, None)]


def test_a_later_state_that_is_loaded_again_brings_its_own_branch_back() -> None:
    history = told(
        *losses(1, 2), saved("a", 2), *losses(3, 4), saved("b", 4),
        StateLoaded(artifact_id="a", step=2), *losses(3), saved("c", 3),
        StateLoaded(artifact_id="b", step=4),
    )  # fmt: skip
    assert history.spans("loss") == [(0, 4), (5, None)]
    history.add(StateLoaded(artifact_id="c", step=3))
    assert history.spans("loss") == [(0, 2), (4, None)]


def test_nothing_here_led_to_the_state_of_another_client() -> None:
    history = told(*losses(1, 2), StateLoaded(artifact_id="another's", step=90), *losses(91))
    assert history.spans("loss") == [(2, None)]


def test_what_is_told_of_a_step_after_it_was_saved_belongs_to_it() -> None:
    late = Metrics(step=2, values={"eval/loss": 1.0}, run_id="tc-1/1")
    later = Metrics(step=4, values={"eval/loss": 1.0}, run_id="tc-1/1")
    history = told(
        *losses(1, 2), saved("a", 2), late, *losses(3, 4), later, StateLoaded(artifact_id="a", step=2)
    )
    assert history.spans("eval/loss") == [(0, 1), (2, None)]
    assert history.spans("loss") == [(0, 2), (4, None)]


def test_curves_that_a_loop_numbers_by_its_own_steps_are_parted_by_those() -> None:
    def reward(step: int) -> list[Event]:
        return [
            Metrics(step=step, values={"reward": 1.0}, run_id="tc-1/1"),
            RunStep(run_id="tc-1/1", done=step, duration=1.0),
        ]

    history = told(
        RunState(run_id="tc-1/1", state="RUNNING", step=0), *losses(1, 2), *reward(1), *losses(3, 4), *reward(2),
        saved("a", 4), *losses(5, 6), *reward(3), StateLoaded(artifact_id="a", step=4),
    )  # fmt: skip
    assert history.spans("reward") == [(0, 2), (3, None)]
    assert history.spans("loss") == [(0, 4), (6, None)]
