"""A home folder of a test's own."""

from pathlib import Path

import pytest

from tests.unit.privacy.homes import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "here")
