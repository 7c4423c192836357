"""A sealed log: what is cut off at its end is forgotten, whatever else was altered is an error."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_nb.errors import DecryptionError, StorageError
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.log import SealedLog


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").mkdir()
    return Keys(tmp_path / "keys", "file", announce=lambda words: None)


def written(path: Path, keys: Keys, records: list[bytes]) -> bytes:
    path.unlink(missing_ok=True)
    log = SealedLog(path, keys, {"version": 1})
    for record in records:
        log.append(record)
    log.close()
    return path.read_bytes()


def read(path: Path, keys: Keys, content: bytes) -> list[bytes]:
    path.write_bytes(content)
    log = SealedLog(path, keys)
    log.close()
    return log.found


@given(st.lists(st.binary(max_size=200), max_size=6), st.lists(st.binary(max_size=50), max_size=3))
def test_what_was_written_is_read_and_writing_goes_on(
    keys: Keys, tmp_path: Path, before: list[bytes], after: list[bytes]
) -> None:
    written(tmp_path / "a.tsnj", keys, before)
    log = SealedLog(tmp_path / "a.tsnj", keys)
    assert log.found == before and log.header["version"] == 1
    assert [log.append(record) for record in after] == list(range(len(before), len(before) + len(after)))
    assert [log[number] for number in range(len(log))] == before + after
    log.sync(), log.close()
    again = SealedLog(tmp_path / "a.tsnj", keys)
    assert again.found == before + after
    again.close()


def test_a_record_that_was_cut_off_at_any_byte_is_forgotten_and_the_next_takes_its_place(
    keys: Keys, tmp_path: Path
) -> None:
    path = tmp_path / "a.tsnj"
    records = [b"one", b"two" * 20, b"the last"]
    whole, shorter = written(path, keys, records), 0
    shorter = len(whole) - (4 + 8 + len(records[-1]) + 16)
    for end in range(shorter, len(whole)):
        path.write_bytes(whole[:end])
        log = SealedLog(path, keys)
        assert log.found == records[:2]
        log.append(b"another")
        log.close()
        assert read(path, keys, path.read_bytes()) == [*records[:2], b"another"]
        if whole[end:].strip(b"\0"):  # else zeros are what was there
            assert read(path, keys, whole[:end] + bytes(5_000)) == records[:2]  # a power cut leaves zeros


def test_a_flipped_bit_anywhere_is_an_error_and_never_passes_for_a_cut(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "a.tsnj"
    whole = written(path, keys, [b"one", b"two", b"three"])
    for place in range(len(whole)):
        for bit in (1, 128):
            altered = bytearray(whole)
            altered[place] ^= bit
            with pytest.raises(DecryptionError):
                read(path, keys, bytes(altered))


def test_records_that_were_moved_repeated_or_come_from_another_file_do_not_open(
    keys: Keys, tmp_path: Path
) -> None:
    path, size = tmp_path / "a.tsnj", 4 + 8 + 3 + 16
    whole = written(path, keys, [b"one", b"two"])
    start, one, two = whole[: -2 * size], whole[-2 * size : -size], whole[-size:]
    other = written(path, keys, [b"one", b"two"])[-size:]
    for altered in (start + two + one, start + one + one, start + one + two + two, start + one + other):
        with pytest.raises(DecryptionError):
            read(path, keys, altered)


def test_a_log_is_written_by_one_at_a_time(keys: Keys, tmp_path: Path) -> None:
    log = SealedLog(tmp_path / "a.tsnj", keys, {})
    with pytest.raises(StorageError, match="one server at a time"):
        SealedLog(tmp_path / "a.tsnj", keys)
    log.close()


def test_half_a_record_that_a_full_disk_took_is_taken_back(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    path = tmp_path / "a.tsnj"
    log = SealedLog(path, keys, {})
    log.append(b"one")
    file = log._file

    class Full:
        """Takes ten bytes, and then no more."""

        def __init__(self) -> None:
            self.room = 10

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = file.write(data[: self.room]), 0
            return taken

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    log._file = Full()  # type: ignore[assignment]
    with pytest.raises(StorageError, match="No space left"):
        log.append(b"two" * 100)
    log._file = file
    log.append(b"three")
    log.close()
    assert read(path, keys, path.read_bytes()) == [b"one", b"three"]
