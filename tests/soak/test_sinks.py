"""trackio, MLflow and Weights & Biases, read back from what they wrote here; `make sinks` installs them."""

import json
import math
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tests.parity.serving import eventually

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]  # theirs

Points = dict[str, list[tuple[int, float]]]


@pytest.fixture
def trained(tc: tn.TrainingClient, batch: tn.BatchData) -> Any:
    """A run with a rollback in it, and a value that is no number."""
    run = tc.fit([batch], steps=4, eval_batches=[batch], show=False)
    run.pause()
    saved = run.checkpoint().result()
    run.step(1)
    while run.steps_done < 1 and not run.done():
        run._promise.wait(0.05)
    run.rollback(saved.artifact_id).result()
    run.resume()
    run.result()
    tc.publish(tn.events.Metrics(step=4, values={"odd": math.nan}, run_id=run.run_id))
    tc.publish(
        tn.events.Alarm(run_id=run.run_id, step=4, name="odd", level="amber", message="Hm.", remedy="Look.")
    )
    return run


def told(run: Any) -> Points:
    history = run.history
    return {
        name: [(int(step), float(value)) for step, value in zip(*history.series(name), strict=True)]
        for name in history.names
    }


def same(found: Points, expected: Points) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        for (_, got), (_, value) in zip(found[name], points, strict=True):
            assert got == value or (math.isnan(got) and math.isnan(value)), name


def records_of(written: bytes) -> Iterator[bytes]:
    """Read a log in LevelDB's format, as wandb writes it: blocks of 32 kB, of pieces with a length and a kind."""
    block, at, parts = 32 * 1024, 7, b""  # behind the head of the file
    while at + 7 <= len(written):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", written[at + 4 : at + 7])
        parts += written[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow puts texts into mlruns there


def test_mlflow(trained: Any, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    record = tn.load_run(trained.run_id)
    assert record.log_to("mlflow", "ours", tracking_uri=uri, tags={"team": "a"}) > 0
    client = mlflow.tracking.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    found = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    same(
        {name: sorted(points) for name, points in found.items()},
        {n: sorted(p) for n, p in told(trained).items()},
    )
    assert (run.info.run_name, run.info.status) == (trained.run_id, "FINISHED")
    assert run.data.params["training.optimizer.learning_rate"] == "0.01"
    assert run.data.tags["team"] == "a"


def test_trackio(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    assert tn.load_run(trained.run_id).log_to("trackio", "ours") > 0
    found: Points = {}
    (database,) = tmp_path.rglob("ours*.db")
    with sqlite3.connect(database) as rows:
        written = rows.execute("select run_name, step, metrics from metrics order by id").fetchall()
    for name, step, metrics in written:
        assert name == trained.run_id
        for metric, value in json.loads(metrics).items():
            if not isinstance(value, Mapping):
                found.setdefault(metric, []).append((step, float(value)))
    same(found, told(trained))


def test_wandb_offline(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert tn.load_run(trained.run_id).log_to("wandb", "ours", dir=str(tmp_path)) > 0
    (written,) = {path.resolve() for path in tmp_path.rglob("*.wandb")}
    from wandb.proto import wandb_internal_pb2

    found: Points = {}
    for data in records_of(written.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        for name, value in row.items():
            if name != "step" and not name.startswith("_"):
                found.setdefault(name, []).append((row["step"], float(value)))
        if record.HasField("run"):
            assert record.run.display_name == trained.run_id
    same(found, told(trained))


def test_a_live_run_is_told_to_all_three_at_once(
    tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlflow", "trackio", "wandb"):
        pytest.importorskip(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = [
        tc.log_to("mlflow", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"),
        tc.log_to("trackio"),
        tc.log_to("wandb", dir=str(tmp_path)),
    ]
    for _ in range(2):
        tc.fit([batch], steps=3, show=False).result()
    for forwarding in logged:
        forwarding.close()
        assert forwarding.error is None, forwarding
    assert len({forwarding._facts()["values"] for forwarding in logged}) == 1


def test_mlflow_and_wandb_are_told_of_a_run_that_is_described_anew(
    tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logged = [tc.log_to("mlflow", tracking_uri=uri), tc.log_to("wandb", dir=str(tmp_path))]
    run = tc.fit([batch], steps=100_000, name="first", tags=["draft", "rows"], show=False)
    eventually(lambda: all(forwarding._teller.points for forwarding in logged))
    at_wandb = logged[1]._teller._sink._runs[run.run_id]  # type: ignore[attr-defined]
    run.describe(name="second", tags=["rows", "kept"], notes="why")
    eventually(lambda: at_wandb.notes == "why")
    run.stop()
    run.join(timeout=20)
    for forwarding in logged:
        forwarding.close()
        assert forwarding.error is None, forwarding
    assert (at_wandb.name, set(at_wandb.tags)) == ("second", {"rows", "kept"})
    client = mlflow.tracking.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("tensafe_nb").experiment_id])
    tags = found.data.tags
    assert found.info.run_name == "second" and tags["mlflow.note.content"] == "why"
    assert {"rows", "kept"} <= set(tags) and "draft" not in tags
