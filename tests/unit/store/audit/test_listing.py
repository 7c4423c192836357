"""Listings of an audit log: newest first, filtered, in pages."""

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import (
    ValidationError,
)
from tensafe_nb.store.audit import chain
from tensafe_nb.store.audit.log import AuditLog
from tests.unit.store.audit.logs import CLIENTS, RECORDS, VERBS


def test_a_listing_is_newest_first_and_each_entry_follows_the_next(log: AuditLog) -> None:
    logs = log.entries()
    assert [entry.seq for entry in logs] == list(reversed(range(RECORDS)))
    assert all(newer.prev_hash == older.record_hash for newer, older in itertools.pairwise(logs))


@given(
    client=st.sampled_from([None, *CLIENTS, "tc-9"]),
    operation=st.sampled_from([None, *VERBS]),
    limit=st.integers(0, RECORDS + 2),
    offset=st.integers(0, RECORDS + 2),
)
@settings(max_examples=60)
def test_filters_and_pages_cut_the_listing(
    sample: AuditLog, client: str | None, operation: str | None, limit: int, offset: int
) -> None:
    fitting = [
        entry
        for entry in sample.entries()
        if client in (None, entry.training_client_id) and operation in (None, entry.operation)
    ]
    assert sample.entries(client, operation, limit, offset) == fitting[offset:][:limit]


def test_pages_are_counted_from_zero(log: AuditLog) -> None:
    for wrong in ({"limit": -1}, {"offset": -1}):
        with pytest.raises(ValidationError, match="count records"):
            log.entries(**wrong)


@given(content=st.binary(max_size=60).map(lambda data: data.replace(b"\x00", b"\n")), block=st.integers(1, 9))
@settings(max_examples=200)
def test_reading_backwards_gives_the_finished_lines_in_reverse(content: bytes, block: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chain, "BLOCK", block)
        backwards = list(chain.lines_newest_first(io.BytesIO(content), len(content)))
    finished = [line for line in io.BytesIO(content) if line.endswith(b"\n")]
    assert backwards == finished[::-1]


class _Counted(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_the_newest_records_are_had_without_reading_the_others() -> None:
    lines = [b"%d %s\n" % (number, b"x" * 700) for number in range(5000)]
    log = _Counted(b"".join(lines))
    newest = list(itertools.islice(chain.lines_newest_first(log, log.seek(0, 2)), 100))
    assert newest == lines[:-101:-1]
    assert log.taken <= 100 * 710 + 2 * chain.BLOCK
