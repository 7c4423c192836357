"""What a sink is told, on both transports: the same values as the history, whatever happens to the run or the sink."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tensafe_nb as tn
from tensafe_nb.events import Alarm, Metrics
from tensafe_nb.history.sinks.sink import SinkRun
from tests.parity.serving import eventually


class Kept:
    """A sink of the user's that keeps what it is told."""

    def __init__(self) -> None:
        self.runs: list[SinkRun] = []
        self.points: dict[tuple[str, str], list[tuple[int, float]]] = {}
        self.texts: list[tuple[str, int, str, str]] = []
        self.ended: list[tuple[str, str]] = []
        self.closed = 0

    def begin(self, run: SinkRun) -> None:
        self.runs.append(run)

    def metrics(self, run: SinkRun, step: int, values: Mapping[str, float], time: float) -> None:
        for name, value in values.items():
            self.points.setdefault((run.run_id, name), []).append((step, value))

    def text(self, run: SinkRun, step: int, name: str, text: str, time: float) -> None:
        self.texts.append((run.run_id, step, name, text))

    def end(self, run: SinkRun, state: str) -> None:
        self.ended.append((run.run_id, state))

    def close(self) -> None:
        self.closed += 1


def told(tc: Any, names: Any = None) -> dict[str, list[tuple[int, float]]]:
    """What the history says: (step, value) of each metric."""
    history = tc.history
    return {
        name: [*zip(*map(np.ndarray.tolist, history.series(name)), strict=True)]
        for name in names or history.names
    }


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def as_float32(points: Mapping[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(step, float(np.float32(value))) for step, value in found] for name, found in points.items()
    }


def test_tensorboard_reads_back_what_the_history_holds_with_the_steps_after_a_rollback(
    tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path
) -> None:
    run = tc.fit([batch], steps=6, eval_batches=[batch], checkpoint_every=2, show=False)
    logged = run.log_to("tensorboard", tmp_path / "runs")
    run.pause()
    saved = run.checkpoint().result()
    run.step(2)
    eventually(lambda: run.state == "PAUSED" and run.steps_done >= 2)
    run.rollback(saved.artifact_id).result()
    run.resume()
    run.result()
    logged.close()
    assert (logged.error, logged.done) == (None, True)
    found = read_back(tmp_path / "runs" / tc.training_client_id / "1")
    assert found == as_float32(told(tc))
    steps = [step for step, _ in found["loss"]]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6] and steps != sorted(steps)


def test_a_finished_run_is_replayed_into_a_sink_with_the_same_values(
    tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path
) -> None:
    live, later = Kept(), Kept()
    tc.log_to(live)
    run = tc.fit([batch], steps=3, show=False, name="first try", tags=["a"], notes="Of no use.")
    run.result()
    tc.close()
    assert tn.load_run(run.run_id).log_to(later) == sum(map(len, live.points.values()))
    assert later.points == live.points == {(run.run_id, name): points for name, points in told(tc).items()}
    assert live.ended == later.ended == [(run.run_id, "FINISHED")]
    assert (live.closed, later.closed) == (1, 1)
    for kept in (live, later):
        (begun,) = kept.runs
        assert (begun.name, begun.tags, begun.notes) == ("first try", ("a",), "Of no use.")
        assert begun.config["run.steps"] == 3
    for _ in range(2):
        assert tn.load_run(run.run_id).log_to("tensorboard", tmp_path) > 0
    first, second = sorted(tmp_path.glob("first try*"))
    assert read_back(first) == read_back(second) == as_float32(told(tc))


def test_what_was_measured_before_comes_first_and_operations_by_hand_are_a_run_too(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    for _ in range(2):
        tc.forward_backward(batch)
        tc.optim_step().result()
    kept = Kept()
    logged = tc.log_to(kept)
    tc.forward_backward(batch)
    tc.optim_step().result()
    assert logged.flush()
    assert [step for step, _ in kept.points[tc.training_client_id, "loss"]] == [1, 2, 3]
    (run,) = kept.runs
    assert run.config["training.optimizer.learning_rate"] == 1e-2
    assert run.config["training.lora_config.rank"] == 4
    assert tc.log_to(kept) is logged, "a cell that is run again doubles nothing"
    logged.close()
    assert (kept.closed, kept.ended) == (1, [(tc.training_client_id, "FINISHED")])
    logged.close()
    assert kept.closed == 1


class Described(Kept):
    """One that takes another description of a run that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.described: list[SinkRun] = []

    def describe(self, run: SinkRun) -> None:
        self.described.append(run)


def test_a_sink_that_can_be_told_hears_of_a_run_that_is_described_anew(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    kept, plain = Described(), Kept()
    run = tc.fit([batch], steps=10_000, name="first", show=False)
    logged = [tc.log_to(sink) for sink in (kept, plain)]
    eventually(lambda: bool(kept.runs and plain.runs))
    run.describe(name="second", tags=["good"], notes="n")
    run.stop()
    run.join(timeout=20)
    assert all(forwarding.flush() for forwarding in logged)
    (found,) = kept.described
    assert (found.run_id, found.name, found.tags, found.notes) == (run.run_id, "second", ("good",), "n")
    assert found.config == kept.runs[0].config and kept.runs[0].name == plain.runs[0].name == "first"
    assert [name for name, _ in plain.ended] == [run.run_id]


def test_a_sink_that_fails_leaves_an_alarm_and_the_run_goes_on(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    def full(values: Mapping[str, float], step: int) -> None:
        raise OSError(28, "No space left")

    logged = tc.log_to(full)
    run = tc.fit([batch], steps=3, show=False)
    assert run.result().steps == 3
    eventually(lambda: logged.done)
    assert isinstance(logged.error, OSError) and "failed" in repr(logged)
    (alarm,) = [a for a in tc.history.alarms if a.name == "sink_failed"]
    assert (
        "The sink full failed and is told nothing more: OSError: [Errno 28] No space left." in alarm.message
    )


def test_a_sink_that_hangs_holds_up_no_training(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    released = threading.Event()
    logged = tc.log_to(lambda values, step: released.wait())
    assert tc.fit([batch], steps=3, show=False).result().steps == 3
    assert not logged.flush(timeout=0)
    released.set()
    logged.close()
    assert logged.done


def test_what_is_measured_of_a_run_after_its_end_is_told_apart(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    kept, again = Kept(), Kept()
    logged = tc.log_to(kept)
    run = tc.fit([batch], steps=1, show=False)
    run.result()
    tc.publish(Metrics(run_id=run.run_id, step=1, values={"exam": 0.5}))
    eventually(lambda: (run.run_id, "exam") in kept.points)
    logged.close()
    assert [told.name for told in kept.runs] == [run.run_id, f"{run.run_id} (later)"]
    tn.load_run(run.run_id).log_to(again)
    assert (again.points, [told.name for told in again.runs]) == (kept.points, [run.run_id])


def test_alarms_are_texts(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    kept = Kept()
    logged = tc.log_to(kept)
    run = tc.fit([batch], steps=1, show=False)
    run.result()
    tc.publish(Alarm(run_id=run.run_id, step=1, name="odd", level="amber", message="A *b*.", remedy="Look."))
    eventually(lambda: bool(kept.texts))  # a server tells of it a moment later
    assert logged.error is None
    assert (run.run_id, 1, "alarms/odd", r"**amber** A \*b\*. Look.") in kept.texts


@pytest.mark.transports("embedded")
def test_rewards_are_told_and_texts_only_if_asked_for(service: tn.ServiceClient, tmp_path: Path) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", optimizer={"learning_rate": 1e-4})
    prompts = tn.datasets.sums(8, seed=0)
    trainer = tn.rlvr.RLVRTrainer(
        tc,
        prompts,
        "exact_match",
        "grpo",
        prompts_per_step=2,
        group_size=2,
        max_new_tokens=4,
        eval_prompts=prompts,
    )
    silent, asked = Kept(), Kept()
    run = trainer.run(steps=2, show=False)
    first, second = run.log_to(silent), run.log_to(asked, samples=1)
    written = run.log_to("tensorboard", tmp_path, samples=2)
    run.result()
    for logged in (first, second, written):
        logged.close()
        assert logged.error is None
    assert {name: points for (_, name), points in silent.points.items()} == told(tc)
    assert {"reward", "rewards/exact_match/mean", "eval/reward"} <= told(tc).keys()
    assert [name for *_, name, _ in silent.texts if name == "samples"] == []
    assert next(text for *_, name, text in asked.texts if name == "samples").startswith("**")
    events = EventAccumulator(str(tmp_path / run.run_id)).Reload()
    assert {"samples", "config"} <= {*events.Tags()["tensors"]}


@pytest.mark.transports("embedded")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tc: tc.log_to("tensorbord"), r"no sink 'tensorbord'\. Did you mean 'tensorboard'"),
        (lambda tc: tc.log_to("wandb"), r"needs a package that is not here: pip install wandb"),
        (lambda tc: tc.log_to("tensorboard", "runs", project="x"), r"log_to\('tensorboard'\): .*'project'"),
        (lambda tc: tc.log_to(print, "runs"), r"go with a sink that is named"),
        (lambda tc: tc.log_to(Kept), r"takes an object, not the class Kept: log_to\(Kept\(…\)\)"),
        (lambda tc: tc.log_to(3), r"takes 'tensorboard', .* not 3"),
        (lambda tc: tc.log_to(print, samples=-1), r"samples=-1 must be 0 or more"),
    ],
)
def test_what_is_no_sink_is_refused_at_once(tc: tn.TrainingClient, call: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        call(tc)


@pytest.mark.transports("embedded")
def test_a_sink_without_a_method_is_told_which(tc: tn.TrainingClient) -> None:
    class Half:
        def metrics(self, run: Any, step: int, values: Any, time: float) -> None: ...

    with pytest.raises(tn.ValidationError, match=r"the sink Half has no begin, text, end, close"):
        tc.log_to(Half())
