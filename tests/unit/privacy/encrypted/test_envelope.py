"""What crosses between the halves: altered, replayed, reordered or oversize, it is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import EncryptionContextError, KeyUnavailableError
from tensafe_nb.privacy.encrypted import HEClient, HEServer
from tensafe_nb.privacy.encrypted.envelope import MAGIC, Connection, open_bundle
from tensafe_nb.privacy.encrypted.scheme import dump, scheme_of
from tensafe_nb.store.keys.keyring import Keys
from tests.unit.privacy.encrypted.halves import SHAPE, activations, adapter, at_hand, connected

X = activations(8, SHAPE[0])
WHOLE = Connection("0" * 32, bytes(32)).seal("request", 1, {"tokens": 8}, [b"one", b"", b"three"])


def test_an_envelope_opens_to_what_was_put_into_it() -> None:
    message = Connection("0" * 32, bytes(32)).open(WHOLE, "request")
    assert (message.sequence, list(message.parts), message.number("tokens", 1, 8)) == (
        1,
        [b"one", b"", b"three"],
        8,
    )


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(place: int, flip: int) -> None:
    changed = bytearray(WHOLE)
    changed[place] ^= flip
    with pytest.raises(EncryptionContextError):
        Connection("0" * 32, bytes(32)).open(bytes(changed), "request")


@given(st.integers(0, len(WHOLE) - 1), st.binary(max_size=8))
def test_what_was_cut_or_went_on_is_refused(end: int, more: bytes) -> None:
    for wrong in (WHOLE[:end] + more, WHOLE + more + b"\0"):
        if wrong != WHOLE:
            with pytest.raises(EncryptionContextError):
                Connection("0" * 32, bytes(32)).open(wrong, "request")


@settings(max_examples=100)
@given(
    st.binary(max_size=200),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=3), max_size=3),
)
def test_no_bundle_of_strangers_raises_anything_but_ours(noise: bytes, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    for wrong in (noise, MAGIC + noise, MAGIC + struct.pack(">I", len(text)) + text + noise + bytes(32)):
        with pytest.raises(EncryptionContextError):
            open_bundle(wrong, None)


def test_a_tampered_ciphertext_is_valid_to_the_scheme_and_refused_by_the_envelope() -> None:
    client, server = connected(tokens=8)
    request = client.encrypt(X)
    part = client._connection.open(request, "request").parts[0]
    scheme = scheme_of(client.parameters)
    loads = 0
    for place in range(5000, 5040):  # of bytes that compression covers, some still decompress
        changed = bytearray(part)
        changed[place] ^= 64
        try:
            read = scheme.ciphertext(bytes(changed), 0)
        except EncryptionContextError:
            continue
        loads += 1
        plain = scheme.seal.Plaintext()
        client._decryptor.decrypt(read, plain)
        assert np.abs(scheme.decode(plain)).max() > 1e6
    assert loads, "SEAL has no seal of its own"
    changed = bytearray(request)
    changed[len(request) // 2] ^= 64
    with pytest.raises(EncryptionContextError, match="altered"):
        server.apply(bytes(changed))
    client.decrypt(server.apply(request))  # nothing was used up by the other


def test_a_request_is_taken_once_and_none_behind_a_later_one() -> None:
    client, server = connected(tokens=8)
    first, second = client.encrypt(X), client.encrypt(X)
    server.apply(second)
    for late in (second, first):
        with pytest.raises(EncryptionContextError, match="replayed or reordered"):
            server.apply(late)


def test_a_reply_is_decrypted_once_and_none_behind_a_later_one() -> None:
    client, server = connected(tokens=8)
    replies = [server.apply(client.encrypt(X)) for _ in range(3)]
    client.decrypt(replies[1])
    for late in (replies[1], replies[0]):
        with pytest.raises(EncryptionContextError, match="decrypted before, came behind a later one"):
            client.decrypt(late)
    client.decrypt(replies[2])


def test_a_request_is_no_reply_and_a_reply_no_request() -> None:
    client, server = connected(tokens=8)
    request = client.encrypt(X)
    with pytest.raises(EncryptionContextError, match="no reply of this connection"):
        client.decrypt(request)
    with pytest.raises(EncryptionContextError, match="no request of this connection"):
        server.apply(server.apply(request))


def test_what_is_too_large_is_refused_before_it_is_looked_at() -> None:
    _, server = at_hand()
    with pytest.raises(EncryptionContextError, match=r"are the most .* was not parsed"):
        server.apply(bytes(server.most_bytes + 1))
    for wrong in (None, "text", bytearray(b"x"), 3):
        with pytest.raises(EncryptionContextError, match="exchange bytes"):
            server.apply(wrong)  # type: ignore[arg-type]


def hostile(client: HEClient, **changes: Any) -> bytes:
    """A request that only a client with the key of the connection can make."""
    whole = client._connection.open(client.encrypt(X), "request")
    fields = {"tokens": 8, "packing": 8} | {k: v for k, v in changes.items() if k != "parts"}
    return client._connection.seal("request", whole.sequence, fields, changes.get("parts", whole.parts))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 9}, "its tokens make"),
        ({"tokens": 4097}, "'tokens'"),
        ({"tokens": True}, "'tokens'"),
        ({"tokens": "8"}, "'tokens'"),
        ({"packing": 64}, "no keys for 64"),
        ({"packing": 3}, "no keys for 3"),
        ({"packing": 0}, "'packing'"),
        ({"parts": []}, "0 ciphertexts"),
        ({"parts": [b""]}, "what SEAL writes"),
        ({"parts": [b"not a ciphertext"]}, "what SEAL writes"),
        ({"parts": [bytes(400_000)]}, "are the most it may have"),
    ],
)
def test_a_client_with_the_key_cannot_make_the_server_do_what_is_not_agreed(
    changes: dict[str, Any], words: str
) -> None:
    client, server = at_hand()
    with pytest.raises(EncryptionContextError, match=words):
        server.apply(hostile(client, **changes))


def test_a_ciphertext_of_another_level_or_scale_is_refused() -> None:
    client, server = at_hand()
    scheme = scheme_of(client.parameters)
    reply = server.apply(client.encrypt(X))
    low = client._connection.open(reply, "reply").parts[0]
    plain = scheme.encode(np.ones(scheme.parameters.slots), 0, 2.0**30)
    other_scale = dump(client._encryptor.encrypt_symmetric(plain))
    for part in (low, other_scale):
        with pytest.raises(EncryptionContextError, match="another level, size or scale"):
            server.apply(hostile(client, parts=[part]))


def test_a_reply_of_another_shape_or_exponent_is_refused() -> None:
    client, server = connected(tokens=8)
    for fields, parts, words in (
        ({"exponent": 0}, [], "number of ciphertexts"),
        ({"exponent": 10_000}, [b""], "'exponent'"),
        ({}, [b""], "'exponent'"),
        ({"exponent": 0}, [b"junk"], "what SEAL writes"),
    ):
        client.encrypt(X)
        with pytest.raises(EncryptionContextError, match=words):
            client.decrypt(client._connection.seal("reply", client._sent, fields, parts))
    client.decrypt(server.apply(client.encrypt(X)))  # it lives on


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": "n8192-weak"}, "names no parameter set"),
        ({"params": [60, 60]}, "names no parameter set"),
        ({"params": "n16384-d2"}, "what SEAL writes|rotation keys"),
        ({"shape": [48, 40, 5]}, "another adapter"),
        ({"packings": [1, 8]}, "rotation keys"),
        ({"packings": [2]}, "packings"),
        ({"packings": []}, "packings"),
        ({"packings": [8, 8]}, "packings"),
        ({"packings": 8}, "packings"),
    ],
)
def test_a_bundle_brings_names_of_parameters_never_parameters(changes: dict[str, Any], words: str) -> None:
    client, _ = at_hand()
    connection, whole = open_bundle(client.public_bundle(), None)
    told = {name: whole.fields[name] for name in ("params", "shape", "packings")} | changes
    with pytest.raises(EncryptionContextError, match=words):
        HEServer(adapter(*SHAPE), connection.bundle(told, whole.parts, None))


def test_the_key_of_a_connection_goes_through_the_key_store_and_is_fresh_each_time(tmp_path: Path) -> None:
    keys = Keys(tmp_path, "file", announce=lambda _: None)
    client, server = connected(tokens=8, keys=keys)
    assert client.decrypt(server.apply(client.encrypt(X))).shape == (8, SHAPE[1])
    bundle = client.public_bundle()
    assert client._connection.secret.hex().encode() not in bundle
    another = HEClient(SHAPE, tokens=8, keys=keys)
    assert another.context != client.context and another._connection.secret != client._connection.secret
    with pytest.raises(EncryptionContextError, match="same key source"):
        HEServer(adapter(*SHAPE), bundle)
    with pytest.raises(EncryptionContextError, match="same key source"):
        HEServer(adapter(*SHAPE), at_hand()[0].public_bundle(), keys=keys)
    with pytest.raises(KeyUnavailableError):
        HEServer(adapter(*SHAPE), bundle, keys=Keys(tmp_path / "other", "file", announce=lambda _: None))


def test_a_connection_without_keys_in_the_bundle_is_none() -> None:
    for brought in ({}, {"fresh": "ab"}, {"fresh": 3}, {"fresh": "zz" * 32}, None, []):
        connection = Connection("0" * 32, bytes(32))
        bundle = connection.seal("bundle", 0, {"key": brought}, [])
        with pytest.raises(EncryptionContextError):
            open_bundle(bundle, None)
