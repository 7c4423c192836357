"""What Binder installs is what the package needs; repo2docker installs no more than binder/ says."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = {
    "tenseal": "no notebook on Binder needs it",
    "jupyterlab": "the image has it",
}
NOT_TESTED_HERE = {"nbgitpuller"}  # for the links of docs/how-to/hubs.md: an extension of the server


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[><=\[]", line)[0].strip().lower().replace("_", "-") for line in requirements}


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if "==" in line]
    return {
        name.strip().lower().replace("_", "-"): version.strip()
        for name, _, version in (line.partition("==") for line in lines)
    }


def test_every_dependency_of_the_package_is_installed_on_binder_but_for_those_with_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"]) - set(pins("binder/requirements.txt")) == set(LEFT_OUT)


def test_binder_pins_what_the_tests_ran_with() -> None:
    tested = pins("constraints.txt")
    for name, version in pins("binder/requirements.txt").items():
        if name not in NOT_TESTED_HERE:
            assert version.removesuffix("+cpu") == tested[name], name


def test_no_line_names_a_path_so_that_the_layer_is_kept_when_a_notebook_changes() -> None:
    lines = (ROOT / "binder/requirements.txt").read_text().splitlines()
    assert not [line for line in lines if line.startswith((".", "/", "-e", "-r"))]


@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    script = ROOT / "binder" / name
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
