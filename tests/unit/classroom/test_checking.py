"""Exercises: every solution is right; wrong, empty and wild answers get a hint and never a traceback."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.classroom import exercises  # noqa: F401  # they file themselves
from tensafe_nb.classroom.checking import EXERCISES
from tensafe_nb.classroom.grading import solutions_of
from tests.contract.test_wild_values import WILD

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"
ASKED = {
    number: "".join(cell["source"])
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    for cell in json.loads(path.read_text())["cells"]
    if cell["cell_type"] == "code"
    for number in re.findall(r'tn\.check\("([\d.]+)"', "".join(cell["source"]))
}


def answer_in(source: str) -> Any:
    names: dict[str, Any] = {"tn": tn}
    exec(source, names)
    return names["answer"]


SOLUTIONS = {
    number: source
    for path in sorted((NOTEBOOKS / "solutions").glob("*.py"))
    for number, source in solutions_of(path).items()
}


def test_each_notebook_asks_two_or_three_exercises_each_is_checked_and_has_a_solution() -> None:
    assert set(ASKED) == set(EXERCISES) == set(SOLUTIONS)
    for path in NOTEBOOKS.glob("*.ipynb"):
        numbers = [number for number in ASKED if number[:2] == path.name[:2]]
        assert numbers == [f"{path.name[:2]}.{n}" for n in range(1, len(numbers) + 1)]
        assert 2 <= len(numbers) <= 3


@pytest.mark.parametrize("number", sorted(EXERCISES))
def test_a_solution_is_right(number: str) -> None:
    found = tn.check(number, answer_in(SOLUTIONS[number]))
    assert found.right, found
    assert repr(found).startswith(f"✓ {number} right: ")


@pytest.mark.parametrize("number", sorted(EXERCISES))
def test_the_cell_of_a_notebook_as_it_is_handed_out_says_that_nothing_is_answered_yet(number: str) -> None:
    found = tn.check(number, answer_in(ASKED[number].partition("\ntn.check")[0]))
    assert (found.state, found.right) == ("not answered", False)
    assert "three dots" in repr(found)
    for empty in (None, ..., "", "  "):
        assert tn.check(number, empty).state == "not answered"
    assert tn.check(number) == found


def yields(*_: Any) -> Any:
    yield 1


async def awaits(*_: Any) -> Any:
    return 99


NOT_RIGHT: list[Any] = [
    *(make() for name, make in WILD.items() if name not in ("None", "''", "endless")),
    -7, 1e300, [], [1, 1, 1, 1], {"a": 1}, lambda *_: 0.123, lambda *_: "text", lambda *_: [], lambda *_: -1,
    lambda: 1, lambda *_: {}[1], lambda *_: [1.0] * 4, lambda *_: b"", yields, awaits, len, dict, {"prompt": 1},
    {"messages": [{"role": "user", "content": ""}]}, {"messages": None}, "0", "a word that is no answer at all",
]  # fmt: skip


@pytest.mark.parametrize("number", sorted(EXERCISES))
def test_wrong_and_wild_answers_get_a_hint(number: str) -> None:
    for answer in NOT_RIGHT:
        found = tn.check(number, answer)
        assert found.state == "not yet", answer
        assert 10 < len(found.text) < 400
        assert "\n" not in repr(found)


@pytest.mark.parametrize(
    ("number", "answer", "hint"),
    [
        ("01.1", 16384, "the whole matrix"),
        ("01.1", 1024, "one of the two"),
        ("1.1", 5, "rank × columns"),
        ("01.2", lambda loss: 2**loss, "the base is e"),
        ("01.3", {"text": "2+2=4"}, "Part it in two"),
        ("01.3", {"prompt": "4", "completion": "2+2="}, "which part is given"),
        ("02.1", 0, "left of a window"),
        ("02.1", 20, "no more than that"),
        ("02.2", lambda handles: 0, "async def"),
        ("03.1", [5, 6, 7, 8], "these are the inputs"),
        ("03.1", [6, 7, 8, 9], "nothing follows"),
        ("03.2", lambda c, r, m: m - (c - r), "pays nothing either"),
        ("03.2", lambda c, r, m: max(0, m - (r - c)), "when the rejected"),
        ("03.3", 11, "in bits"),
        ("04.1", lambda data: data, "and 0 are"),
        ("04.1", lambda data: data + b"x", "added or taken away"),
        ("04.2", [50, 100, 150], "the newest"),
        ("05.1", lambda rewards: [r - sum(rewards) / len(rewards) for r in rewards], "Leave it out"),
        ("05.2", lambda p, r, m: float(int(r) == int(m["answer"])), "earns 1|raised ValueError"),
        ("05.3", lambda p, g: p**g, "another way to be of one mind"),
        ("06.1", "012345678", "not paid where the sum is 009"),
        ("06.2", lambda p, r, m: float(r == m["answer"]), "three digits, or neither"),
        ("07.1", lambda g, c: [v * c / (sum(x * x for x in g) ** 0.5 or 1) for v in g], "stays as it is"),
        ("07.1", lambda g, c: [max(-c, min(c, v)) for v in g], "another way"),
        ("07.2", lambda s, c, n: s * c, "noise on the sum"),
        ("07.2", lambda s, c, n: s * c / n**0.5, "added once"),
        ("07.3", 1.5, "has seen it"),
        ("08.1", ["reward", "sample"], "runs at the server"),
        ("08.1", ["rewards"], "none of the five"),
        ("08.2", ["TENSAFE_BASE_URL"], "there are two"),
        ("09.1", lambda A, B, x, alpha: B @ (A @ x), "scale alpha / rank is missing"),
        ("09.2", [1, 2, 1, 3], "two A are equal"),
        ("10.1", 270, "two bytes each"),
        ("10.2", {"messages": [{"role": "user", "content": "x"}]}, "last word"),
        ("11.2", 14, "all tokens"),
        ("12.1", lambda a, b: [sum(a) / len(a) - sum(b) / len(b), 0], "b minus a"),
        ("12.2", lambda n: n * (n - 1), "B against A"),
    ],
)
def test_what_is_nearly_right_is_told_what_is_missing_and_not_what_is_right(
    number: str, answer: Any, hint: str
) -> None:
    found = tn.check(number, answer)
    assert found.state == "not yet"
    assert re.search(hint, found.text), found


def test_a_mistake_of_the_student_is_told_in_their_own_words() -> None:
    found = tn.check("05.3", lambda p, g: p / 0)
    assert found.text == "answer(0.5, 2) raised ZeroDivisionError: 'float division by zero'"
    assert "does every way" in tn.check("05.3", lambda p, g: print(end="")).text


@pytest.mark.parametrize(("number", "near"), [("5.9", "05."), ("99.1", "1"), ("05-2", "05.2"), ("", "")])
def test_a_number_that_no_exercise_has_is_told_the_nearest(number: str, near: str) -> None:
    with pytest.raises(tn.ValidationError, match=f"There is no exercise .*{re.escape(near)}"):
        tn.check(number, 1)


def test_a_function_may_be_checked_while_a_loop_runs() -> None:
    import asyncio

    async def cell() -> bool:
        return tn.check("02.2", answer_in(SOLUTIONS["02.2"])).right

    assert asyncio.run(cell())
