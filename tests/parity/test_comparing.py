"""A comparison raced on either transport: the same numbers, the same forks, the same record on this machine's disk."""

from typing import Any

import pytest

import tensafe_nb as tn

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
RECIPE = {"training": {"steps": 4}, "lora": {"rank": 1}, "batch": {"batch_size": 2}}
found: dict[str, Any] = {}


def race(service: tn.ServiceClient, **how: Any) -> Any:
    comparison = tn.compare(
        RECIPE, data=ROWS, seeds=3, vary={"learning_rate": [1e-3, 1e-2]}, service=service, show=False, **how
    )
    comparison.fork("learning_rate=0.001", step=2, learning_rate=1e-4)
    return comparison.result()


def test_a_comparison_ends_in_the_same_numbers_on_both(service: tn.ServiceClient, transport: str) -> None:
    result = race(service, name="rates")
    print(result)
    print(tn.load_comparison("rates"), tn.load_comparison("rates").result())
    print(service.list_training_clients())
