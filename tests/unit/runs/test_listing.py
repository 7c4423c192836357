"""Runs found by what they are called and were started with, compared, and drawn in one figure."""

import stat
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.config import DPConfig, TrainingConfig
from tensafe_nb.core.bus import EventBus
from tensafe_nb.events import ClientCreated, Metrics, RunConfigured, RunDescribed, RunState
from tensafe_nb.protocol.codec import encode
from tensafe_nb.runs.description import described, entry, file_of, flattened
from tensafe_nb.runs.record import load_run
from tensafe_nb.store.home import Home


def run_of(
    client: str,
    losses: list[float],
    *,
    rate: float = 1e-3,
    seed: int = 0,
    state: str = "FINISHED",
    **said: Any,
) -> str:
    """Record a run of a client of its own, and return its id."""
    log, run_id = Home.of_environment().event_log(client), f"{client}/1"
    config = TrainingConfig(optimizer={"learning_rate": rate}, seed=seed, **said.pop("config", {}))
    bus = EventBus(log)
    bus.publish(ClientCreated(training_client_id=client, config=encode(config)))
    bus.publish(RunState(run_id=run_id, state="RUNNING", step=0))
    bus.publish(RunConfigured(run_id=run_id, config={"run": {"kind": "fit", "steps": len(losses)}}))
    if said:
        bus.publish(RunDescribed(run_id=run_id, **said))
    for step, loss in enumerate(losses, 1):
        bus.publish(Metrics(step=step, values={"loss": loss}))
    bus.publish(RunState(run_id=run_id, state=state, step=len(losses)))
    bus.close()
    return run_id


@pytest.fixture
def sweep() -> list[str]:
    """Two learning rates, two seeds each, and a run that failed."""
    runs = [
        run_of(
            f"tc-{number}", [4.0, 4.0 - rate * 1000 - seed],
            rate=rate, seed=seed, name=f"lr {rate}", tags=("sweep",),
        )
        for number, (rate, seed) in enumerate([(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)])
    ]  # fmt: skip
    return [*runs, run_of("tc-x", [9.0], state="FAILED")]


def ids(**filters: Any) -> list[str]:
    return [run.run_id for run in tn.list_runs(**filters)]


def test_runs_are_found_by_name_tags_model_state_and_age(sweep: list[str]) -> None:
    assert sorted(ids()) == sorted(sweep)
    assert sorted(ids(name="lr *")) == sweep[:4] and sorted(ids(name="lr 0.00[2]")) == sweep[2:4]
    assert sorted(ids(tags="sweep", state="finished")) == sweep[:4] and ids(state="FAILED") == sweep[4:]
    assert sorted(ids(model="builtin:*")) == sorted(sweep) and ids(model="meta/*") == []
    later = datetime.now() + timedelta(days=1)
    for since in (later, later.timestamp(), later.isoformat(), timedelta(days=-1)):
        assert ids(since=since) == [] and ids(since=0.0) != []


def test_what_is_nearly_right_is_an_error_and_what_is_not_there_is_an_empty_list(sweep: list[str]) -> None:
    for wrong, hint in (
        ({"name": "lr 0.0001"}, "'lr 0.001'"), ({"tags": ["swep"]}, "'sweep'"),
        ({"model": "builtin:tinny"}, "'builtin:tiny'"), ({"state": "finishd"}, "'FINISHED'"),
    ):  # fmt: skip
        with pytest.raises(tn.ValidationError, match=f"Did you mean {hint}"):
            tn.list_runs(**wrong)
    assert tn.list_runs(name="night") == [] and tn.list_runs(name="lr 0.001", state="FAILED") == []
    for since in ("yesterday", True, [1]):
        with pytest.raises(tn.ValidationError, match="since="):
            tn.list_runs(since=since)  # type: ignore[arg-type]


def test_a_list_of_runs_is_a_table_with_metrics_and_configuration(sweep: list[str], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    runs = tn.list_runs(tags="sweep")
    frame = runs.to_pandas().sort_values("run")
    assert frame["run"].tolist() == sweep[:4] and frame["loss"].tolist() == [3.0, 2.0, 2.0, 1.0]
    assert frame["training.optimizer.learning_rate"].tolist() == [1e-3, 1e-3, 2e-3, 2e-3]
    assert pandas.read_csv(runs.to_csv(tmp_path / "runs.csv"))["name"].tolist() == [run.name for run in runs]
    assert pandas.read_parquet(runs.to_parquet(tmp_path / "runs.parquet"))["tags"].tolist() == ["sweep"] * 4
    assert isinstance(runs[:2], list) and len(runs[:2].to_pandas()) == 2
    assert "lr 0.001" in runs._repr_html_() and "lr 0.001" in repr(runs[0])


def test_a_list_with_a_private_run_is_the_operators_view(tmp_path: Path) -> None:
    run_of("tc-1", [1.0], config={"dp_config": DPConfig(noise_multiplier=1.0, dataset_size=9)})
    with pytest.raises(tn.ValidationError, match="operator's view"):
        tn.list_runs().to_csv(tmp_path / "runs.csv")
    written = tn.list_runs().to_csv(tmp_path / "runs.operator.csv")
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_runs_of_one_label_are_one_line_with_a_band(sweep: list[str]) -> None:
    (axes,) = tn.list_runs(tags="sweep").plot("loss", by="learning_rate").axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["learning_rate=0.001 (n=2)", "learning_rate=0.002 (n=2)"]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[4.0, 2.5], [4.0, 1.5]]
    assert [tuple(line.get_label() for line in tn.plot_runs(runs).axes[0].lines) for runs in (
        tn.list_runs(tags="sweep"), {"slow": sweep[:2], "fast": sweep[2:4]}, [sweep[4], load_run(sweep[0])],
    )] == [
        ("lr 0.001 (n=2)", "lr 0.002 (n=2)"), ("slow (n=2)", "fast (n=2)"), ("tc-x/1", "lr 0.001"),
    ]  # fmt: skip
    by_seed = tn.plot_runs(sweep, by=lambda run: run.config["training"]["seed"], smoothing=0.5)
    assert len(by_seed.axes[0].lines) == 2


def test_a_plot_of_what_is_not_there_says_what_is(sweep: list[str]) -> None:
    for call, message in (
        (lambda: tn.plot_runs(sweep, by="learning_rat"), "Did you mean 'learning_rate'"),
        (lambda: tn.plot_runs(sweep, "los"), "Did you mean 'loss'"),
        (lambda: tn.plot_runs([]), "no run to plot"),
        (lambda: tn.plot_runs([3]), "takes runs, records"),
        (lambda: tn.plot_runs(sweep, band="all"), "band="),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(tn.ValidationError, match=message):
            call()
    with pytest.raises(tn.RunNotFoundError):
        tn.plot_runs("tc-none/1")


def test_two_runs_are_told_apart_by_configuration_and_last_metrics(sweep: list[str]) -> None:
    diff = tn.diff_runs(sweep[0], load_run(sweep[3]))
    assert diff.config == {"training.optimizer.learning_rate": (1e-3, 2e-3), "training.seed": (0, 1)}
    assert diff.metrics == {"loss": (3.0, 1.0)} and diff
    assert repr(diff).splitlines() == [
        "                                          lr 0.001  lr 0.002",
        "config  training.optimizer.learning_rate  0.001     0.002",
        "config  training.seed                     0         1",
        "metric  loss                              3         1",
    ]
    assert "3 differences" in diff._repr_html_() and "learning_rate" in diff._repr_html_()
    assert tn.diff_runs(sweep[0], sweep[1]).runs == tuple(sweep[:2])  # of one name: told by their ids
    twin = run_of("tc-t", [4.0, 3.0], name="twin")
    assert not tn.diff_runs(sweep[0], twin) and "nothing differs" in repr(tn.diff_runs(sweep[0], twin))
    with pytest.raises(tn.ValidationError, match="give two"):
        tn.diff_runs(sweep[0], sweep[0])


def test_a_record_is_described_anew_after_its_process_has_ended(sweep: list[str]) -> None:
    record = load_run(sweep[4]).describe("night", notes="too hot")
    assert record == load_run(sweep[4]) == record.describe("night")
    again = record.describe(tags=["a", "b", "a"])
    assert (again.name, again.tags, again.notes) == ("night", ("a", "b"), "too hot") and again == load_run(
        sweep[4]
    )
    assert ids(name="night") == [sweep[4]]
    log = Home.of_environment().event_log("tc-x")
    assert stat.S_IMODE(file_of(log).stat().st_mode) == 0o600
    with file_of(log).open("a") as torn:
        torn.write('{"$": "run_descr')
    assert load_run(sweep[4]).name == "night"
    assert load_run(sweep[4]).describe("").name is None


@pytest.mark.parametrize(
    "wrong",
    [{"name": 3}, {"name": "a\nb"}, {"name": "x" * 201}, {"tags": 3}, {"tags": [""]}, {"tags": [3]}, {"notes": 1}],
)  # fmt: skip
def test_what_is_no_text_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(tn.ValidationError, match="A run's"):
        described(RunDescribed(run_id=""), **({"name": None, "tags": None, "notes": None} | wrong))


CONFIGS = st.recursive(
    st.none() | st.integers(), lambda inner: st.dictionaries(st.text("ab", min_size=1), inner, max_size=3)
)


@given(config=st.dictionaries(st.text("ab", min_size=1), CONFIGS))
def test_a_flat_configuration_leads_to_every_entry(config: dict[str, Any]) -> None:
    for path, value in flattened(config).items():
        found: Any = config
        for name in path.split("."):
            found = found[name]
        assert found == value and entry(config, path) == path


def test_the_end_of_a_path_is_enough_where_it_is_one_entry_only() -> None:
    config = {"training": {"seed": 1, "optimizer": {"learning_rate": 2}}, "run": {"batches": {"seed": 3}}}
    assert entry(config, "learning_rate") == "training.optimizer.learning_rate"
    assert entry(config, "seed") is None and entry(config, "training.seed") == "training.seed"
