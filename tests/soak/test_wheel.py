"""An installed wheel, far from any clone: `demo` trains and leaves a page, `lab` serves the notebooks it brought."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.unit.cli.test_lab import NOTEBOOKS, build_wheel

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel, and borrows everything else from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    borrowed = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(paths["purelib"]) / "borrowed.pth").write_text(borrowed)
    wheel = build_wheel(tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel"))
    install = ["-m", "pip", "--python", str(folder), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    return Path(paths["scripts"])


@pytest.fixture
def surroundings(tmp_path: Path) -> dict[str, str]:
    """An environment whose folders are empty, and which finds no clone."""
    share = Path(sys.prefix) / "share" / "jupyter"
    own = {name: str(tmp_path / name) for name in ("TENSAFE_HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | own | {"JUPYTER_PATH": str(share), "JUPYTERLAB_DIR": str(share / "lab")}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_demo_trains_says_what_improved_and_leaves_a_page(
    scripts: Path, surroundings: dict[str, str], empty: Path
) -> None:
    done = subprocess.run(
        [scripts / "tensafe-nb", "demo"],
        cwd=empty,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    losses = re.search(r"has not seen: ([\d.]+) → ([\d.]+) ", done.stdout)
    answers = re.search(r"has not seen: (\d+) → (\d+) % when drawn", done.stdout)
    assert float(losses[2]) < 0.85 * float(losses[1])
    assert int(answers[2]) > int(answers[1]) + 20
    assert "Open build/demo.html in a browser" in done.stdout
    notices = [line for line in done.stderr.splitlines() if not re.match(r"tc-\w+/1 step ", line)]
    assert len(notices) == 1 and notices[0].startswith("A new key seals your checkpoints"), done.stderr
    page = (empty / "build" / "demo.html").read_text(encoding="utf-8")
    assert page.count('class="tsnb-tape"') == 2
    assert losses[0] in page and answers[0] in page


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def lab(
    scripts: Path, surroundings: dict[str, str], empty: Path, port: int
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `tensafe-nb lab`, and its token."""
    token = secrets.token_hex(16)
    command = [
        scripts / "tensafe-nb", "lab", "--no-browser", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1",
        f"--IdentityProvider.token={token}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=empty, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process, token
    process.terminate()
    process.communicate()


def test_lab_serves_the_notebooks_that_it_brought(
    lab: tuple[subprocess.Popen[str], str], empty: Path, port: int
) -> None:
    process, token = lab
    folder = empty / "tensafe-nb-notebooks"
    assert process.stdout.readline() == f"notebooks: {folder} (copied there: {len(NOTEBOOKS)})\n"
    while process.poll() is None:
        with suppress(URLError):
            with urlopen(f"http://127.0.0.1:{port}/api/contents?token={token}", timeout=60) as answer:
                served = {entry["name"] for entry in json.loads(answer.read())["content"]}
            break
        time.sleep(0.1)  # it is not up yet
    else:
        pytest.fail(process.stdout.read())
    assert served == set(NOTEBOOKS)
