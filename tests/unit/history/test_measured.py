"""What was measured, taken along: rows, files, frames; what rollbacks gave up; what was never measured."""

import csv
import math
import stat
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_nb.config import DPConfig, TrainingConfig
from tensafe_nb.core.bus import EventBus
from tensafe_nb.errors import StorageError, ValidationError
from tensafe_nb.events import CheckpointSaved, ClientCreated, Event, Metrics, Rollouts, RunState, StateLoaded
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.table import Table
from tensafe_nb.protocol.codec import encode


def begun(number: int, step: int = 0, client: str = "tc-1") -> RunState:
    return RunState(run_id=f"{client}/{number}", state="RUNNING", step=step)


def ended(number: int, step: int, client: str = "tc-1") -> RunState:
    return RunState(run_id=f"{client}/{number}", state="FINISHED", step=step)


def core(step: int, loss: float) -> Metrics:
    return Metrics(step=step, values={"loss": loss, "tokens": 8.0})


def own(step: int, client: str = "tc-1", number: int = 1, **values: float) -> Metrics:
    return Metrics(step=step, values=values, run_id=f"{client}/{number}")


def saved(name: str, step: int, run: str | None = "tc-1/1") -> CheckpointSaved:
    return CheckpointSaved(artifact_id=name, step=step, size_bytes=1, content_hash="h", run_id=run)


def log_of(folder: Path, *events: Event, client: str = "tc-1", config: Any = None) -> RunHistory:
    log = folder / client / "events.jsonl"
    bus = EventBus(log)
    given_config = encode(config or TrainingConfig())
    for event in (ClientCreated(training_client_id=client, config=given_config), *events):
        bus.publish(event)
    bus.close()
    return RunHistory.load(log)


def column(table: Table, name: str) -> list[Any]:
    return table.columns[name]


def test_what_core_and_run_measure_at_a_step_is_one_row(tmp_path: Path) -> None:
    history = log_of(
        tmp_path, begun(1), core(1, 3.0), own(0, **{"eval/loss": 4.0}), core(2, 2.0), own(2, **{"eval/loss": 2.5})
    )  # fmt: skip
    table = history.table()
    assert list(table.columns) == ["run", "step", "time", "seconds", "loss", "eval/loss", "tokens"]
    assert column(table, "step") == [0, 1, 2]
    assert column(table, "loss") == [None, 3.0, 2.0] and column(table, "eval/loss") == [4.0, None, 2.5]
    assert column(table, "run") == ["tc-1/1"] * 3
    only = history.table("eval/loss")
    assert (column(only, "step"), column(only, "eval/loss")) == ([0, 2], [4.0, 2.5])


def test_rows_of_a_run_that_counts_in_steps_of_its_own_are_not_taken_for_the_cores(tmp_path: Path) -> None:
    """Two optimiser steps for each step of the run: number 2 of the one is not number 2 of the other."""
    history = log_of(
        tmp_path, begun(1), core(1, 4.0), core(2, 3.0), own(1, reward=0.1),
        core(3, 2.0), core(4, 1.0), own(2, reward=0.2),
    )  # fmt: skip
    rows = list(zip(*(column(history.table(), name) for name in ("step", "loss", "reward")), strict=True))
    assert sorted(rows, key=str) == [
        (1, 4.0, None), (1, None, 0.1), (2, 3.0, None), (2, None, 0.2), (3, 2.0, None), (4, 1.0, None),
    ]  # fmt: skip


def test_steps_that_a_rollback_gave_up_are_left_out_or_marked(tmp_path: Path) -> None:
    history = log_of(
        tmp_path, begun(1), core(1, 5.0), saved("art-1", 1), core(2, 4.0), core(3, 3.0), saved("art-3", 3),
        StateLoaded(artifact_id="art-1", step=1), core(2, 9.0),
    )  # fmt: skip
    assert column(history.table("loss"), "loss") == [5.0, 9.0]
    everything = history.table("loss", abandoned=True)
    assert column(everything, "loss") == [5.0, 9.0, 4.0, 3.0]
    assert column(everything, "abandoned") == [False, False, True, True]


def test_a_state_that_was_given_up_and_is_loaded_again_brings_its_steps_back(tmp_path: Path) -> None:
    history = log_of(
        tmp_path, begun(1), core(1, 5.0), saved("art-1", 1), core(2, 4.0), saved("art-2", 2),
        StateLoaded(artifact_id="art-1", step=1), core(2, 9.0),
        StateLoaded(artifact_id="art-2", step=2), core(3, 3.0),
    )  # fmt: skip
    assert column(history.table("loss"), "loss") == [5.0, 4.0, 3.0]


def test_a_rollback_counts_at_once_also_after_the_end_of_the_run(tmp_path: Path) -> None:
    history = log_of(
        tmp_path, begun(1), core(1, 5.0), saved("art-1", 1), core(2, 4.0), ended(1, 2),
        StateLoaded(artifact_id="art-1", step=1),
    )  # fmt: skip
    assert column(history.table("loss"), "loss") == [5.0]
    assert column(history.reading("tc-1/1").table("loss"), "loss") == [5.0, 4.0]  # what the run did, it did


def test_a_resumed_run_is_one_table_in_its_log_and_across_logs(tmp_path: Path) -> None:
    first = log_of(
        tmp_path, begun(1), core(1, 5.0), saved("art-1", 1), core(2, 4.0), ended(1, 2),
        begun(2, 2), StateLoaded(artifact_id="art-1", step=1), core(2, 3.5), saved("art-2", 2, "tc-1/2"), ended(2, 2),
    )  # fmt: skip
    table = first.reading("tc-1/2").table("loss")
    assert (column(table, "run"), column(table, "loss")) == (["tc-1/1", "tc-1/2"], [5.0, 3.5])
    second = log_of(
        tmp_path, begun(1, client="tc-2"), StateLoaded(artifact_id="art-2", step=2), core(3, 3.0), client="tc-2"
    )  # fmt: skip
    table = second.reading("tc-2/1").table("loss")
    assert column(table, "run") == ["tc-1/1", "tc-1/2", "tc-2/1"] and column(table, "loss") == [5.0, 3.5, 3.0]
    assert column(second.table("loss"), "loss") == [3.0]  # a client's own history is what it measured


def test_two_logs_that_load_each_others_states_are_read_to_an_end(tmp_path: Path) -> None:
    one = log_of(
        tmp_path, begun(1), StateLoaded(artifact_id="art-b", step=0), core(1, 5.0), saved("art-a", 1)
    )  # fmt: skip
    log_of(
        tmp_path, begun(1, client="tc-2"), StateLoaded(artifact_id="art-a", step=1), core(2, 4.0),
        saved("art-b", 2, "tc-2/1"), client="tc-2",
    )  # fmt: skip
    assert column(one.reading("tc-1/1").table("loss"), "loss")[-1] == 5.0


def test_a_run_after_another_has_rows_of_its_own(tmp_path: Path) -> None:
    history = log_of(tmp_path, begun(1), core(1, 5.0), ended(1, 1), core(2, 4.5), begun(2, 2), core(3, 4.0))
    assert column(history.table("loss"), "run") == ["tc-1/1", None, "tc-1/2"]
    assert column(history.reading("tc-1/2").table("loss"), "loss") == [4.0]


def test_an_unknown_metric_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    history = log_of(tmp_path, begun(1), core(1, 5.0))
    for call in (
        lambda: history.table("los"), lambda: history.to_pandas(["loss", "los"]), lambda: history["los"],
        lambda: history.to_csv(tmp_path / "x.csv", "los"), lambda: history.plot("los"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=r"'los'.*Did you mean 'loss'"):
            call()
    assert not (tmp_path / "x.csv").exists() and history.series("los")[1].size == 0


def test_a_client_without_measurements_has_an_empty_table(tmp_path: Path) -> None:
    history = log_of(tmp_path)
    assert len(history.table()) == 0 and list(history.to_pandas().columns) == [
        "run",
        "step",
        "time",
        "seconds",
    ]
    assert history.to_csv(tmp_path / "none.csv").read_text() == "run,step,time,seconds\n"


def test_a_metric_that_is_named_like_a_column_has_a_column_of_its_own(tmp_path: Path) -> None:
    history = log_of(tmp_path, begun(1), own(1, seconds=7.0))
    assert column(history.table(), "seconds (metric)") == [7.0] and column(history.table(), "seconds") == [
        0.0
    ]


VALUES = st.dictionaries(
    st.sampled_from(["loss", "eval/loss", "a,b", 'quo"ted']), st.floats(width=64), min_size=1
)
STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 6), VALUES), max_size=12)


@given(steps=STEPS)
def test_every_value_is_in_the_table_once_and_reads_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int, dict[str, float]]]
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    events = [
        Metrics(step=step, values=values, run_id=None if by_core else "tc-1/1")
        for by_core, step, values in steps
    ]
    history = log_of(folder, begun(1), *events)
    table = history.table()
    path = history.to_csv(folder / "all.csv")
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    frame = history.to_pandas()
    assert len(read) == len(frame) == len(table)
    for name in history.names:
        measured = zip(*(both.tolist() for both in history.series(name)), strict=True)
        wanted = sorted((step, repr(value)) for step, value in measured)  # NaN is not equal to itself
        shown = zip(column(table, "step"), column(table, name), strict=True)
        assert sorted((step, repr(value)) for step, value in shown if value is not None) == wanted
        cells = ((int(row["step"]), row[name]) for row in read if row[name] != "")
        assert sorted((step, repr(float(cell))) for step, cell in cells) == wanted
        np.testing.assert_array_equal(
            frame[name].to_numpy(dtype=float),
            [math.nan if v is None else v for v in column(table, name)],
        )
    assert [datetime.fromisoformat(row["time"]) for row in read] == column(table, "time")


def test_a_parquet_file_reads_back_as_the_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    history = log_of(tmp_path, begun(1), core(1, 5.0), core(2, math.inf), own(2, **{"eval/loss": 1.0}))
    read = pandas.read_parquet(history.to_parquet(tmp_path / "x.parquet"))
    pandas.testing.assert_frame_equal(read, history.to_pandas(), check_dtype=False)


def test_columns_of_mixed_kinds_become_texts_in_parquet_and_json_in_csv(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = Table({"version": [1, "mock", None], "meta": [{"a": 1}, None, [1]], "n": [1, 2, None]})
    read = pandas.read_parquet(table.to_parquet(tmp_path / "x.parquet"))
    assert read["version"].tolist()[:2] == ["1", "mock"] and read["n"].tolist()[:2] == [1, 2]
    assert (
        table.to_csv(tmp_path / "x.csv").read_text() == 'version,meta,n\n1,"{""a"": 1}",1\nmock,,2\n,[1],\n'
    )
    assert table._repr_html_().count("<tr>") == 4 and repr(table) == "<Table 3 rows: version, meta, n>"


def test_without_pandas_the_error_says_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pandas", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    history = log_of(tmp_path, begun(1), core(1, 5.0))
    for call in (history.to_pandas, lambda: history.to_parquet(tmp_path / "x.parquet")):
        with pytest.raises(ValidationError, match=r'pip install "tensafe_nb\[frames\]"'):
            call()
    assert history.to_csv(tmp_path / "x.csv").exists()


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    history = log_of(tmp_path, begun(1), core(1, 5.0))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Could not write"):
        history.to_csv(tmp_path / "file" / "x.csv")
    with pytest.raises(ValidationError, match="path"):
        history.to_csv(7)  # type: ignore[arg-type]


def test_folders_on_the_way_to_a_file_are_made(tmp_path: Path) -> None:
    history = log_of(tmp_path, begun(1), core(1, 5.0))
    assert history.to_csv(tmp_path / "new" / "folder" / "x.csv").exists()


def test_what_private_training_measured_is_marked_and_its_owners_alone(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    private = TrainingConfig(dp_config=DPConfig(noise_multiplier=1.0, dataset_size=100))
    history = log_of(tmp_path, begun(1), core(1, 5.0), config=private)
    with pytest.raises(ValidationError, match=r"'loss\.operator\.csv'"):
        history.to_csv(tmp_path / "loss.csv")
    for path in (
        history.to_csv(tmp_path / "loss.operator.csv"),
        history.to_parquet(tmp_path / "loss.operator.parquet"),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "not covered by epsilon" in history.to_pandas().attrs["operator_view"]
    assert "loss" in pandas.read_parquet(tmp_path / "loss.operator.parquet")
    assert "not covered by epsilon" in history.plot().get_supxlabel()


def test_rollouts_are_read_by_step_and_those_given_up_are_marked(tmp_path: Path) -> None:
    trajectories = pytest.importorskip("tensafe_nb.rlvr.rollouts.trajectories")
    from tensafe_nb.config import SamplingConfig

    def kept(step: int, name: str, reward: float) -> Rollouts:
        group = trajectories.RolloutGroup("p", "2+2=", [trajectories.Trajectory("2+2=", "4", reward=reward)])
        folder = tmp_path / "tc-1" / "rollouts" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        trajectories.TrajectoryBatch([group], SamplingConfig()).save(folder / name)
        return Rollouts(run_id="tc-1/1", step=step, rollouts=1, path=f"1/{name}")

    history = log_of(
        tmp_path, begun(1), kept(1, "a", 0.1), core(1, 3.0), own(1, reward=0.1), saved("art-1", 1),
        kept(2, "b", 0.2), core(2, 3.0), own(2, reward=0.2), StateLoaded(artifact_id="art-1", step=1),
        kept(2, "c", 0.3), core(2, 2.0), own(2, reward=0.3), kept(3, "d", 0.4),
    )  # fmt: skip
    (tmp_path / "tc-1" / "rollouts" / "1" / "d").unlink()  # the oldest go when a run has too many
    rollouts = history.rollouts()
    assert list(rollouts) == [1, 2] and rollouts[2][0].reward == 0.3 and 3 not in rollouts
    assert column(rollouts.table(), "reward") == [0.1, 0.3]
    everything = history.rollouts(abandoned=True).table()
    assert sorted(zip(column(everything, "reward"), column(everything, "abandoned"), strict=True)) == [
        (0.1, False), (0.2, True), (0.3, False),
    ]  # fmt: skip
    assert list(history.rollouts(last=2)) == [2] and column(history.table(), "reward") == [0.1, 0.3]
    with pytest.raises(ValidationError, match=r"no rollouts of step 7\. Kept: 1 to 2"):
        rollouts[7]
    with pytest.raises(ValidationError, match="last=0"):
        history.rollouts(last=0)


@given(
    moves=st.lists(st.sampled_from(["step", "save", "load", "elsewhere"]), max_size=20), choice=st.randoms()
)
def test_a_table_leaves_out_what_the_panel_greys(
    tmp_path_factory: pytest.TempPathFactory, moves: list[str], choice: Any
) -> None:
    """`RunHistory.spans`, which panels read, and the rows of a table are two accounts of one thing."""
    step, states, events = 0, {"elsewhere": 0}, [begun(1)]
    for number, move in enumerate(moves):
        if move == "step":
            step += 1
            events.append(core(step, float(number)))
        elif move == "save":
            states[f"art-{number}"] = step
            events.append(saved(f"art-{number}", step))
        else:
            name = move if move == "elsewhere" else choice.choice(sorted(states))
            step = states[name]
            events.append(StateLoaded(artifact_id=name, step=step))
    history = log_of(tmp_path_factory.mktemp("logs"), *events)
    values = history.series("loss")[1]
    current = [value for start, end in history.spans("loss") for value in values[start:end].tolist()]
    shown = column(history.table("loss"), "loss") if "loss" in history else []
    assert sorted(shown) == sorted(current)
