"""What a reward's version covers: code and all it uses, as it is in memory; and where it says that it is partial."""

import functools
import importlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tensafe_nb.rlvr import Part, resolve_reward
from tensafe_nb.rlvr.rewards.identity import identity_of, place_of


def notebook(source, **names):
    """Return the variables of a notebook after a cell."""
    variables = {"__name__": "__main__", **names}
    exec(textwrap.dedent(source), variables)
    return variables


def version(function):
    return resolve_reward(function).version


CHANCE = np.random.default_rng(0)
CELL = """
import re
LIMIT = 3
WORDS = {"a": 1, "b": 2}

class Judge:
    strict = True
    def __init__(self):
        self.seen = [1]
    def verdict(self, text):
        return len(text) > LIMIT and self.strict

JUDGE = Judge()

def deep(text):
    return WORDS.get(text, 0)

def helper(text):
    return deep(text) + 1

UNUSED = 1

def reward(prompt, response, meta=None, *, bonus=1):
    def inner(text):
        return [helper(piece) for piece in text.split()]
    return sum(inner(response)) + bonus + JUDGE.verdict(response) + bool(re.match("a", response))
"""


@pytest.mark.parametrize(
    "change",
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ('"b": 2', '"b": 3'),
        ("strict = True", "strict = False"),
        ("self.seen = [1]", "self.seen = [2]"),
        ("return WORDS.get(text, 0)", "return WORDS.get(text, 1)"),
        ("deep(text) + 1", "deep(text) + 2"),
        ("bonus=1", "bonus=2"),
        ("text.split()", "text.split(',')"),
        ("len(text) > LIMIT and", "len(text) >= LIMIT and"),
    ],
    ids=lambda change: change[1],
)
def test_the_version_changes_with_whatever_the_function_uses_however_far_away(change):
    assert version(notebook(CELL)["reward"]) != version(notebook(CELL.replace(*change))["reward"])


@pytest.mark.parametrize(
    "change",
    [
        ("UNUSED = 1", "UNUSED = 2"),
        ("def helper(text):\n", 'def helper(text):\n    """Say what it does."""\n'),
        ("LIMIT = 3", "# a comment\n\n\nLIMIT = 3"),
    ],
    ids=["a variable it does not use", "a docstring", "a comment"],
)
def test_the_version_does_not_change_with_what_cannot_change_a_score(change):
    assert version(notebook(CELL)["reward"]) == version(notebook(CELL.replace(*change))["reward"])


def test_running_a_helpers_cell_again_changes_the_version_of_the_function_that_is_held():
    variables = notebook(CELL)
    reward = resolve_reward(variables["reward"])
    before = reward.version
    exec("def deep(text):\n    return 7", variables)
    assert reward.version != before
    exec("def deep(text):\n    return WORDS.get(text, 0)", variables)
    assert reward.version == before


DECORATED = """
import collections, contextlib, functools
from typing import NamedTuple

K = 1

@contextlib.contextmanager
def limits():
    yield K

@functools.singledispatch
def size(x):
    return 0

@size.register(str)
def _(x):
    return K + 1

class Pair(NamedTuple):
    weight: float = 1.0
    def scaled(self):
        return self.weight * (K + 2)

class Table(dict):
    def best(self):
        return K + 3

class Word(str):
    def worth(self):
        return K + 4

class Box(collections.UserDict):
    def lid(self):
        return K + 5

PAIR, TABLE, WORD, BOX = Pair(), Table(), Word(), Box()

def context(prompt, response):
    with limits() as k:
        return k

def dispatched(prompt, response):
    return size(response)

def pair(prompt, response):
    return PAIR.scaled()

def table(prompt, response):
    return TABLE.best()

def word(prompt, response):
    return WORD.worth()

def box(prompt, response):
    return BOX.lid()
"""


@pytest.mark.parametrize("name", ["context", "dispatched", "pair", "table", "word", "box"])
def test_functions_that_a_decorator_or_a_class_of_pythons_carries_count_as_well(name):
    reward = resolve_reward(notebook(DECORATED)[name])
    before = reward.version
    assert before == resolve_reward(notebook(DECORATED)[name]).version
    reward.function.__globals__["K"] = 2
    assert reward.version != before


def test_functions_that_an_object_of_a_package_carries_count_as_well():
    variables = notebook(
        "import numpy\nK = 1\ncount = numpy.vectorize(lambda x: K)\ndef r(prompt, response): return count(1)"
    )
    reward = resolve_reward(variables["r"])
    before = reward.version
    variables["K"] = 2
    assert reward.version != before
    assert before.endswith("-partial")


def test_code_that_a_reloader_puts_into_a_function_changes_its_version():
    def old(prompt, response):
        return 1.0

    def new(prompt, response):
        return 2.0

    before = version(old)
    old.__code__ = new.__code__
    assert version(old) != before
    assert version(old) == version(new)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A package `house` of the user's with a module that another imports, also inside a function."""
    package = tmp_path / "house_of_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("SCALE = 2\nOTHER = 1\ndef scaled(x):\n    return SCALE * x\n")
    (package / "late.py").write_text("BONUS = 5\n")
    (package / "top.py").write_text(
        "from house_of_rewards import low\n"
        "def reward(prompt, response, meta=None):\n"
        "    from .late import BONUS\n"
        "    return low.scaled(len(response)) + BONUS\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "house_of_rewards"]:
        del sys.modules[name]


def test_local_modules_count_with_the_names_that_are_used_of_them(modules):
    top = importlib.import_module("house_of_rewards.top")
    low, late = sys.modules["house_of_rewards.low"], None
    reward = resolve_reward(top.reward)
    first = reward.identity
    late = sys.modules["house_of_rewards.late"]  # imported inside the function: now
    assert set(first.modules) >= {"house_of_rewards.low", "house_of_rewards.late"}
    assert first.beyond == ()
    low.OTHER = 9
    assert reward.version == first.version
    low.SCALE = 3
    scaled = reward.version
    late.BONUS = 6
    assert len({first.version, scaled, reward.version}) == 3


def test_what_is_asked_of_a_module_by_a_computed_name_counts_as_all_of_it(modules):
    importlib.import_module("house_of_rewards.low")
    low = sys.modules["house_of_rewards.low"]
    reward = resolve_reward(lambda prompt, response: getattr(low, response)(1))
    before = reward.version
    low.OTHER = 5
    assert reward.version != before


def test_methods_objects_partials_and_wrapped_functions_are_looked_into():
    class Judge:
        def __init__(self, limit):
            self.limit = limit

        def score(self, prompt, response):
            return len(response) > self.limit

        def __call__(self, prompt, response):
            return self.score(prompt, response)

    def scaled(prompt, response, *, factor):
        return factor

    def doubled(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        return wrapper

    cached = [functools.lru_cache(lambda prompt, response, limit=limit: limit) for limit in (1, 2)]
    pairs = [
        (Judge(1).score, Judge(2).score),
        (Judge(1), Judge(2)),
        (functools.partial(scaled, factor=1), functools.partial(scaled, factor=2)),
        (doubled(lambda prompt, response: 1.0), doubled(lambda prompt, response: 2.0)),
        tuple(cached),
    ]
    for one, other in pairs:
        assert version(one) == version(one) != version(other)
    assert version(Judge(1)) == version(Judge(1))


def test_arrays_count_by_what_they_hold():
    def reward_with(table):
        return lambda prompt, response: table

    one, same, other = np.arange(3), np.arange(3), np.arange(1, 4)
    assert version(reward_with(one)) == version(reward_with(same)) != version(reward_with(other))
    torch = pytest.importorskip("torch")
    halves = [torch.full((3,), value, dtype=torch.bfloat16) for value in (0.5, 0.5, 0.25)]
    assert (
        version(reward_with(halves[0])) == version(reward_with(halves[1])) != version(reward_with(halves[2]))
    )
    assert "partial" in version(reward_with(np.zeros(10**7)))
    assert version(reward_with(torch.tensor(1.0))) != version(reward_with(torch.tensor(2.0)))
    many = {str(n): n for n in range(2000)}
    assert version(reward_with(many)) == version(reward_with(dict(many)))
    assert version(reward_with(many)) != version(reward_with(many | {"0": 1}))


def test_the_parts_of_a_composite_and_their_weights_count():
    versions = {
        resolve_reward(parts).version
        for parts in (
            {"exact_match": 1.0},
            {"exact_match": 2.0},
            [Part("exact_match", true=True)],
            ["contains"],
        )
    }
    assert len(versions) == 4


def test_things_that_hold_each_other_come_to_an_end():
    class Node:
        def __init__(self):
            self.me = self
            self.all = [self]

    node = Node()

    def reward(prompt, response):
        return 0.0 if reward and node else 1.0

    assert version(reward) == version(reward)


def test_what_is_nested_without_end_is_followed_so_far_and_said():
    chain = []
    for _ in range(5000):
        chain = [chain]
    reward = resolve_reward(lambda prompt, response: chain)
    assert reward.version == reward.version
    assert reward.identity.beyond == ("what lies 100 levels deep",)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda prompt, response: np.mean([len(response)]), f"numpy {np.__version__}"),
        (lambda prompt, response: open(response).read(), "open()"),  # noqa: PTH123, SIM115  # that is the point
        (lambda prompt, response: eval(response), "eval()"),
        (lambda prompt, response: CHANCE.random(), "numpy.random"),
    ],
    ids=["a package", "a file", "eval", "an object of a package"],
)
def test_what_cannot_be_looked_into_makes_a_version_partial_and_is_named(function, names):
    reward = resolve_reward(function)
    assert reward.version.endswith("-partial")
    assert any(names in item for item in reward.identity.beyond), reward.identity.beyond


def test_a_version_without_such_a_thing_does_not_say_partial():
    assert "partial" not in version(notebook(CELL)["reward"])
    for name in ("exact_match", "numeric_match", "countdown", "levenshtein", "format_compliance"):
        assert "partial" not in resolve_reward(name).version


def test_one_function_has_one_version_in_every_process():
    source = (
        "from tensafe_nb.rlvr import resolve_reward\n"
        "WORDS = {'x', 'y', 'z', 'w'}\n"
        "def reward(prompt, response, meta=None):\n"
        "    return float(response in {'yes', 'no', 'maybe'}) + (response in WORDS)\n"
        "print(resolve_reward(reward).version, resolve_reward('numeric_match').version)\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", source], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(printed) == 1


def test_modules_are_told_apart_by_where_they_are_from(modules):
    importlib.import_module("house_of_rewards.top")
    places = {
        name: place_of(name) for name in ("house_of_rewards.top", "re", "numpy.linalg", "tensafe_nb.losses")
    }
    assert list(places.values()) == ["local", "stdlib", "library", "library"]
    assert place_of(__name__) == "local"
    assert place_of("tensafe_nb.rlvr.rewards.builtin.numerals") == "ours"


def test_a_clock_or_a_lock_says_when_not_what():
    import asyncio
    import threading

    gate, lock = asyncio.Semaphore(2), threading.Lock()
    identity = identity_of(lambda prompt, response: gate and lock)
    assert identity.beyond == ()
