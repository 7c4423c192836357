"""The stand-ins for `tg_tinker` and `tensafe`; in processes of their own, since imports last."""

import subprocess
import sys
from pathlib import Path

import pytest

IMPORTS = """
import sys
import tensafe_nb.compat
from tg_tinker import BatchData, FutureTimeoutError, LoRAConfig, OptimizerConfig, TGTinkerError, TrainingConfig
from tensafe.rlvr import REINFORCE, resolve_reward
import tensafe.rlvr as rlvr
"""


def run(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=folder
    )


def output(code: str) -> str:
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_are_our_own_objects_and_none_loads_torch() -> None:
    code = """
import tensafe_nb as tn
print(BatchData is tn.BatchData, TGTinkerError is tn.TGTinkerError, rlvr.REINFORCE is tn.rlvr.REINFORCE)
print("torch" in sys.modules)
"""
    assert output(IMPORTS + code) == "True True True\nFalse"


def test_every_public_name_is_there_and_no_other() -> None:
    code = """
import tg_tinker, tensafe, tensafe_nb, tensafe.training.losses as losses
print(dir(tg_tinker) == sorted(tensafe_nb.__all__), set(dir(losses)) == set(tensafe_nb.losses.__all__))
print(hasattr(tg_tinker, "nosuch"), hasattr(losses, "torch"), tensafe.training.losses is losses)
from tg_tinker import *
print(ServiceClient is tensafe_nb.ServiceClient)
"""
    assert output(IMPORTS + code) == "True True\nFalse False True\nTrue"


def test_a_name_that_is_not_there_says_so() -> None:
    assert (
        "cannot import name 'Nosuch' from 'tg_tinker'" in run(IMPORTS + "from tg_tinker import Nosuch").stderr
    )
    assert "No module named 'tensafe.nosuch'" in run(IMPORTS + "import tensafe.nosuch").stderr


def test_importing_it_again_is_fine() -> None:
    code = "import importlib; importlib.reload(tensafe_nb.compat); from tg_tinker import BatchData; print('fine')"
    assert output(IMPORTS + code) == "fine"


@pytest.mark.parametrize("installed", ["tg_tinker.py", "tensafe/__init__.py", "tensafe/training/losses.py"])
def test_a_package_that_is_there_already_is_not_replaced(tmp_path: Path, installed: str) -> None:
    (tmp_path / installed).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / installed).write_text("")
    done = run("import tensafe_nb.compat", folder=tmp_path)
    assert done.returncode == 1
    name = installed.split("/")[0].removesuffix(".py")
    assert f"There is a package {name!r} already ({tmp_path}" in done.stderr
    assert "Import from tensafe_nb instead" in done.stderr


def test_a_module_made_by_hand_is_not_replaced_either() -> None:
    code = "import sys, types; sys.modules['tensafe'] = types.ModuleType('tensafe'); import tensafe_nb.compat"
    assert "There is a package 'tensafe' already (imported already)" in run(code).stderr
