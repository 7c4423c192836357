import math

import pytest

from tensafe_nb.runs.alarms import QUIET, StepAlarms

HEALTHY = {"loss": 2.0, "grad_norm": 1.0, "param_delta_norm": 0.01}


def watched(steps: int) -> StepAlarms:
    """Return alarms that have seen so many healthy steps."""
    alarms = StepAlarms()
    for step in range(1, steps + 1):
        assert alarms.observe("tc-1/1", step, HEALTHY) == []
    return alarms


def test_a_healthy_run_raises_none() -> None:
    watched(200)


@pytest.mark.parametrize(
    ("values", "name", "level"),
    [
        ({"loss": math.nan}, "nan", "red"),
        ({"grad_norm": math.inf}, "nan", "red"),
        ({"grad_norm": 10.5}, "grad_norm", "amber"),
        ({"param_delta_norm": 0.0}, "no_learning", "red"),
    ],
)
def test_each_trouble_is_named_with_what_helps(values: dict[str, float], name: str, level: str) -> None:
    found = {alarm.name: alarm for alarm in watched(20).observe("tc-1/1", 21, HEALTHY | values)}
    assert (found[name].level, found[name].step, found[name].run_id) == (level, 21, "tc-1/1")
    assert found[name].message and found[name].remedy


def test_a_trouble_that_lasts_is_announced_once_and_anew_after_a_quiet_time() -> None:
    alarms = watched(20)
    spike = HEALTHY | {"param_delta_norm": 0.0}
    assert [len(alarms.observe("tc-1/1", step, spike)) for step in range(21, 25)] == [1, 0, 0, 0]
    for step in range(25, 25 + QUIET):
        assert alarms.observe("tc-1/1", step, HEALTHY) == []
    assert len(alarms.observe("tc-1/1", 99, spike)) == 1


def test_the_first_steps_set_no_standard_for_gradients() -> None:
    alarms = watched(5)
    assert alarms.observe("tc-1/1", 6, HEALTHY | {"grad_norm": 1_000.0}) == []
