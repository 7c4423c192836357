"""An audit log that tests copy, and one of a test's own."""

import shutil
from pathlib import Path

import pytest

from tensafe_nb.store.audit.log import AuditLog
from tests.unit.store.audit.logs import made, quiet_keys


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> AuditLog:
    """A log that tests copy and never change."""
    return made(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def log(sample: AuditLog, tmp_path: Path) -> AuditLog:
    """A log of a test's own, as the process that wrote it has it."""
    shutil.copytree(sample.path.parents[2], tmp_path, dirs_exist_ok=True)
    own = AuditLog(tmp_path / "audit" / "local", quiet_keys(tmp_path / "keys"))
    own._secrets, own._seen = sample._secrets, sample._seen
    return own
