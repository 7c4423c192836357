"""Rollouts on the disk: what is written comes back as it was, and no run fills the disk."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import StorageError, ValidationError
from tensafe_nb.rlvr import RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.rlvr.rollouts.store import RolloutStore

number = st.floats() | st.integers(-(2**70), 2**70)
plain = st.recursive(
    st.none() | st.booleans() | number | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
trajectories = st.builds(
    Trajectory,
    prompt=st.text(),
    response=st.text(),
    meta=st.dictionaries(st.text(), plain, max_size=3),
    prompt_tokens=st.lists(st.integers(0, 2**31)),
    tokens=st.lists(st.integers(0, 2**31)),
    logprobs=st.none() | st.lists(st.floats()),
    raw_logprobs=st.none() | st.lists(st.floats()),
    reward=st.none() | st.floats(),
    reward_parts=st.none() | st.dictionaries(st.text(), st.floats(), max_size=3),
    reward_error=st.none() | st.text(),
    reward_version=st.none() | st.text(),
    finish_reason=st.sampled_from(["stop", "length", "fixed"]),
    policy_version=st.none() | st.integers() | st.just("mock"),
    seed=st.none() | st.integers(0, 2**64),
    advantage=st.none() | st.floats() | st.lists(st.floats(), min_size=1),
    prompt_id=st.text(),
    mask=st.none() | st.lists(st.integers(0, 1)),
)
groups = st.builds(
    RolloutGroup,
    prompt_id=st.text(),
    prompt=st.text(),
    rollouts=st.lists(trajectories, max_size=2),
    meta=st.dictionaries(st.text(), plain, max_size=2),
    policy_version=st.none() | st.integers() | st.just("mock"),
    seed=st.none() | st.integers(0, 2**64),
)


def small(text="r", rewards=(1.0, 0.0)):
    rollouts = [Trajectory("p", text, {"answer": 3}, tokens=[1, 2], reward=reward) for reward in rewards]
    return TrajectoryBatch([RolloutGroup("g", "p", rollouts)], SamplingConfig(max_new_tokens=4, stop=("\n",)))


@given(st.lists(groups, max_size=2))
def test_what_was_saved_is_loaded_exactly_nan_none_and_lone_surrogates_included(tmp_path_factory, found):
    batch = TrajectoryBatch(found, SamplingConfig(max_new_tokens=7, seed=3))
    loaded = TrajectoryBatch.load(batch.save(tmp_path_factory.mktemp("rollouts") / "batch.jsonl"))
    assert repr(loaded.groups) == repr(batch.groups)  # a NaN equals no NaN, but its text does
    assert loaded.sampling == batch.sampling


def test_arrays_come_back_and_a_column_that_json_cannot_hold_comes_back_as_its_text(tmp_path):
    batch = small()
    batch[0].meta = {"grid": np.eye(2), "when": {1, 2}, "count": np.int64(3)}
    loaded = TrajectoryBatch.load(batch.save(tmp_path / "b.jsonl"))[0].meta
    assert np.array_equal(loaded["grid"], np.eye(2))
    assert (loaded["when"], loaded["count"]) == ("{1, 2}", 3)


def test_the_file_is_strict_json_a_line_per_group_and_private(tmp_path):
    batch = small(rewards=(math.nan, None))
    path = batch.save(str(tmp_path / "b.jsonl"))
    lines = path.read_text("ascii").splitlines()
    assert len(lines) == 1 + len(batch.groups)
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1"),
        ("{}\n", "line 1"),
        ('{"format": "other"}\n', "'other'"),
        ("GOOD{torn", "line 2"),
        ('GOOD{"rollouts": [{"new_field": 1}], "prompt_id": "a", "prompt": "b"}\n', "line 2.*new_field"),
    ],
)
def test_what_is_no_file_of_rollouts_is_refused_with_the_line(tmp_path, text, message):
    good = small().save(tmp_path / "good.jsonl").read_text().splitlines(keepends=True)[0]
    path = tmp_path / "bad.jsonl"
    path.write_text(text.replace("GOOD", good))
    with pytest.raises(ValidationError, match=message):
        TrajectoryBatch.load(path)


def test_a_missing_file_and_an_unwritable_folder_say_so(tmp_path):
    with pytest.raises(ValidationError, match="No such file"):
        TrajectoryBatch.load(tmp_path / "nothing.jsonl")
    with pytest.raises(StorageError, match="could not be written"):
        small().save(tmp_path / "no" / "folder.jsonl")


def test_a_run_has_a_file_per_step_in_a_folder_of_its_own(tmp_path):
    store = RolloutStore("tc-1/2", tmp_path)
    path = store.add(12, small("first"))
    assert path == tmp_path / "rollouts" / "2" / "step-000012.jsonl"
    assert path.parent.stat().st_mode & 0o077 == 0
    store.add(13, small("second"))
    assert [(step, batch[0].response) for step, batch in store.last(20)] == [(12, "first"), (13, "second")]
    assert [step for step, _ in store.last(1)] == [13]


def test_a_step_taken_again_after_a_rollback_overwrites_nothing(tmp_path):
    store = RolloutStore("tc-1/1", tmp_path)
    first, second = store.add(4, small("before")), store.add(4, small("after"))
    assert first != second
    assert TrajectoryBatch.load(first)[0].response == "before"


def test_the_oldest_texts_go_first_and_those_of_the_last_step_stay(tmp_path):
    size = RolloutStore("tc-0/1", tmp_path / "other").add(1, small()).stat().st_size
    store = RolloutStore("tc-1/1", tmp_path, limit=3 * size)
    paths = [store.add(step, small()) for step in range(1, 6)]
    assert [path.exists() for path in paths] == [False, False, True, True, True]
    big = store.add(6, small("x" * 10 * size))
    assert [path.exists() for path in (*paths, big)] == [False] * 5 + [True]
    assert [step for step, _ in store.last(5)] == [6]


def test_asking_for_rollouts_that_are_not_there_says_what_to_do(tmp_path):
    with pytest.raises(ValidationError, match="no rollouts yet"):
        RolloutStore("tc-1/1", tmp_path).last(3)
    with pytest.raises(ValidationError, match="last=0"):
        RolloutStore("tc-1/1", tmp_path).last(0)
