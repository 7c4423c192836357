"""The arithmetic of `make ranges`; the environments themselves are soak."""

import tomllib

import pytest

from scripts import ranges

PROJECT = tomllib.loads(ranges.PYPROJECT.read_text())["project"]


def test_every_dependency_has_a_floor_that_can_be_installed_and_tested() -> None:
    lowest = [ranges.at("lowest", requirement) for requirement in ranges.declared()]
    assert all("==" in line and ">=" not in line for line in lowest)
    assert {"torch==2.7", "opacus==1.6", "gguf==0.17.1", "safetensors==0.6.2"} <= set(lowest)
    assert [ranges.at("newest", requirement) for requirement in ranges.declared()] == ranges.declared()


def test_a_floor_keeps_its_extras_and_a_requirement_without_one_is_refused() -> None:
    assert ranges.at("lowest", "httpx[http2]>=0.27") == "httpx[http2]==0.27"
    with pytest.raises(ValueError, match="'torch' has no floor"):
        ranges.at("lowest", "torch")


def test_the_part_of_the_suite_exists() -> None:
    assert all((ranges.ROOT / path).exists() for path in ranges.PART)


def test_every_python_that_is_declared_is_new_enough_for_the_package() -> None:
    floor = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    pythons = [
        tuple(map(int, line.rpartition(" ")[2].split(".")))
        for line in PROJECT["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert min(pythons) == floor and pythons == sorted(pythons)
