"""Rows through everything that takes them: batches, private draws, fit, rollouts, recipes and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb import rlvr
from tensafe_nb.cli import main as cli
from tensafe_nb.recipes.recipe import Recipe, RLVRConfig

GOOD = [{"prompt": f"item {n}\n", "completion": f"Number {n}."} for n in range(12)]
BAD = [*GOOD[:5], {"prompt": "broken", "completion": None}, *GOOD[5:]]
LONG = [*GOOD[:3], {"text": "word " * 600}]


def length(prompt: str, response: str, meta: Any = None) -> float:
    return float(len(response))


def test_a_row_past_the_models_context_is_found_when_batches_are_made(tc: tn.TrainingClient) -> None:
    with pytest.raises(tn.ValidationError, match=r"^Row 3: .*more than the 512 .*context"):
        tc.batches(LONG)
    assert len(tc.batches(LONG, on_bad_rows="skip").examples) == 3
    assert max(map(len, tc.batches(LONG, truncate=True).examples)) == tc.context == 512


def test_rows_past_the_context_are_found_before_the_first_step_where_batches_did_not_know_it(
    tc: tn.TrainingClient,
) -> None:
    step = tc.step
    batches = tn.data.batches(LONG, tc.tokenizer, batch_size=1)
    with pytest.raises(tn.ValidationError, match=r"Example 3 has \d+ tokens, more than the 512"):
        tc.fit(batches, show=False).result()
    short = tc.batches(GOOD)
    with pytest.raises(tn.ValidationError, match="Example 3"):
        tc.fit(short, eval_batches=batches, show=False).result()
    assert tc.step == step


def test_rows_given_to_fit_say_how_they_become_batches(tc: tn.TrainingClient) -> None:
    pandas = pytest.importorskip("pandas")
    for rows in (GOOD, ["a text"], pandas.DataFrame(GOOD)):
        with pytest.raises(tn.ValidationError, match=r"these are rows|table of rows"):
            tc.fit(rows)
        with pytest.raises(tn.ValidationError, match=r"eval_batches=tc\.batches\(rows\)"):
            tc.fit(tc.batches(GOOD), eval_batches=rows)
    with pytest.raises(tn.ValidationError, match=r"tc\.batches\('rows\.csv'\)"):
        tc.fit("rows.csv")
    with pytest.raises(tn.ValidationError, match=r"tc\.batches\(rows\)"):
        tc.fit((row for row in GOOD), show=False).result()
    with pytest.raises(tn.ValidationError, match=r"tc\.batches\(rows\)"):
        tc.forward_backward(GOOD[0])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (GOOD, r"tc\.fit\(tc\.batches\(rows\)\)"),
        (["a text"], r"tc\.fit\(tc\.batches\(rows\)\)"),
        ([[{"role": "user", "content": "a"}]], r"tc\.fit\(tc\.batches\(rows\)\)"),
        (GOOD[0], r"Give a list of rows\. .* tc\.fit\(tc\.batches\(rows\)\)"),
        ("train.jsonl", r"tc\.fit\(tc\.batches\('train\.jsonl'\)\)"),
        (tn.BatchData([[5, 6]]), r"tc\.fit\(\[batch\]\)"),
        ([[5, 6, 7]], r"tc\.fit\(\[tn\.BatchData"),
    ],
)
def test_fit_says_the_line_that_trains_on_what_it_was_given(
    tc: tn.TrainingClient, given: Any, line: str
) -> None:
    with pytest.raises(tn.ValidationError, match=line):
        tc.fit(given, show=False)
    with pytest.raises(tn.ValidationError, match=line.replace(r"fit\(", r"fit\(…, eval_batches=")):
        tc.fit(tc.batches(GOOD), eval_batches=given, show=False)


def test_a_frame_a_csv_and_a_share_gpt_file_train_at_the_first_try(
    tc: tn.TrainingClient, tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(GOOD)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    shared = [{"id": n, "conversations": turns} for n in range(4)]
    (tmp_path / "shared.json").write_text(json.dumps(shared))
    with pytest.warns(UserWarning, match="'id'"):
        chats = tc.batches(tmp_path / "shared.json")
    for batches in (tc.batches(frame), tc.batches(tmp_path / "rows.csv"), chats):
        run = tc.fit(batches, epochs=1, show=False).result()
        assert run.steps == len(batches)


def test_a_data_set_can_be_made_while_the_model_is_loading(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = """
import tensafe_nb as tn
with tn.ServiceClient() as service:
    tc = service.create_training_client(batch_size=2)
    import datasets
    print(tc.batches(datasets.Dataset.from_list([{"text": "def f(x):"}, {"text": "class A:"}])))
"""
    env = {**os.environ, "TENSAFE_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "<Batches 1 of 2 rows, 2 examples>\n", done.stderr


# labels that nobody shifted


@pytest.mark.parametrize("masked", [0, 3])
def test_labels_at_their_own_positions_are_refused_unless_they_are_meant(masked: int) -> None:
    ids = np.random.default_rng(0).integers(2, 90, (3, 9))
    labels = np.where(np.arange(9) < masked, -100, ids)
    with pytest.raises(tn.ValidationError, match=r"tokens of their own positions.*labels_are_shifted=True"):
        tn.BatchData(ids, labels=labels)
    meant = tn.BatchData(ids, labels=labels, labels_are_shifted=True)
    again = meant.labelled_with(weights=[1.0, 1.0, 1.0]).rows(0, 2)
    assert again.labelled_with(x=[0, 1]).labels_are_shifted
    assert tn.BatchData.of({"input_ids": ids, "labels": labels, "labels_are_shifted": True}) == meant


def test_shifted_labels_pass_and_so_does_what_cannot_be_told_apart() -> None:
    tn.BatchData([[5, 6, 7]], labels=[[6, 7, -100]])
    tn.BatchData([[5, 5, 5]], labels=[[5, 5, -100]])  # one token over and over
    tn.BatchData([[5, 5, 7]], labels=[[5, 7, -100]])
    tn.BatchData([[5, 6, 7]], labels=[[-100, -100, 7]])  # nothing follows: may be of another kind of task
    tn.BatchData([[5, 6, 0]], attention_mask=[[1, 1, 0]], labels=[[6, -100, -100]])


# private draws


def test_bad_rows_fall_out_before_anything_is_drawn_and_units_stay_with_their_rows(
    service: tn.ServiceClient,
) -> None:
    dp = tn.DPConfig(dataset_size=13, noise_multiplier=2.0)
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2), batch_size=4, dp_config=dp)
    with pytest.raises(tn.ValidationError, match=r"^Row 5: "):
        tc.dp_batches(BAD)
    draws = tc.dp_batches(BAD, on_bad_rows="skip", unit_ids=[f"person {n // 2}" for n in range(13)], steps=2)
    assert len(draws.examples) == 12
    assert [int(unit) for unit in draws._units] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 6]
    with pytest.raises(tn.ValidationError, match="unit_ids names 12 rows, there are 13"):
        tc.dp_batches(BAD, on_bad_rows="skip", unit_ids=list(range(12)))
    alone = tc.dp_batches(BAD, on_bad_rows="skip")
    assert (len(alone.examples), alone.sample_rate) == (12, pytest.approx(4 / 13))


# rollouts


def test_prompts_that_leave_no_room_are_found_before_the_run_or_left_out(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(model_ref="builtin:tiny")
    prompts = [*(f"def f{n}():" for n in range(6)), "x = 1\n" * 400]
    options: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4, "chat": "never"}
    trainer = rlvr.RLVRTrainer(tc, prompts, length, **options)
    with pytest.raises(
        tn.ValidationError, match=r"^prompts: row 6: .*max_new_tokens=4.*context of 512\. Shorten"
    ):
        trainer.run(steps=1, show=False).result()
    with pytest.raises(
        tn.ValidationError, match=r"^Prompt 0 has \d+ tokens; .* Set max_new_tokens to 50\d or less"
    ):
        tc.sample("def f():", max_new_tokens=512).result()
    held_out = rlvr.RLVRTrainer(tc, prompts[:6], length, eval_prompts=prompts, **options)
    with pytest.raises(tn.ValidationError, match=r"^eval_prompts: row 6: "):
        held_out.run(steps=1, show=False).result()
    assert (tc.step, trainer.prompts.position) == (0, 0)
    patient = rlvr.RLVRTrainer(tc, prompts, length, eval_prompts=prompts, on_bad_rows="skip", **options)
    assert (len(patient.prompts.specs), len(patient.held_out.specs)) == (6, 6)


def test_prompts_that_the_tokenizer_cannot_read_are_found_before_the_run(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(model_ref="builtin:sums")
    trainer = rlvr.RLVRTrainer(tc, ["12+12=", "1+1", "what?"], length, max_new_tokens=4, chat="never")
    with pytest.raises(tn.ValidationError, match=r"^prompts: row 2: "):
        trainer.run(steps=1, show=False).result()


# recipes and the command


def test_a_recipe_reads_any_source_and_leaves_bad_rows_out_on_demand(service: tn.ServiceClient) -> None:
    pandas = pytest.importorskip("pandas")
    recipe = Recipe(steps=1, training=tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=2), batch_size=2))
    tc = service.create_training_client(recipe.training)
    with pytest.raises(tn.ValidationError, match=r"^Row 5: "):
        recipe.start(tc, BAD, show=False)
    patient = recipe.replace(on_bad_rows="skip", eval_every=1)
    result = patient.start(tc, pandas.DataFrame(BAD), iter(BAD), show=False).result()
    assert "eval/loss" in result.metrics
    with pytest.raises(tn.ValidationError, match=r"^Row 3: .*max_length=20"):
        recipe.replace(max_length=20).start(tc, LONG, show=False)
    assert recipe.replace(max_length=20, truncate=True).start(tc, LONG, show=False).result().steps == 1


def test_a_recipe_for_rollouts_leaves_bad_prompts_out_on_demand(service: tn.ServiceClient) -> None:
    how = RLVRConfig(reward="exact_match", prompts_per_step=2, group_size=2, max_new_tokens=4)
    recipe = Recipe(mode="rlvr", steps=1, training=tn.TrainingConfig(model_ref="builtin:sums"), rlvr=how)
    tc = service.create_training_client(recipe.training)
    prompts = [*tn.datasets.sums(4, seed=0), {"prompt": None, "answer": "1"}]
    with pytest.raises(tn.ValidationError, match=r"^prompts: row 4: "):
        recipe.start(tc, prompts, show=False)
    assert recipe.replace(on_bad_rows="skip").start(tc, prompts, show=False).result().state == "FINISHED"


def test_the_command_reads_tables_and_names_the_line_of_a_bad_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("training: {steps: 1}\nlora: {rank: 2}\nbatch: {batch_size: 2}\n")
    Path("rows.csv").write_text("prompt,completion\nabs(x),Return it.\nlen(x),\nord(c),Return the code.\n")
    command = ["run", "recipe.yaml", "--data", "rows.csv"]
    assert cli.main(command) == 1
    assert "Row 1 (rows.csv, line 3): 'completion' is None" in capsys.readouterr().err
    assert cli.main([*command, "--on-bad-rows", "skip"]) == 0
    assert "1 of 3 rows were left out: Row 1 (rows.csv, line 3)" in caplog.text
    Path("recipe.yaml").write_text(
        "training: {steps: 1, on_bad_rows: skip}\nlora: {rank: 2}\nbatch: {max_length: 5, truncate: true}\n"
    )
    assert cli.main(command) == 0
