"""The arithmetic of `make ranges`; the environments themselves are soak."""

import tomllib

import pytest

from scripts import ranges

PROJECT = tomllib.loads(ranges.PYPROJECT.read_text())["project"]


def test_every_dependency_has_a_floor_that_can_be_installed_and_tested() -> None:
    lowest = [ranges.at("lowest", requirement) for requirement in ranges.declared()]
    assert all("==" in line and ">=" not in line for line in lowest)
    assert {"torch==2.7", "opacus==1.6", "gguf==0.17.1", "safetensors==0.8"} <= set(lowest)
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


def test_an_end_and_its_tests_may_stand_before_and_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(ranges, "prepare", lambda *given: asked.append(given))
    monkeypatch.setattr(ranges, "versions", lambda python: "")
    monkeypatch.setattr(ranges, "check", lambda *given: asked.append(given) or 0)
    assert ranges.main(["lowest", "--torch", "2.13.0", "--workers", "1", "tests/numbers"]) == 0
    (end, _, folder, torch), (checked, python, workers, tests) = asked
    assert (end, folder, torch) == ("lowest", ranges.ROOT / ".venv-lowest", "2.13.0")
    assert (checked, python, workers, tests) == (end, folder / "bin" / "python", 1, ["tests/numbers"])
    assert ranges.main(["newest"]) == 0 and asked[-1][3] == ranges.PART
