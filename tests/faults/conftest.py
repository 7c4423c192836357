"""One nursery for all: what it imports before the first server begins takes seconds."""

from collections.abc import Iterator

import pytest

from tests.faults.killing import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()
