"""The built-in data: nothing leaks between the splits, and the same call gives the same data."""

import sys
from functools import cache

import pytest

from tensafe_nb import datasets

SPLITS: tuple[datasets.Split, ...] = ("train", "heldout")
TEXTS = cache(datasets.pretraining_texts)  # they take seconds


def completions() -> set[str]:
    return {pair["completion"] for split in SPLITS for pair in datasets.docstring_pairs(split)}


def test_the_module_lists_share_no_module() -> None:
    modules = [*datasets.TRAIN_MODULES, *datasets.HELDOUT_MODULES]
    assert len(modules) == len(set(modules))


def test_every_listed_module_is_part_of_the_standard_library() -> None:
    assert {*datasets.TRAIN_MODULES, *datasets.HELDOUT_MODULES} <= sys.stdlib_module_names


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_holds_pairs_of_its_own_modules_only(split: str) -> None:
    own = datasets.TRAIN_MODULES if split == "train" else datasets.HELDOUT_MODULES
    found = {pair["prompt"].removeprefix("class ").split(".")[0] for pair in datasets.docstring_pairs(split)}
    assert found <= set(own)


def test_there_are_enough_pairs_to_train_and_to_measure() -> None:
    assert 1500 <= len(datasets.docstring_pairs("train")) <= 3000
    assert 300 <= len(datasets.docstring_pairs("heldout")) <= 700


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_pair_is_a_signature_line_and_one_line_of_prose(split: str) -> None:
    for pair in datasets.docstring_pairs(split):
        assert set(pair) == {"prompt", "completion"}
        assert pair["prompt"].endswith("\n") and pair["prompt"].count("\n") == 1
        assert pair["completion"] == " ".join(pair["completion"].split())
        assert 15 <= len(pair["completion"]) <= 120


def test_no_prompt_and_no_completion_occurs_twice() -> None:
    for key in ("prompt", "completion"):
        texts = [pair[key] for split in SPLITS for pair in datasets.docstring_pairs(split)]
        assert len(texts) == len(set(texts))


def test_a_well_known_docstring_is_held_out() -> None:
    pair = {
        "prompt": "heapq.merge(*iterables, key=None, reverse=False)\n",
        "completion": "Merge multiple sorted inputs into a single sorted output.",
    }
    assert pair in datasets.docstring_pairs("heldout")


def test_pretraining_texts_contain_no_completion_of_either_split() -> None:
    everything = "\0".join(" ".join(text.split()) for text in TEXTS())
    sample = sorted(completions())[::5]
    assert not [completion for completion in sample if completion in everything]


def test_pretraining_texts_are_plenty_and_different() -> None:
    assert len(TEXTS()) == len(set(TEXTS()))
    assert sum(map(len, TEXTS())) > 500_000


def test_the_data_is_the_same_when_it_is_read_again() -> None:
    train, heldout = (datasets.docstring_pairs(split) for split in SPLITS)
    datasets.documented_in.cache_clear()
    again = datasets.pairs_of(datasets.HELDOUT_MODULES, taken={pair["completion"] for pair in train})
    assert list(again) == [pair["completion"] for pair in heldout]


def test_reading_the_sources_imports_none_of_them() -> None:
    assert "turtle" not in sys.modules
    assert "imaplib" not in sys.modules


def test_a_caller_may_change_what_it_got() -> None:
    before = datasets.docstring_pairs("heldout")
    datasets.docstring_pairs("heldout")[0]["prompt"] = "changed"
    assert datasets.docstring_pairs("heldout") == before


def test_the_sums_of_both_splits_are_all_pairs_of_two_digit_numbers() -> None:
    train = {item["prompt"] for item in datasets.sums(10_000, seed=0, split="train")}
    heldout = {item["prompt"] for item in datasets.sums(10_000, seed=0, split="heldout")}
    assert not train & heldout
    assert len(train | heldout) == 10_000
    assert 900 <= len(heldout) <= 1100


def test_sums_have_three_digit_answers_that_are_right() -> None:
    for item in datasets.sums(200, seed=1):
        a, b = item["prompt"].removesuffix("=").split("+")
        assert (len(a), len(b), len(item["answer"])) == (2, 2, 3)
        assert int(a) + int(b) == int(item["answer"])


def test_a_seed_draws_the_same_sums_and_another_seed_others() -> None:
    assert datasets.sums(50, seed=3) == datasets.sums(50, seed=3)
    assert datasets.sums(50, seed=3) != datasets.sums(50, seed=4)


def test_the_sums_split_never_moves() -> None:
    heldout = sorted(item["prompt"] for item in datasets.sums(977, seed=0, split="heldout"))
    assert heldout[:3] == ["00+12=", "00+43=", "00+55="]


def test_no_sum_comes_twice_until_the_split_is_used_up() -> None:
    size = len({item["prompt"] for item in datasets.sums(5_000, seed=0, split="heldout")})
    assert len({item["prompt"] for item in datasets.sums(size, seed=0, split="heldout")}) == size
    assert len(datasets.sums(size + 5, seed=0, split="heldout")) == size + 5


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        datasets.docstring_pairs("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        datasets.sums(1, seed=0, split="test")  # type: ignore[arg-type]


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        datasets.sums(-1, seed=0)
