"""What enters a call: values of the wrong kind are named, sizes are asked for before anything is walked."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.checks import checked
from tensafe_nb.display import as_given


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def deep(levels: int) -> Any:
    inner: Any = 1
    for level in range(levels):
        inner = [inner] if level % 2 else {"in": inner}
    return inner


def ring() -> list[Any]:
    made: list[Any] = []
    made += [made, made]  # numpy would follow 2 ** 64 paths
    return made


def endless() -> Iterator[str]:
    while True:
        yield "q_proj"


@checked
def plan(
    steps: int,
    rate: float = 1.0,
    name: str | None = None,
    mode: Literal["a", "b"] = "a",
    path: str | Path = "here",
    batches: Any = None,
    show: bool = True,
) -> int:
    """A plan."""
    return steps


ODD = {
    "deep": deep(5000),
    "ring": ring(),
    "5000 digits": 10**5000,
    "unspeakable": Unspeakable(),
    "a list of them": [Unspeakable(), 10**5000],
    "long": "x" * 10**6,
    "long bytes": b"x" * 10**6,
    "many": list(range(10**6)),
    "a huge view": np.broadcast_to(np.int64(1), (10**6, 10**6)),
    "objects": np.array([Unspeakable()], dtype=object),
    "half a character": "\ud800",
}


@pytest.mark.parametrize("name", ODD)
def test_any_value_can_be_named_in_a_message_and_the_message_stays_short(name: str) -> None:
    text = as_given(ODD[name])
    assert 0 < len(text) < 2000
    text.encode()


@drawn(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    )
)
def test_what_is_short_is_named_as_repr_does(value: Any) -> None:
    assert as_given(value) == repr(value) or len(repr(value)) > 100 or repr(value).count("[") > 4


def test_a_dict_is_named_in_its_own_order() -> None:
    assert as_given({"b": 1, "a": (1, 2)}) == "{'b': 1, 'a': (1, 2)}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": "ten"}, r"plan: steps='ten' must be a whole number\."),
        ({"steps": 1.5}, r"steps=1\.5 must be a whole number"),
        ({"steps": 10**5000}, r"a number of about 50\d\d digits> must be a whole number below"),
        ({"steps": np.array([1, 2])}, r"steps=array.* must be a whole number"),
        ({"steps": 1, "rate": float("nan")}, r"rate=nan must be a number"),
        ({"steps": 1, "rate": 10**5000}, r"rate=.* must be a number"),
        ({"steps": 1, "name": 5}, r"name=5 must be a text or None"),
        ({"steps": 1, "name": "a\0b"}, r"name=.* must be a text that can be written"),
        ({"steps": 1, "name": "\ud800"}, r"name=.* must be a text that can be written"),
        ({"steps": 1, "name": "x" * 20_000}, r"name=.* must be a text of at most 10,000 characters"),
        ({"steps": 1, "mode": np.zeros((2, 2))}, r"mode=array.* must be 'a' or 'b'"),
        ({"steps": 1, "path": "x" * 300}, r"path=.* must be a path as short as"),
        ({"steps": 1, "path": 3}, r"path=3 must be the path of a file or folder"),
        ({"steps": 1, "show": np.zeros(2)}, r"show=array.* must be True or False"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        plan(**arguments)


def test_what_fits_passes_as_it_is_and_a_wrong_signature_stays_pythons() -> None:
    assert plan(np.int64(3), rate=2, name=None, path=Path("x"), batches=Unspeakable(), show=np.True_) == 3
    assert list(inspect.signature(plan).parameters)[:2] == ["steps", "rate"]
    with pytest.raises(TypeError, match="missing 1 required"):
        plan()  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"plan\(\) got an unexpected keyword argument 'stepz'\. Did you mean 'steps'\?"
    ):
        plan(1, stepz=2)  # type: ignore[call-arg]


def test_a_number_of_numpys_or_torchs_becomes_pythons_own() -> None:
    @checked
    def given(steps: int, rate: float | None = None, *, path: int | Path | None = None) -> tuple[Any, ...]:
        return steps, rate, path

    for found in (given(np.int64(3), np.float32(0.5)), given(rate=torch.tensor(0.5), steps=torch.tensor(3))):
        assert found == (3, 0.5, None) and list(map(type, found[:2])) == [int, float]
    assert given(1, path=Path("x"))[2] == Path("x")


def test_a_wrong_signature_is_told_once() -> None:
    for wrong in ({}, {"steps": 1, "stepz": 2}):
        with pytest.raises(TypeError) as raised:
            plan(**wrong)
        assert raised.value.__context__ is None or raised.value.__suppress_context__


class Base:
    @checked
    def walk(self, steps: int) -> int:
        return steps


class Child(Base):
    pass


def test_a_method_is_named_with_the_class_that_its_caller_knows() -> None:
    with pytest.raises(tn.ValidationError, match=r"^Child\.walk: steps='x' must be"):
        Child().walk("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Child\.walk\(\) got an unexpected keyword argument 'step'"):
        Child().walk(step=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "value",
    [range(10**12), range(10**30), endless(), ["x"] * 20_000, {None: 1}, {5: 1}, ODD["a huge view"]],
    ids=["range", "longer than a machine counts", "endless", "many", "None: 1", "5: 1", "view"],
)
@pytest.mark.parametrize("make", [tn.LoRAConfig, tn.SamplingConfig, tn.TrainingConfig, tn.LossConfig])
def test_a_setting_larger_than_settings_are_is_refused_before_anything_walks_it(
    make: Callable[..., Any], value: Any
) -> None:
    field = {tn.LoRAConfig: "target_modules", tn.SamplingConfig: "stop", tn.TrainingConfig: "optimizer"}
    with pytest.raises(tn.ValidationError, match=make.__name__):
        make(**{field.get(make, "kwargs"): value})


def test_many_problems_are_told_in_part_and_counted() -> None:
    with pytest.raises(tn.ValidationError, match=r"And \d,?\d+ more") as raised:
        tn.LoRAConfig(target_modules=[1] * 5000)
    assert len(str(raised.value)) < 20_000


def test_a_short_iterator_of_names_is_taken() -> None:
    assert tn.LoRAConfig(target_modules=(name for name in ("q_proj", "v_proj"))).target_modules == (
        "q_proj",
        "v_proj",
    )


@pytest.mark.parametrize("field", ["input_ids", "attention_mask", "labels", "extra"])
@pytest.mark.parametrize(
    "value",
    [
        range(10**12),
        range(10**30),
        [range(10**12)] * 2,
        ring(),
        [ring(), ring()],
        deep(3000),
        np.broadcast_to(np.int64(1), (10**6, 10**6)),
        [np.broadcast_to(np.int64(1), (10**6, 10**6))] * 2,
        [[[1] * 10**4] * 10**4] * 10**4,
        endless(),
        {"a": 1},
        Unspeakable(),
        [[10**5000] * 4] * 2,
        [[Unspeakable()] * 4] * 2,
    ],
    ids=iter(
        [
            "range",
            "no length",
            "ranges",
            "ring",
            "rings",
            "deep",
            "view",
            "views",
            "shared",
            "endless",
            "dict",
            "object",
            "digits",
            "objects",
        ]
    ),
)
def test_a_batch_asks_for_the_size_before_it_reads(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}
    with pytest.raises(tn.ValidationError):
        tn.BatchData(**(fields | {field: value}))


def test_a_number_that_no_label_can_be_is_refused_not_wrapped_around() -> None:
    with pytest.raises(tn.ValidationError, match="9223372036854775813"):
        tn.BatchData(np.array([[1, 2**63 + 5]], np.uint64))


@pytest.mark.parametrize("extras", [5, "abc", [1], np.zeros((1, 2)), {3: [[1, 2]]}])
def test_extras_are_arrays_by_name(extras: Any) -> None:
    with pytest.raises(tn.ValidationError, match=r"extras is a dict of arrays by name"):
        tn.BatchData([[1, 2]], extras=extras)


def test_lists_ranges_and_arrays_make_the_same_batch() -> None:
    rows = [[1, 2, 3], [2, 3, 4]]
    same = [
        np.array(rows),
        [np.array(row) for row in rows],
        (range(1, 4), range(2, 5)),
        [tuple(row) for row in rows],
    ]
    assert all(tn.BatchData(rows) == tn.BatchData(other) for other in same)


def test_a_value_that_came_by_its_place_and_fits_another_keyword_is_told_which() -> None:
    with pytest.raises(
        tn.ValidationError, match=r"rate='first' must be a number\. Did you mean name='first'\?$"
    ):
        plan(1, "first")  # type: ignore[arg-type]
    with pytest.raises(tn.ValidationError, match=r"rate='first' must be a number\.$"):
        plan(1, rate="first")  # type: ignore[arg-type]
    with pytest.raises(tn.ValidationError, match=r"rate=\[\] must be a number\.$"):
        plan(1, [])  # type: ignore[arg-type]


def test_the_name_of_a_checkpoint_in_the_first_place_is_told_its_keyword() -> None:
    with pytest.raises(tn.ValidationError, match=r"include_optimizer='best' .*Did you mean name='best'\?$"):
        tn.TrainingClient.save_state(object(), "best")  # type: ignore[arg-type]


def test_a_class_of_ours_is_named_with_its_article() -> None:
    @checked
    def build(optimizer: tn.OptimizerConfig) -> None: ...

    with pytest.raises(tn.ValidationError, match=r"must be an OptimizerConfig\.$"):
        build("adamw")  # type: ignore[arg-type]
