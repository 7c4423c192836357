"""A comparison as its user meets it: at once a handle, at the end a table, whatever happens to single runs."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

import tensafe_nb as tn
from tests.unit.comparing.conftest import scripted

Idea = Callable[..., Any]
BOTH = {"gain": [0.0, 0.1]}


def test_two_ideas_are_compared_pair_by_pair(service: tn.ServiceClient, ideas: Idea) -> None:
    comparison = tn.compare(ideas, seeds=3, vary=BOTH, service=service, name="gains", show=False)
    assert not comparison.done() and comparison.arms == ["gain=0", "gain=0.1"]
    result = comparison.result()
    [difference] = result.differences
    assert str(difference).startswith("gain=0.1 over gain=0 by 0.") and difference.seen
    assert str(difference).endswith("], paired, 3 seeds")
    assert result.best == "gain=0.1" and not result.notes()[0].startswith("gain")
    runs = tn.list_runs(tags="gains", state="finished")
    assert len(runs) == 6 == len(tn.list_runs(tags=comparison.comparison_id))
    assert {run.name for run in runs} >= {"gain=0 · seed 0", "gain=0.1 · seed 2"}
    assert comparison.runs["gain=0", 1].run_id in {run.run_id for run in runs}


def test_where_nothing_differs_it_says_so(service: tn.ServiceClient) -> None:
    def idea(service: tn.ServiceClient, seed: int, kind: str) -> Any:
        noise = {"a": [0.3, 0.1, 0.2, 0.5], "b": [0.2, 0.4, 0.1, 0.4]}[kind][seed]
        return scripted(service, lambda step: seed + noise, 3)

    result = tn.compare(idea, seeds=4, vary={"kind": ["a", "b"]}, service=service, show=False).result()
    assert str(result.differences[0]).startswith(
        "no difference seen between kind=a and kind=b: 0.00 [-0.32, 0.32], paired, 4"
    )


def test_the_table_comes_back_in_another_process(service: tn.ServiceClient, ideas: Idea) -> None:
    comparison = tn.compare(ideas, seeds=3, vary=BOTH, service=service, name="gains", show=False)
    result = comparison.result()
    for key in ("gains", comparison.comparison_id):
        record = tn.load_comparison(key)
        assert repr(record.result()) == repr(result) and record.state == "FINISHED"
        assert record.table().columns == comparison.table().columns
    assert [one.comparison_id for one in tn.list_comparisons()] == [comparison.comparison_id]
    with pytest.raises(tn.RunNotFoundError, match="Did you mean 'gains'"):
        tn.load_comparison("gain")


def test_a_seed_that_fails_ends_no_other_and_is_not_a_bad_value(service: tn.ServiceClient) -> None:
    def idea(service: tn.ServiceClient, seed: int, gain: float) -> Any:
        if (seed, gain) == (1, 2.0):
            raise RuntimeError("the data was not there")
        return scripted(
            service,
            lambda step: 1 / (step - 5) if (seed, gain) == (2, 1.0) else gain + (gain + 1) * seed**2 % 7 / 70,
            6,
        )

    result = tn.compare(idea, seeds=6, vary={"gain": [1.0, 2.0]}, service=service, show=False).result()
    [difference] = result.differences
    assert difference.by.seeds == 4 and "paired, 4 of 6 seeds" in str(difference)
    assert result["gain=1"].failed == {
        2: "FutureFailedError: The operation failed: ZeroDivisionError: division by zero"
    }
    assert result["gain=2"].failed == {1: "RuntimeError: the data was not there"}
    assert result["gain=2"].value.mean == pytest.approx(2.0 + (0 + 5 + 6 + 6 + 5) / 350)
    assert any("the data was not there" in note for note in result.notes())


def test_when_all_fail_the_first_reason_is_told(service: tn.ServiceClient) -> None:
    def idea(service: tn.ServiceClient, seed: int) -> Any:
        raise KeyError("promt")

    comparison = tn.compare(idea, seeds=2, service=service, show=False)
    with pytest.raises(
        tn.ValidationError, match=r"all 2 runs failed. The first \(idea, seed 0\): KeyError: 'promt'"
    ):
        comparison.result()
    assert comparison.state == "FAILED"


def test_arms_advance_in_step(service: tn.ServiceClient) -> None:
    order: list[tuple[int, str]] = []

    def idea(service: tn.ServiceClient, seed: int, kind: str) -> Any:
        return scripted(service, lambda step: float(order.append((step, kind)) or step), 12)

    tn.compare(
        idea, seeds=1, vary={"kind": ["a", "b"]}, service=service, pace=3, side_by_side=1, show=False
    ).result()
    done = {"a": 0, "b": 0}
    for step, kind in order:
        done[kind] = step
        assert abs(done["a"] - done["b"]) <= 3


def test_an_arm_that_cannot_win_is_given_up(service: tn.ServiceClient, ideas: Idea) -> None:
    vary = {"gain": [0.0, 1.0]}
    result = tn.compare(ideas, seeds=5, vary=vary, steps=20, service=service, show=False).result()
    assert result["gain=0"].step == 10 and result["gain=1"].step == 20
    assert "given up at step 10: behind gain=1 by 9.4" in result["gain=0"].given_up
    assert result.differences[0].step == 10 and result.differences[0].seen
    kept = tn.compare(ideas, seeds=5, vary=vary, steps=20, service=service, baseline="gain=0", show=False)
    assert kept.result()["gain=0"].step == 20


def test_an_arm_is_forked_in_mid_race(service: tn.ServiceClient, ideas: Idea) -> None:
    comparison = tn.compare(
        ideas, seeds=3, vary={"gain": [0.0]}, steps=12, service=service, early_stop=False, pace=2, show=False
    )
    name = comparison.fork("gain=0", step=6, gain=1.0)
    result = comparison.result()
    assert name == "gain=0 ⑂ gain=1" and list(result.standings.arms) == ["gain=0", name]
    assert result.standings.parents[name][1] == 6
    at, mean, _ = result.standings.curve(name)
    assert (at[0], at[-1]) == (7, 12) and len(mean) == 6
    assert f"{name} over gain=0 by 12" in str(result.differences[0])


def test_it_can_be_paused_stopped_and_cancelled(service: tn.ServiceClient, ideas: Idea) -> None:
    def endless(service: tn.ServiceClient, seed: int, kind: str) -> Any:
        return scripted(service, lambda step: seed + step, 100_000)

    def start() -> Any:
        return tn.compare(endless, seeds=1, vary={"kind": ["a", "b"]}, service=service, pace=1, show=False)

    comparison = start()
    reached = rests(comparison)
    assert comparison.state == "PAUSED" and comparison.so_far().step == reached
    comparison.resume()
    comparison.stop()
    result = comparison.result()
    assert result.standings.state == "STOPPED" and any("Stopped by hand" in note for note in result.notes())
    other = start()
    assert other.cancel() and not comparison.cancel()
    with pytest.raises(tn.FutureCancelledError, match="list_runs"):
        other.result()
    assert tn.load_comparison(other.comparison_id).state == "CANCELLED"
    assert {run.state for run in tn.list_runs(tags=other.comparison_id)} <= {tn.RunStatus.STOPPED}


def rests(comparison: Any) -> int:
    """Pause a comparison once it has begun, and wait until it rests."""
    begun, resting = threading.Event(), threading.Event()
    comparison.watch(lambda: comparison.so_far().step and begun.set())
    comparison.watch(lambda: comparison.state == "PAUSED" and resting.set())
    assert begun.wait(60)
    comparison.pause()
    assert resting.wait(60)
    return int(comparison.so_far().step)


def test_of_one_seed_there_are_curves_and_no_interval(service: tn.ServiceClient, ideas: Idea) -> None:
    result = tn.compare(ideas, seeds=[4], vary=BOTH, service=service, show=False).result()
    assert "no interval can be had of fewer than 3" in str(result.differences[0])
    assert result.notes()[-1].startswith("Of one seed no interval can be had")
    assert len(result.curves()) == 16 and result.plot().axes[0].get_ylabel() == "reward"


def test_an_arm_that_ignores_its_seed_is_noticed(service: tn.ServiceClient) -> None:
    def idea(service: tn.ServiceClient, seed: int, kind: str) -> Any:
        return scripted(service, lambda step: {"a": 0.5, "b": 0.75}[kind], 2)

    result = tn.compare(idea, seeds=5, vary={"kind": ["a", "b"]}, service=service, show=False).result()
    assert not result.differences[0].seen
    assert any("all seeds gave the very same value" in note for note in result.notes())


def test_a_run_that_pauses_itself_holds_up_nobody(service: tn.ServiceClient) -> None:
    def idea(service: tn.ServiceClient, seed: int, kind: str) -> Any:
        run: list[Any] = []

        def score(step: int) -> float:
            if (kind, step) == ("a", 6):
                run[0].pause()
            return float(seed)

        run.append(scripted(service, score, 8))
        return run[0]

    result = tn.compare(
        idea, seeds=1, vary={"kind": ["a", "b"]}, service=service, pace=4, show=False
    ).result()
    assert "paused itself at step 6" in result["kind=a"].failed[0]
    assert result["kind=b"].value.mean == 0.0


def test_a_recipe_is_compared_by_its_entries_on_common_rows(service: tn.ServiceClient) -> None:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(12)]
    recipe = {"training": {"steps": 3, "eval_every": 3}, "lora": {"rank": 2}, "batch": {"batch_size": 2}}
    comparison = tn.compare(
        recipe, data=rows[:8], eval_data=rows[8:], seeds=3, service=service, show=False,
        vary={"learning_rate": [1e-3, 1e-2], "lora.rank": [2]},
    )  # fmt: skip
    result = comparison.result()
    assert result.standings.measure.metric == "eval/loss" and not result.standings.measure.higher
    assert list(result.standings.arms) == ["learning_rate=0.001, rank=2", "learning_rate=0.01, rank=2"]
    first, second = (tn.load_run(comparison.runs[arm, 1].run_id) for arm in comparison.arms)
    assert first.config["run"]["batches"] == second.config["run"]["batches"]
    assert set(tn.diff_runs(first, second).config) == {"training.optimizer.learning_rate"}


def test_private_trainings_are_added_up(service: tn.ServiceClient) -> None:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(20)]
    recipe = {
        "training": {"steps": 2}, "lora": {"rank": 1},
        "dp": {"noise_multiplier": 1.0, "expected_batch_size": 4, "dataset_size": 20, "target_epsilon": None},
    }  # fmt: skip
    comparison = tn.compare(
        recipe, data=rows, seeds=2, vary={"learning_rate": [1e-3]}, service=service, show=False
    )
    result = comparison.result()
    spent = [track.epsilon for track in result.standings.tracks]
    assert spent[0] == spent[1] > 0 and result.arms[0].epsilon == spent[0]
    assert any(f"together they have spent ε {2 * spent[0]:.3g}" in note for note in result.notes())
    with pytest.raises(tn.ValidationError, match="operator"):
        comparison.to_csv("private.csv")


def test_a_fork_begins_where_its_parent_stood_in_its_own_steps(service: tn.ServiceClient) -> None:
    forked = threading.Event()

    def idea(service: tn.ServiceClient, seed: int, gain: float, resume_from: str | None = None) -> Any:
        """Train a little before the run, as a warm-up does: the client counts those steps, the race does not."""
        assert forked.wait(60)
        client = service.create_training_client(lora_config={"rank": 1})
        if resume_from is None:
            client.fit([tn.BatchData([[3, 4, 5]])] * 2, steps=2, show=False).result()
        return client.fit(
            [tn.BatchData([[3, 4, 5, 6]])] * 4, checkpoint_every=1, resume_from=resume_from, show=False
        )

    comparison = tn.compare(idea, seeds=1, vary={"gain": [0.0]}, service=service, pace=1, show=False)
    name = comparison.fork("gain=0", step=2, gain=1.0)
    forked.set()
    parent, other = comparison.result().standings.tracks
    assert parent.steps.tolist() == [1, 2, 3, 4] and other.arm == name
    assert other.steps.tolist() == [3, 4] and other.values.tolist() == parent.values.tolist()[2:]
