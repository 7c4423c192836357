"""Environments: what is one, what is none, and what the refusal says."""

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import Environment, environment, get_registered_environments, resolve_environment


def speaks(row, *, times=2):
    for _ in range(times):
        yield "a"
    return 1.0


def test_a_generator_function_becomes_an_environment_with_its_name():
    made = environment(max_turns=3)(speaks)
    assert (made.name, made.max_turns, made.__doc__) == ("speaks", 3, speaks.__doc__)
    assert next(made({})) == "a", "it can be driven by hand"
    assert environment(speaks) == Environment(speaks)
    assert repr(made) == "<environment 'speaks', max_turns=3>"


def test_it_is_found_by_name_by_path_and_as_it_is_with_keywords_bound():
    environment(name="speaks-of-a-test")(speaks)
    assert "speaks-of-a-test" in get_registered_environments()
    for spec in ("speaks-of-a-test", f"{__name__}:speaks", speaks):
        assert resolve_environment(spec, times=3).kwargs == {"times": 3}
    with pytest.raises(ValidationError, match=r"no environment named 'sum'\. Did you mean 'sums'"):
        resolve_environment("sum")
    with pytest.raises(ValidationError, match=r"no keyword 'time'\. Did you mean 'times'"):
        resolve_environment(speaks, time=3)


def test_another_function_under_a_taken_name_is_refused():
    with pytest.raises(ValidationError, match="is taken by"):
        environment(name="sums")(speaks)


def returns(row):
    return 1.0


def takes_two(row, other):
    yield other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: environment(returns), "returns is none, it has no yield. Say with `said = yield text`"),
        (lambda: environment(speaks(None)), "must be a function or None"),
        (lambda: environment(takes_two), r"called as takes_two\(row\)"),
        (lambda: environment(max_turns=0)(speaks), "max_turns=0 must be"),
        (lambda: environment(max_tokens=0)(speaks), "max_tokens=0 must be"),
        (lambda: Environment(speaks, overlong=(4, 4)), r"overlong=\(4, 4\) must be \(max_length, cache\)"),
    ],
)
def test_what_is_no_environment_is_refused_with_what_is_missing(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_its_version_changes_with_its_code_and_with_its_limits():
    def other(row):
        yield "b"
        return 1.0

    versions = {
        environment(speaks).version,
        environment(other).version,
        environment(max_turns=3)(speaks).version,
    }
    assert len(versions) == 3
    assert environment(speaks).version == environment(speaks).version
