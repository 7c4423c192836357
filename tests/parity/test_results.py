"""What a run was called, was started with and has measured comes out the same, wherever its core is."""

from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb import rlvr

BATCHES = [tn.BatchData([[5, 6, 7, n]]) for n in range(8, 18)]


def test_a_run_has_name_tags_notes_and_its_configuration(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(seed=7, optimizer={"learning_rate": 2e-3})
    run = tc.fit(BATCHES, steps=2, name="first try", tags=["a", "b"], notes="see page 3", show=False)
    assert (run.name, run.tags, run.notes) == ("first try", ("a", "b"), "see page 3")
    run.result()
    run.describe(tags="c")
    (record,) = tn.list_runs(name="first*", tags="c")
    assert (record.name, record.tags, record.notes) == (run.name, run.tags, run.notes)
    assert record.config == run.config == tn.load_run(run.run_id).config
    assert run.config["training"] == tc.config.model_dump(mode="json") and run.config["run"]["steps"] == 2
    assert run.config["versions"]["tensafe_nb"] == tn.__version__
    unnamed = tc.fit(BATCHES, steps=1, show=False)
    unnamed.result()
    assert (unnamed.name, unnamed.tags, unnamed.notes) == (None, (), "")
    assert tn.diff_runs(run, unnamed).config["run.steps"] == (2, 1)
    with pytest.raises(tn.ValidationError, match="A run's name"):
        tc.fit(BATCHES, name="two\nlines", show=False)
    service.close()
    run.describe("renamed")  # nobody writes its log any more
    assert run.name == "renamed" and tn.load_run(run.run_id).name == "renamed"


def test_what_a_run_measured_is_one_table_live_recorded_and_read_back(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    tc = service.create_training_client()
    run = tc.fit(BATCHES, steps=4, eval_batches=BATCHES[:1], checkpoint_every=2, show=False)
    run.result()
    first = min(tc.history.state.checkpoints.values(), key=lambda saved: saved.step).artifact_id
    frame = run.to_pandas()
    for other in (tn.load_run(run.run_id), tc.history):
        pandas.testing.assert_frame_equal(other.to_pandas(), frame)
    read = pandas.read_csv(run.to_csv(tmp_path / "run.csv"), parse_dates=["time"])
    pandas.testing.assert_frame_equal(read, frame, check_dtype=False)
    for name in tc.history.names:
        steps, values = tc.history.series(name)
        kept = frame.dropna(subset=name).sort_values("step")
        assert (kept["step"].tolist(), kept[name].tolist()) == (steps.tolist(), values.tolist())
    resumed = tc.fit(BATCHES, steps=5, resume_from=first, show=False)
    resumed.result()
    whole = resumed.to_pandas("loss")
    assert whole["step"].tolist() == [1, 2, 3, 4, 5]
    assert whole["run"].tolist() == [run.run_id] * 2 + [resumed.run_id] * 3
    pandas.testing.assert_frame_equal(tn.load_run(resumed.run_id).to_pandas("loss"), whole)


def test_a_run_with_rewards_keeps_what_it_was_made_of(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))
    trainer = rlvr.RLVRTrainer(
        tc, tn.datasets.sums(8, seed=0), "exact_match", rlvr.REINFORCE(baseline="rloo"),
        prompts_per_step=2, group_size=2, max_new_tokens=3, fixed_length=True, seed=5,
    )  # fmt: skip
    run = trainer.run(steps=1, name="sums", tags=["rl"], show=False)
    run.result()
    (record,) = tn.list_runs(tags="rl")
    assert record.config == run.config
    assert run.config["reward"] == {"name": "exact_match", "version": trainer.reward.version}
    assert run.config["algo"]["kind"] == "REINFORCE" and run.config["algo"]["baseline"] == "rloo"
    assert (run.config["trainer"]["seed"], run.config["sampling"]["max_new_tokens"]) == (5, 3)
    assert run.to_pandas("reward")["step"].tolist() == [1]
    rollouts = run.rollouts()
    assert list(rollouts) == [1] and len(rollouts[1]) == 4
    for found in (rollouts, record.rollouts(last=3)):
        table = found.table().columns
        assert table["step"] == [1] * 4 and table["run"] == [run.run_id] * 4
        assert table["reward"] == [trajectory.reward for trajectory in rollouts[1]]
        assert table["response"] == [trajectory.response for trajectory in rollouts[1]]
        assert None not in table["advantage"] and set(table["finish_reason"]) == {"fixed"}
