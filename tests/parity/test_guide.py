"""The guide's blocks against a server: as in tests/docs/test_guide.py, but for those that bring code of their own."""

from pathlib import Path

import pytest

import tensafe_nb as tn
from tests.docs import test_guide as guide
from tests.docs.conftest import _registries_as_before  # noqa: F401

OWN_CODE = ("13 a loss in a module",)  # that of block 12 is registered, here in the server's process, too
folder = guide.folder
pytestmark = [guide.pytestmark, pytest.mark.transports("http")]


@pytest.mark.parametrize("name", [name for name in guide.CASES if name not in OWN_CODE])
def test_a_block_of_the_guide_runs_against_a_server(
    name: str, service: tn.ServiceClient, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide.test_a_block_of_the_guide_runs_as_written(name, service, folder, capsys)


@pytest.mark.parametrize("name", OWN_CODE)
def test_a_block_that_brings_its_own_code_is_refused_with_the_reason(
    name: str, service: tn.ServiceClient, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(tn.ValidationError, match="a server does not run code that it is sent"):
        guide.test_a_block_of_the_guide_runs_as_written(name, service, folder, capsys)
