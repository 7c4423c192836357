"""What a notebook's file says of an error, as nbclient writes it: on the ipykernel versions that behave differently."""

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from tests.browser.kernels import VERSIONS, NoIndexError, register

pytestmark = pytest.mark.soak

CELLS = [
    "import tensafe_nb as tn\nservice = tn.ServiceClient()\ntc = service.create_training_client()",
    "def broken(outputs, batch):\n    return 1 / 0",
    "await tc.forward_backward({'input_ids': [[5, 6, 7]]}, loss_fn=broken)",
    "tc.forward_backward({'input_ids': [[5, 6, 7]]}, loss_fn=broken).result()",
    "tc.fit([], steps='ten')",
    "tn.full_tracebacks()\ntc.fit([], steps='ten')",
    "tn.full_tracebacks(False)\ntc.fit([], steps='ten')",
    "service.close()",
]


def traceback_of(cell: Any) -> str:
    (error,) = (output for output in cell.outputs if output.output_type == "error")
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_notebook_shows_the_users_lines_and_the_message(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    try:
        name = register(version, tmp_path)
    except NoIndexError as error:
        pytest.skip(str(error))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, kernel_name=name, allow_errors=True).execute()
    awaited, blocked, refused, full, short = map(traceback_of, notebook.cells[2:7])
    for told in (awaited, blocked):
        assert re.findall(r"^Cell In\[\d+\], line \d+.*", told, flags=re.MULTILINE)[0] == told.splitlines()[2]
        assert "Caused by ZeroDivisionError: division by zero, raised in" in told
        assert "return 1 / 0" in told
        assert told.strip().endswith(
            "FutureFailedError: The operation failed: ZeroDivisionError: division by zero"
        )
    assert len(refused.splitlines()) < 10
    assert "checks.py" in full and "checks.py" not in short
