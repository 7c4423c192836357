"""A run as a page that stands alone: it tells what the panel told, holds no texts unasked, and loads nothing."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.config import DPConfig, TrainingConfig
from tensafe_nb.events import Rollouts
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.runs.record import RunRecord, read_log
from tensafe_nb.widgets import tape
from tensafe_nb.widgets.page import OPERATOR

from .conftest import FakeClient, FakeRun
from .test_rollouts import beside, rollouts_of

LOSSES = [5.0, 4.0, float("nan"), 3.0]
SECRET = "</script><script>alert('the prompt')</script>"


def record_of(client: FakeClient) -> RunRecord:
    return read_log(client.history.path)[-1]


@pytest.fixture
def run(client: FakeClient) -> FakeRun:
    """A run of four steps that has ended, with a checkpoint."""
    run = client.start()
    for loss in LOSSES:
        client.advance(run, loss)
    client.save("art-1", step=4)
    client.turn(run, RunStatus.FINISHED)
    return run


def reinforced(client: FakeClient, prompts: int = 2) -> RunRecord:
    """A run whose every step has rollouts: of the first prompt all answers are right."""
    run = client.start(FakeRun(curve="reward"))
    for step in (1, 2):
        client.measure(reward=0.5 * step)
        run.steps_done += 1
        file = rollouts_of(beside(client) / f"{step}", {SECRET: 1.0, f"answer {step}": 0.0})
        client.publish(Rollouts(run_id=run.run_id, step=step, rollouts=2, path=f"1/{file.name}"))
    client.turn(run, RunStatus.FINISHED)
    return record_of(client)


def content_of(page: str) -> list[dict[str, Any]]:
    """Return the tapes of a page."""
    return [
        json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', page)
    ]


def points_of(content: dict[str, Any], name: str) -> list[float]:
    columns = [message["s"].get(name, [0, [], []]) for message in told(content, "delta")]
    return [float(value) for _, _, values in columns for value in values]


def told(content: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [message for _, messages in content["frames"] for message in messages if message["t"] == kind]


def test_its_frames_add_up_to_the_history_and_end_with_the_run(client: FakeClient, run: FakeRun) -> None:
    content = tape.Tape(record_of(client)).content()
    values = points_of(content, "loss")
    np.testing.assert_array_equal(values, client.history["loss"])
    last = told(content, "status")[-1]
    assert (last["state"], last["step"], last["marks"], last["steer"]) == ("FINISHED", 4, ("REPLAY",), False)
    assert [row["id"] for row in told(content, "rows")[-1]["rows"]] == ["art-1"]
    assert content["title"] == "tc-1 · builtin:tiny · LoRA r8"


def test_a_long_wait_is_cut_short_and_a_long_run_is_shown_faster() -> None:
    assert [tape.speed_of(seconds) for seconds in (0, 15, 16, 100, 151, 86_400)] == [1, 1, 2, 10, 20, 10_000]


def test_of_a_long_history_a_page_has_no_more_frames_than_can_be_told_apart(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tape, "MOST_FRAMES", 5)
    run = client.start()
    for _ in range(40):
        client.advance(run)
    client.turn(run, RunStatus.FINISHED)
    content = tape.Tape(record_of(client)).content()
    assert len(content["frames"]) <= 7
    assert len(points_of(content, "loss")) == 40


def test_no_prompt_and_no_answer_is_in_it_unless_asked_for(client: FakeClient, tmp_path: Path) -> None:
    record = reinforced(client)
    page = record.save_page(tmp_path / "run.html")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"answer \d|the prompt'", json.dumps(content_of(text)))
    assert content_of(text)[0]["rollouts"] is None
    with_samples = tn.save_page(tmp_path / "samples.html", record, samples=1).read_text(encoding="utf-8")
    assert "<script>alert" not in with_samples
    [content] = content_of(with_samples)
    assert {step: len(one["groups"]) for step, one in content["rollouts"].items()} == {"1": 1, "2": 1}
    assert content["rollouts"]["2"]["groups"][0]["r"][0]["text"] == SECRET


def test_where_samples_would_be_too_many_evenly_spread_steps_keep_theirs(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = reinforced(client)
    monkeypatch.setattr(tape, "MOST_SAMPLES", 10)
    assert list(tape.Tape(record, samples=1).content()["rollouts"]) == [2]


def test_samples_that_are_gone_are_said_to_be_and_not_where_they_were(client: FakeClient) -> None:
    record = reinforced(client)
    (beside(client) / "1").unlink()
    content = tape.Tape(record, samples=1).content()
    assert content["rollouts"][1] == {"t": "rollouts", "step": 1, "why": tape.NOT_KEPT}


def test_it_loads_nothing_and_runs_no_script_but_its_own(
    client: FakeClient, run: FakeRun, tmp_path: Path
) -> None:
    text = tn.save_page(tmp_path / "run.html", client.history.path).read_text(encoding="utf-8")
    [script] = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert not re.search(r"\b(src|href)=", text)
    assert "url(" not in text and "@import" not in text
    assert "FINISHED at step 4 of 10" in text, "the figures need no script"


def test_several_runs_stand_one_beneath_the_other(client: FakeClient, run: FakeRun, tmp_path: Path) -> None:
    record = record_of(client)
    text = tn.save_page(tmp_path / "two.html", record, record, title="Two & two").read_text(encoding="utf-8")
    assert "<title>Two &amp; two</title>" in text
    assert len(content_of(text)) == 2


class PrivateClient(FakeClient):
    """One that trains with differential privacy, a model in a folder of hers."""

    config = TrainingConfig(model_ref="/home/mallory/models/mine", dp_config=DPConfig(sampling="worst_case"))


@pytest.fixture
def private(tmp_path: Path) -> Iterator[RunRecord]:
    client = PrivateClient(tmp_path / "private.jsonl")
    run = client.start()
    client.advance(run)
    client.turn(run, RunStatus.FINISHED)
    yield record_of(client)
    client.bus.close()


def test_the_page_of_a_private_training_is_its_operators_and_says_so(
    private: RunRecord, tmp_path: Path
) -> None:
    page = tmp_path / "run.html"
    page.touch(0o644)
    private.save_page(page)
    assert OPERATOR in page.read_text(encoding="utf-8")
    if os.name == "posix":
        assert page.stat().st_mode & 0o777 == 0o600


def test_of_a_models_folder_only_the_name_is_told(private: RunRecord, tmp_path: Path) -> None:
    text = private.save_page(tmp_path / "run.html").read_text(encoding="utf-8")
    assert "mine" in text
    assert "mallory" not in text


def test_what_is_no_ended_run_and_no_number_of_samples_is_refused(
    client: FakeClient, run: FakeRun, tmp_path: Path
) -> None:
    record = record_of(client)
    for samples in (-1, 1.5, True, "all"):
        with pytest.raises(tn.ValidationError, match="samples"):
            tn.save_page(tmp_path / "run.html", record, samples=samples)
    client.start(FakeRun("tc-1/2"))
    with pytest.raises(tn.ValidationError, match="still under way"):
        tn.save_page(tmp_path / "run.html", client.history.path)
    with pytest.raises(tn.StorageError, match="Could not write"):
        record.save_page(client.history.path / "run.html")
    assert not (tmp_path / "run.html").exists()


def test_a_run_saves_itself_with_the_words_of_its_tokens(
    tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path
) -> None:
    run = tc.fit([batch], steps=3, show=False)
    result = run.result()
    text = run.save_page(tmp_path / "run.html").read_text(encoding="utf-8")
    [content] = content_of(text)
    values = points_of(content, "loss")
    assert values[-1] == pytest.approx(result.metrics["loss"], rel=1e-6)
    tc.close()
    assert content_of(run.save_page(tmp_path / "again.html").read_text(encoding="utf-8"))[0]["frames"]
