"""TSNB1: what is sealed comes back, and nothing that was changed anywhere does."""

import base64
import hashlib
import hmac
import io
import json
import pickle
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import DecryptionError, KeyUnavailableError, ValidationError
from tensafe_nb.store.keys import sources
from tensafe_nb.store.keys.keyring import REFUSED, Keys
from tensafe_nb.store.sealed import envelope
from tensafe_nb.store.sealed.envelope import MAC, MAGIC, SLOT, TAG, canonical, parse_canonical

REAL_CHUNK = envelope.CHUNK
CHUNK = 64  # small files of many chunks; `real_chunks` for the tests of the size itself
BLOCK = CHUNK + TAG
FIELDS = {"artifact_id": "art-1", "step": 7, "ledger_head": {"seq": 3, "record_hash": "ab"}, "note": "größer"}
PAYLOAD = bytes(range(256)) + b"the end"  # five chunks, the last one short


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys", announce=lambda _: None)


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envelope, "CHUNK", CHUNK)
        yield


@pytest.fixture
def real_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "CHUNK", REAL_CHUNK)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, _small_chunks: None) -> tuple[Keys, bytes]:
    """Keys and one sealed file, for the tests that only read them."""
    keys = Keys(tmp_path_factory.mktemp("shared"), announce=lambda _: None)
    return keys, sealed(keys)


def sealed(keys: Keys, payload: bytes = PAYLOAD, fields: Mapping[str, Any] = FIELDS) -> bytes:
    file = io.BytesIO()
    envelope.seal(file, fields, [payload], keys)
    return file.getvalue()


def opened(data: bytes, keys: Keys) -> bytes:
    return b"".join(map(bytes, envelope.open_sealed(io.BytesIO(data), keys).chunks()))


def refuses(data: bytes, keys: Keys) -> None:
    """Every way of reading a damaged file refuses it, and hands out nothing but a true beginning before."""
    got = bytearray()
    with pytest.raises(DecryptionError):
        for chunk in envelope.open_sealed(io.BytesIO(data), keys).chunks():
            got += chunk
    assert PAYLOAD.startswith(bytes(got)) and len(got) < len(PAYLOAD)
    with pytest.raises(DecryptionError):
        envelope.verify(io.BytesIO(data), keys)
    with pytest.raises(DecryptionError):
        found = envelope.open_sealed(io.BytesIO(data), keys)
        found.fill(0, [memoryview(bytearray(max(found.size, 1)))])


def structure_refused(data: bytes) -> None:
    """It is refused on its face: without a key, before anything is derived."""
    with pytest.raises(DecryptionError) as raised:
        envelope.read_header(io.BytesIO(data))
    assert str(raised.value) == REFUSED


def split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return prefix, slot and body."""
    start = len(envelope.read_header(io.BytesIO(data)).prefix)
    return data[:start], data[start : start + SLOT], data[start + SLOT :]


def blocks(data: bytes) -> list[bytes]:
    body = split(data)[2]
    return [body[at : at + BLOCK] for at in range(0, len(body), BLOCK)]


def with_blocks(data: bytes, changed: list[bytes]) -> bytes:
    prefix, slot, _ = split(data)
    return prefix + slot + b"".join(changed)


def with_header(data: bytes, text: bytes) -> bytes:
    _, slot, body = split(data)
    return MAGIC + struct.pack(">I", len(text)) + text + slot + body


def with_stanzas(data: bytes, text: bytes, *, length: int | None = None) -> bytes:
    """Put other stanzas into the slot and leave the MAC, as one without the data key must."""
    prefix, slot, body = split(data)
    size = len(text) if length is None else length
    changed = (struct.pack(">I", size) + text).ljust(SLOT - MAC, b"\0")
    return prefix + changed[: SLOT - MAC] + slot[-MAC:] + body


def fields_of(data: bytes) -> dict[str, Any]:
    return dict(envelope.read_header(io.BytesIO(data)).fields)


def stanzas_of(data: bytes) -> list[dict[str, Any]]:
    return [dict(stanza) for stanza in envelope.read_header(io.BytesIO(data)).stanzas]


def resealed(data: bytes, keys: Keys, stanzas: list[Mapping[str, Any]]) -> bytes:
    """Put other stanzas into the slot with a MAC that fits, as only one who has the data key can."""
    prefix, _, body = split(data)
    return prefix + envelope._slot(prefix, stanzas, keys.unwrap(stanzas_of(data))) + body


class TestWhatIsSealedComesBack:
    @given(st.lists(st.binary(max_size=3 * CHUNK), max_size=8))
    @settings(max_examples=60)
    def test_pieces_of_any_size_come_back_as_one(
        self, shared: tuple[Keys, bytes], pieces: list[bytes]
    ) -> None:
        keys, file = shared[0], io.BytesIO()
        written = envelope.seal(file, FIELDS, pieces, keys)
        assert opened(file.getvalue(), keys) == b"".join(pieces)
        assert written == envelope.verify(file, keys)
        assert written.content_hash == envelope.content_hash(file)
        assert written.size_bytes == len(file.getvalue())

    @pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
    def test_a_chunk_is_full_unless_it_is_the_last(self, shared: tuple[Keys, bytes], size: int) -> None:
        keys, payload = shared[0], bytes(size)
        chunks = [bytes(c) for c in envelope.open_sealed(io.BytesIO(sealed(keys, payload)), keys).chunks()]
        assert b"".join(chunks) == payload
        assert len(chunks) == max(1, -(-size // CHUNK))
        assert all(len(chunk) == CHUNK for chunk in chunks[:-1])

    def test_nothing_at_all_is_sealed_too(self, keys: Keys) -> None:
        file = io.BytesIO()
        envelope.seal(file, FIELDS, [], keys)
        assert opened(file.getvalue(), keys) == b""

    def test_the_real_chunk_size_holds_across_its_border(self, keys: Keys, real_chunks: None) -> None:
        payload = bytes(range(256)) * (envelope.CHUNK // 256) + b"more"
        data = sealed(keys, payload)
        assert opened(data, keys) == payload
        assert fields_of(data)["chunk"] == 4 * 1024 * 1024
        assert len(split(data)[2]) == len(payload) + 2 * TAG

    def test_tensors_of_any_shape_are_pieces(self, keys: Keys) -> None:
        arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 4)), np.float64([1.5])]
        file = io.BytesIO()
        envelope.seal(file, FIELDS, [memoryview(array) for array in arrays], keys)
        assert opened(file.getvalue(), keys) == b"".join(array.tobytes() for array in arrays)

    def test_a_piece_may_be_reused_once_the_next_is_asked_for(self, keys: Keys) -> None:
        def reusing() -> Iterator[bytearray]:
            buffer = bytearray(CHUNK)
            for value in range(5):
                buffer[:] = bytes([value]) * CHUNK
                yield buffer

        file = io.BytesIO()
        envelope.seal(file, FIELDS, reusing(), keys)
        assert opened(file.getvalue(), keys) == b"".join(bytes([value]) * CHUNK for value in range(5))

    @given(st.integers(0, len(PAYLOAD)), st.lists(st.integers(0, 3 * CHUNK), max_size=5))
    @settings(max_examples=40)
    def test_buffers_of_any_size_are_filled_from_any_place(
        self, shared: tuple[Keys, bytes], at: int, sizes: list[int]
    ) -> None:
        keys, data = shared
        wanted, buffers = memoryview(PAYLOAD)[at:], []
        for size in sizes:
            buffers.append(memoryview(bytearray(min(size, len(wanted) - sum(map(len, buffers))))))
        envelope.open_sealed(io.BytesIO(data), keys).fill(at, buffers)
        assert b"".join(buffers) == wanted[: sum(map(len, buffers))]

    def test_chunks_can_be_read_again_from_the_beginning(self, shared: tuple[Keys, bytes]) -> None:
        keys, data = shared
        reader = envelope.open_sealed(io.BytesIO(data), keys)
        next(reader.chunks())
        assert b"".join(map(bytes, reader.chunks())) == b"".join(map(bytes, reader.chunks())) == PAYLOAD

    def test_files_that_take_and_give_a_little_at_a_time_lose_nothing(self, keys: Keys) -> None:
        class Reluctant(io.BytesIO):
            def write(self, data: Any, /) -> int:
                return super().write(memoryview(data)[:7])

            def read(self, size: int | None = -1, /) -> bytes:
                return super().read(7 if size is None or size < 0 else min(size, 7))

        file = Reluctant()
        envelope.seal(file, FIELDS, [PAYLOAD], keys)
        assert b"".join(map(bytes, envelope.open_sealed(file, keys).chunks())) == PAYLOAD

    def test_memory_does_not_grow_with_the_size(self, keys: Keys, tmp_path: Path, real_chunks: None) -> None:
        piece = bytes(envelope.CHUNK - 1)
        tracemalloc.start()
        try:
            with (tmp_path / "file").open("w+b") as file:
                envelope.seal(file, FIELDS, (piece for _ in range(12)), keys)
                envelope.verify(file, keys)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 5 * envelope.CHUNK

    def test_two_seals_of_the_same_content_have_nothing_in_common(self, shared: tuple[Keys, bytes]) -> None:
        keys, data = shared
        again = sealed(keys)
        assert not set(blocks(data)) & set(blocks(again))
        assert fields_of(data)["nonce_prefix"] != fields_of(again)["nonce_prefix"]


class TestTheLayoutIsTheDocumentedOne:
    def test_a_reader_written_from_the_design_opens_it(self, keys: Keys, tmp_path: Path) -> None:
        data = sealed(keys)
        root = base64.b64decode(
            json.loads((tmp_path / "keys" / "local-keys.json").read_text())["keys"][0]["root"]
        )

        def hkdf(secret: bytes, info: bytes) -> bytes:
            return HKDF(SHA256(), 32, salt=None, info=info).derive(secret)

        size = int.from_bytes(data[5:9], "big")
        header, slot, body = json.loads(data[9 : 9 + size]), data[9 + size :][:4096], data[9 + size + 4096 :]
        (stanza,) = json.loads(slot[4 : 4 + int.from_bytes(slot[:4], "big")])
        dek = aes_key_unwrap(hkdf(root, b"TSNB1/kek/local"), bytes.fromhex(stanza["wrapped"]))
        mac = hmac.digest(hkdf(dek, b"TSNB1/header"), data[: 9 + size + 4096 - 32], "sha256")
        prefix, aad = bytes.fromhex(header["nonce_prefix"]), hashlib.sha256(data[: 9 + size]).digest()
        cipher, pieces = (
            AESGCM(hkdf(dek, b"TSNB1/payload")),
            [body[at : at + 80] for at in range(0, len(body), 80)],
        )
        chunks = [
            cipher.decrypt(prefix + n.to_bytes(4, "big") + bytes([n == len(pieces) - 1]), piece, aad)
            for n, piece in enumerate(pieces)
        ]
        assert slot[-32:] == mac
        assert b"".join(chunks) == PAYLOAD
        assert header == FIELDS | {
            "suite": "AES256GCM-STREAM",
            "chunk": CHUNK,
            "nonce_prefix": header["nonce_prefix"],
        }
        assert (
            envelope.content_hash(io.BytesIO(data))
            == f"sha256:{hashlib.sha256(data[: 9 + size] + body).hexdigest()}"
        )

    def test_a_file_written_by_the_first_version_still_opens(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_chunks: None
    ) -> None:
        monkeypatch.setenv("TENSAFE_KEK", base64.b64encode(bytes(range(32))).decode())
        header = (
            b'{"artifact_id":"art-1","chunk":4194304,"ledger_head":null,"nonce_prefix":"fc2a7fe0690ce2",'
            b'"step":7,"suite":"AES256GCM-STREAM"}'
        )
        stanzas = (
            b'[{"kdf":{"name":"HKDF-SHA256"},"kek_id":"key-1df12d9f6b22ab93","source":"env","wrapped":'
            b'"f1051a5b1125dca0cd8d8c4522700166b7ec0552147b7cf019986cdec787488032745ad120f4ca85"}]'
        )
        mac = "dfd55a956aa9f01d033adfad1c0f78fef682288814876e777cd8968fc8a0701a"
        body = "53fd76045bc1fd6217a150a5b90efbf73ccdf3d98a6ea8597aa78034ab35d5cd43"
        slot = (struct.pack(">I", len(stanzas)) + stanzas).ljust(4064, b"\0") + bytes.fromhex(mac)
        data = b"TSNB\x01" + struct.pack(">I", len(header)) + header + slot + bytes.fromhex(body)
        assert opened(data, Keys(tmp_path)) == b"the first version"

    def test_the_header_reads_without_a_key(self, shared: tuple[Keys, bytes]) -> None:
        header = envelope.read_header(io.BytesIO(shared[1]))
        assert FIELDS.items() <= header.fields.items()
        assert header.key_id == shared[0].primary_id()

    def test_nothing_secret_is_in_a_repr(self, shared: tuple[Keys, bytes]) -> None:
        keys, data = shared
        reader = envelope.open_sealed(io.BytesIO(data), keys)
        data_key = keys.unwrap(reader.header.stanzas)
        assert data_key.hex() not in repr(reader) + repr(keys)
        assert repr(data_key) not in repr(reader) + repr(keys)


class TestWhatWasChangedIsRefused:
    @given(st.data())
    @settings(max_examples=150)
    def test_a_flipped_bit_anywhere(self, shared: tuple[Keys, bytes], data: st.DataObject) -> None:
        keys, original = shared
        at = data.draw(st.integers(0, 8 * len(original) - 1), label="bit")
        changed = bytearray(original)
        changed[at // 8] ^= 1 << at % 8
        refuses(bytes(changed), keys)

    def test_any_byte_of_header_stanza_mac_body_and_tags(self, shared: tuple[Keys, bytes]) -> None:
        keys, original = shared
        prefix, slot, _ = split(original)
        padding_from = len(prefix) + 4 + int.from_bytes(slot[:4], "big")
        padding = range(padding_from + 1, len(prefix) + SLOT - MAC - 1)
        for at in set(range(len(original))) - set(padding):
            refuses(original[:at] + bytes([original[at] ^ 0x10]) + original[at + 1 :], keys)

    def test_any_cut(self, shared: tuple[Keys, bytes]) -> None:
        keys, original = shared
        prefix, _, body = split(original)
        lengths = {*range(len(prefix) + 8), *range(len(original) - len(body) - 8, len(original))}
        for length in lengths:
            refuses(original[:length], keys)

    def test_the_last_chunk_cut(self, shared: tuple[Keys, bytes]) -> None:
        refuses(with_blocks(shared[1], blocks(shared[1])[:-1]), shared[0])

    @pytest.mark.parametrize("dropped", range(5))
    def test_a_chunk_dropped(self, shared: tuple[Keys, bytes], dropped: int) -> None:
        changed = blocks(shared[1])
        del changed[dropped]
        refuses(with_blocks(shared[1], changed), shared[0])

    @pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 3), (0, 4), (3, 4)])
    def test_two_chunks_swapped(self, shared: tuple[Keys, bytes], one: int, other: int) -> None:
        changed = blocks(shared[1])
        changed[one], changed[other] = changed[other], changed[one]
        refuses(with_blocks(shared[1], changed), shared[0])

    @pytest.mark.parametrize("more", [1, TAG, TAG + 1, BLOCK, 3 * BLOCK])
    def test_bytes_behind_the_end(self, shared: tuple[Keys, bytes], more: int) -> None:
        refuses(shared[1] + bytes(more), shared[0])

    @pytest.mark.parametrize("replayed", range(5))
    def test_a_chunk_replayed_behind_the_end(self, shared: tuple[Keys, bytes], replayed: int) -> None:
        refuses(shared[1] + blocks(shared[1])[replayed], shared[0])

    def test_an_empty_chunk_put_at_the_end_even_by_one_who_has_the_key(
        self, shared: tuple[Keys, bytes]
    ) -> None:
        keys, data = shared
        prefix, slot, _ = split(data)
        writer = envelope.ChunkCipher(
            keys.unwrap(stanzas_of(data)), bytes.fromhex(fields_of(data)["nonce_prefix"]), prefix
        )
        chunks = enumerate((PAYLOAD[:CHUNK], b""))
        body = b"".join(bytes(writer.seal(c, n, n == 1, bytearray(CHUNK + 16))) for n, c in chunks)
        refuses(prefix + slot + body, keys)

    @pytest.mark.parametrize(
        "change", [{"step": 8}, {"ledger_head": None}, {"artifact_id": "art-2"}, {"x": 1}]
    )
    def test_a_header_edited(self, shared: tuple[Keys, bytes], change: dict[str, Any]) -> None:
        keys, data = shared
        changed = with_header(data, canonical(fields_of(data) | change))
        envelope.read_header(io.BytesIO(changed))  # well-formed: only the MAC tells
        refuses(changed, keys)

    def test_the_header_of_one_artifact_on_the_body_of_another(self, shared: tuple[Keys, bytes]) -> None:
        keys, data = shared
        other = sealed(keys, PAYLOAD, FIELDS | {"artifact_id": "art-2"})
        prefix, slot, _ = split(other)
        refuses(prefix + slot + split(data)[2], keys)
        refuses(prefix + split(data)[1] + split(data)[2], keys)
        refuses(split(data)[0] + slot + split(data)[2], keys)

    def test_a_pickle(self, keys: Keys, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
                return Path.touch, (tmp_path / "sprung",)

        structure_refused(pickle.dumps(Trap()))
        with pytest.raises(DecryptionError):
            envelope.open_sealed(io.BytesIO(pickle.dumps(Trap())), keys)
        assert not (tmp_path / "sprung").exists()


class TestStanzas:
    def test_one_edited_without_the_data_key(self, shared: tuple[Keys, bytes]) -> None:
        keys, data = shared
        for change in ({"source": "env"}, {"wrapped": "00" * 40}, {"kek_id": "key-0000000000000000"}):
            changed = with_stanzas(data, canonical([stanzas_of(data)[0] | change]))
            envelope.read_header(io.BytesIO(changed))
            refuses(changed, keys)

    def test_one_added_without_the_data_key(self, shared: tuple[Keys, bytes], tmp_path: Path) -> None:
        keys, data = shared
        stranger = Keys(tmp_path, announce=lambda _: None).wrap(bytes(32))
        refuses(with_stanzas(data, canonical([*stanzas_of(data), stranger])), keys)
        refuses(with_stanzas(data, canonical([stranger, *stanzas_of(data)])), keys)

    def test_one_removed_without_the_data_key(self, shared: tuple[Keys, bytes], tmp_path: Path) -> None:
        keys, data = shared
        other = Keys(tmp_path, announce=lambda _: None)
        mine = stanzas_of(data)
        both = resealed(data, keys, [*mine, other.wrap(keys.unwrap(mine))])
        assert opened(both, keys) == opened(both, other) == PAYLOAD
        refuses(with_stanzas(both, canonical(mine)), keys)

    def test_a_key_id_borrowed_from_another_key_does_not_open(
        self, shared: tuple[Keys, bytes], tmp_path: Path
    ) -> None:
        _, data = shared
        other = Keys(tmp_path, announce=lambda _: None)
        changed = with_stanzas(data, canonical([stanzas_of(data)[0] | {"kek_id": other.primary_id()}]))
        with pytest.raises(DecryptionError) as raised:
            opened(changed, other)
        assert str(raised.value) == REFUSED and type(raised.value) is DecryptionError

    @pytest.mark.parametrize("count", [0, 9])
    def test_none_or_too_many(self, shared: tuple[Keys, bytes], count: int) -> None:
        structure_refused(with_stanzas(shared[1], canonical(stanzas_of(shared[1]) * count)))

    @pytest.mark.parametrize("text", [b"{}", b"1", b"[1]", b"[[]]", b'["stanza"]', b"null", b""])
    def test_what_is_no_stanza(self, shared: tuple[Keys, bytes], text: bytes) -> None:
        structure_refused(with_stanzas(shared[1], text))

    @pytest.mark.parametrize(
        "change",
        [
            {"kdf": {"name": "MD5"}},
            {"kdf": None},
            {"wrapped": "no hex"},
            {"wrapped": None},
            {"kek_id": 7},
            {"kek_id": "k" * 65},
            {"source": "thin air"},
            {"comment": "hello"},
        ],
    )
    def test_a_stanza_of_another_form(self, shared: tuple[Keys, bytes], change: dict[str, Any]) -> None:
        structure_refused(with_stanzas(shared[1], canonical([stanzas_of(shared[1])[0] | change])))

    @pytest.mark.parametrize(
        "change",
        [
            {"n": 2**21},
            {"r": 17},
            {"p": 5},
            {"n": 3000},
            {"n": 0},
            {"n": True},
            {"r": 8.0},
            {"p": -1},
            {"salt": "00"},
            {"salt": None},
            {"name": "argon2id"},
            {"more": 1},
        ],
    )
    def test_key_derivation_beyond_the_caps_is_never_begun(
        self,
        shared: tuple[Keys, bytes],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        change: dict[str, Any],
    ) -> None:
        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("scrypt was called")

        monkeypatch.setattr(sources, "Scrypt", never)
        kdf = {"name": "scrypt", "salt": "00" * 16, "n": 2**14, "r": 8, "p": 1} | change
        stanza = stanzas_of(shared[1])[0] | {"source": "passphrase", "kdf": kdf}
        changed = with_stanzas(shared[1], canonical([stanza]))
        structure_refused(changed)
        refuses(changed, Keys(tmp_path, "passphrase", passphrase="secret"))


class TestForm:
    def test_another_magic_or_version(self, shared: tuple[Keys, bytes]) -> None:
        structure_refused(b"TSNB\x02" + shared[1][5:])
        structure_refused(b"PK\x03\x04\x01" + shared[1][5:])
        structure_refused(b"")

    @pytest.mark.parametrize(
        "change",
        [
            {"suite": "AES128GCM-STREAM"},
            {"suite": None},
            {"chunk": 2 * CHUNK},
            {"chunk": 0},
            {"nonce_prefix": "00"},
            {"nonce_prefix": "AB" * 7},
            {"nonce_prefix": None},
        ],
    )
    def test_an_unknown_suite_chunk_or_nonce(
        self, shared: tuple[Keys, bytes], change: dict[str, Any]
    ) -> None:
        structure_refused(with_header(shared[1], canonical(fields_of(shared[1]) | change)))

    def test_a_header_that_is_no_mapping(self, shared: tuple[Keys, bytes]) -> None:
        for text in (b"[]", b"1", b"null", b"", b"\xff", b"[" * 50_000, b"NaN", b"1e999"):
            structure_refused(with_header(shared[1], text))

    def test_a_header_beyond_its_limit(self, shared: tuple[Keys, bytes]) -> None:
        fields = fields_of(shared[1]) | {"note": ""}
        room = envelope.MAX_HEADER - len(canonical(fields))
        at_limit = with_header(shared[1], canonical(fields | {"note": "x" * room}))
        assert envelope.read_header(io.BytesIO(at_limit)).fields["step"] == 7
        structure_refused(with_header(shared[1], canonical(fields | {"note": "x" * (room + 1)})))
        structure_refused(MAGIC + b"\xff\xff\xff\xff" + shared[1][9:])

    def test_stanzas_beyond_the_slot(self, shared: tuple[Keys, bytes]) -> None:
        text = canonical(stanzas_of(shared[1]))
        structure_refused(with_stanzas(shared[1], text, length=SLOT - MAC - 3))
        structure_refused(with_stanzas(shared[1], text, length=2**32 - 1))

    def test_padding_that_is_not_zero(self, shared: tuple[Keys, bytes]) -> None:
        prefix, slot, body = split(shared[1])
        for at in (4 + int.from_bytes(slot[:4], "big"), SLOT - MAC - 1):
            structure_refused(prefix + slot[:at] + b"\x01" + slot[at + 1 :] + body)

    def test_json_that_is_not_canonical(self, shared: tuple[Keys, bytes]) -> None:
        fields, stanzas = fields_of(shared[1]), stanzas_of(shared[1])
        structure_refused(with_header(shared[1], json.dumps(fields, ensure_ascii=False).encode()))
        structure_refused(with_header(shared[1], canonical(fields).replace("ö".encode(), rb"\u00f6")))
        structure_refused(with_stanzas(shared[1], json.dumps(stanzas).encode()))

    def test_duplicate_json_keys(self, shared: tuple[Keys, bytes]) -> None:
        header, stanzas = canonical(fields_of(shared[1])), canonical(stanzas_of(shared[1]))
        structure_refused(with_header(shared[1], header[:-1] + b',"suite":"AES256GCM-STREAM"}'))
        structure_refused(with_header(shared[1], header.replace(b'"step":7', b'"step":7,"step":7')))
        structure_refused(with_stanzas(shared[1], stanzas.replace(b'"source"', b'"source":"env","source"')))

    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
            ),
            max_leaves=8,
        )
    )
    @settings(max_examples=60)
    def test_canonical_json_reads_back_as_it_was(self, value: Any) -> None:
        assert parse_canonical(canonical(value)) == value

    @pytest.mark.parametrize("value", [float("nan"), object(), "\ud800", {(1, 2): 3}, b"bytes"])
    def test_what_is_not_json_cannot_be_written(self, value: Any) -> None:
        with pytest.raises(ValidationError, match="JSON"):
            canonical(value)

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"suite": "x"}, "suite"),
            ({"nonce_prefix": "x", "chunk": 1}, "chunk, nonce_prefix"),
            ({"note": "x" * 70_000}, "at most 65536 bytes"),
            ({"steps": {2: "a", 10: "b"}}, "texts"),
            ({"loss": float("nan")}, "JSON"),
        ],
    )
    def test_a_header_that_could_not_be_read_back_is_refused_before_anything_is_written(
        self, keys: Keys, fields: dict[str, Any], says: str
    ) -> None:
        file = io.BytesIO()
        with pytest.raises(ValidationError, match=says):
            envelope.seal(file, fields, [PAYLOAD], keys)
        assert file.getvalue() == b""


class TestKeysOfAFile:
    def test_another_key_is_named_and_does_not_open(self, shared: tuple[Keys, bytes], tmp_path: Path) -> None:
        with pytest.raises(KeyUnavailableError, match=shared[0].primary_id()) as raised:
            opened(shared[1], Keys(tmp_path, announce=lambda _: None))
        assert raised.value.details["key_ids"] == [shared[0].primary_id()]

    def test_rewrapping_changes_the_slot_and_nothing_else(self, keys: Keys) -> None:
        file = io.BytesIO(sealed(keys))
        before, data = envelope.verify(file, keys), file.getvalue()
        new = keys.new().key_id
        envelope.write_slot(file, envelope.rewrapped_slot(file, keys))
        after = envelope.verify(file, keys)
        assert (after.content_hash, after.size_bytes) == (before.content_hash, before.size_bytes)
        assert after.key_id == new != before.key_id
        assert split(file.getvalue())[::2] == split(data)[::2]
        assert opened(file.getvalue(), keys) == PAYLOAD

    def test_the_old_key_alone_does_not_open_what_was_rewrapped(self, keys: Keys, tmp_path: Path) -> None:
        file = io.BytesIO(sealed(keys))
        shutil.copytree(tmp_path / "keys", tmp_path / "stolen")
        thief = Keys(tmp_path / "stolen", announce=lambda _: None)
        assert opened(file.getvalue(), thief) == PAYLOAD
        new = keys.new().key_id
        envelope.write_slot(file, envelope.rewrapped_slot(file, keys))
        with pytest.raises(KeyUnavailableError, match=new):
            opened(file.getvalue(), thief)

    def test_an_altered_slot_is_not_rewrapped(self, shared: tuple[Keys, bytes]) -> None:
        keys, data = shared
        changed = with_header(data, canonical(fields_of(data) | {"step": 8}))
        with pytest.raises(DecryptionError):
            envelope.rewrapped_slot(io.BytesIO(changed), keys)

    def test_a_slot_torn_by_a_crash_is_put_right(self, shared: tuple[Keys, bytes]) -> None:
        keys, data = shared
        prefix, slot, body = split(data)
        torn = io.BytesIO(prefix + slot[:100] + bytes(SLOT - 100) + body)
        structure_refused(torn.getvalue())
        envelope.write_slot(torn, slot)
        assert torn.getvalue() == data
        assert opened(torn.getvalue(), keys) == PAYLOAD

    def test_a_slot_goes_only_into_a_sealed_file_and_only_whole(self, shared: tuple[Keys, bytes]) -> None:
        file: BinaryIO = io.BytesIO(b"something else entirely")
        with pytest.raises(DecryptionError):
            envelope.write_slot(file, bytes(SLOT))
        with pytest.raises(ValidationError, match="4096"):
            envelope.write_slot(io.BytesIO(shared[1]), b"short")
