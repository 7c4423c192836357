"""What a client decrypts is the adapter's product, and the server could not have read it."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensafe_nb.errors import EncryptionContextError, ValidationError
from tensafe_nb.privacy.encrypted import THREAT_MODEL, HEClient, HEServer
from tensafe_nb.privacy.encrypted.packing import best_plan
from tensafe_nb.privacy.encrypted.parameters import ALLOWED, Parameters
from tensafe_nb.privacy.encrypted.scheme import Scheme, dump, scheme_of
from tests.unit.privacy.encrypted.halves import (
    SHAPE,
    activations,
    adapter,
    at_hand,
    connected,
    error,
    in_clear,
)

BOUND = 1e-5


@pytest.mark.parametrize("shape", [(64, 64, 1), (48, 100, 3), (96, 64, 64), (130, 33, 12)])
def test_the_product_is_that_of_the_clear_adapter_in_every_packing(shape: tuple[int, int, int]) -> None:
    client, server = connected(shape)
    for tokens in (1, 8, 64, 100):
        x = activations(tokens, shape[0])
        delta = client.decrypt(server.apply(client.encrypt(x)))
        assert delta.shape == (tokens, shape[1])
        assert error(delta, in_clear(adapter(*shape), x)) <= BOUND, tokens


@pytest.mark.parametrize("packing", [1, 8, 64, 512])
def test_each_packing_alone_takes_the_operations_that_its_formula_says(packing: int) -> None:
    client, server = connected((72, 80, 6), tokens=packing)
    tokens = packing + 1
    plan = best_plan(client.shape, tokens, client.packings, client.parameters)
    assert plan.tokens == packing
    x = activations(tokens, 72)
    delta = client.decrypt(server.apply(client.encrypt(x)))
    assert error(delta, in_clear(adapter(72, 80, 6), x)) <= BOUND
    done = server.counts
    assert done.rotations == 2 * plan.rotations
    assert done.multiplications == 2 * plan.multiplications
    assert done.rescales == 2 * plan.rescales


def test_a_width_at_which_the_librarys_own_product_is_silently_wrong() -> None:
    shape = (576, 3600, 4)  # TenSEAL's matmul: error 1.35 where in + out > slots + 1
    client, server = connected(shape, tokens=1)
    x = activations(1, 576)
    assert error(client.decrypt(server.apply(client.encrypt(x))), in_clear(adapter(*shape), x)) <= BOUND


def test_outliers_and_quiet_tokens_in_one_ciphertext_keep_their_digits() -> None:
    client, server = at_hand()
    x = activations(8, SHAPE[0])
    x[0, 5], x[1], x[2] = 3000.0, x[1] * 1e-6, x[2] * 1e3
    delta = client.decrypt(server.apply(client.encrypt(x)))
    assert error(delta, in_clear(adapter(*SHAPE), x)) <= BOUND


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
def test_faint_and_loud_adapters_keep_their_digits_and_do_not_wrap_around(size: float) -> None:
    a, b, scale = adapter(*SHAPE)
    client = HEClient(SHAPE, tokens=8)
    server = HEServer((a * size, b, scale), client.public_bundle())
    x = activations(3, SHAPE[0])
    assert error(client.decrypt(server.apply(client.encrypt(x))), in_clear((a * size, b, scale), x)) <= BOUND


def test_the_worst_activations_for_an_adapter_do_not_wrap_around() -> None:
    ones = np.ones((4, 96)), np.ones((40, 4)), 1.0
    client = HEClient((96, 40, 4), tokens=8)
    server = HEServer(ones, client.public_bundle())
    x = np.full((2, 96), 65_504.0)
    assert error(client.decrypt(server.apply(client.encrypt(x))), in_clear(ones, x)) <= BOUND


def test_an_adapter_that_is_zero_gives_zeros_and_so_do_zero_activations() -> None:
    a, b, _ = adapter(*SHAPE)
    client = HEClient(SHAPE, tokens=8)
    server = HEServer((a, 0 * b, 1.0), client.public_bundle())  # as LoRA begins
    assert not client.decrypt(server.apply(client.encrypt(activations(3, SHAPE[0])))).any()
    client, server = at_hand()
    assert np.abs(client.decrypt(server.apply(client.encrypt(np.zeros((2, SHAPE[0])))))).max() < 1e-6


def test_equal_activations_give_different_bytes() -> None:
    client, server = at_hand()
    x = activations(8, SHAPE[0])
    first, second = client.encrypt(x), client.encrypt(x)
    assert first[-20_000:-19_000] != second[-20_000:-19_000]
    for request in (first, second):
        client.decrypt(server.apply(request))


def test_the_server_holds_nothing_that_decrypts() -> None:
    client, server = connected(tokens=8)
    server.apply(client.encrypt(activations(1, SHAPE[0])))
    seal = scheme_of(client.parameters).seal
    able = (seal.SecretKey, seal.Decryptor, seal.KeyGenerator, seal.Encryptor)
    seen, ahead = set(), [vars(server)]
    while ahead:
        thing = ahead.pop()
        if id(thing) in seen or isinstance(thing, type | type(sys)) or callable(thing):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, able)
        ahead += gc.get_referents(thing)
        ahead += [vars(thing)] if hasattr(thing, "__dict__") else []
    assert len(seen) > 50, "the walk goes into the object"


def test_who_holds_the_bundle_and_the_request_decrypts_noise_with_any_key_of_their_own() -> None:
    client, _ = at_hand()
    scheme = scheme_of(client.parameters)
    x = activations(8, SHAPE[0])
    part = client._connection.open(client.encrypt(x), "request").parts[0]
    own = scheme.seal.KeyGenerator(scheme.context).secret_key()
    plain = scheme.seal.Plaintext()
    scheme.seal.Decryptor(scheme.context, own).decrypt(scheme.ciphertext(part, 0), plain)
    assert np.abs(scheme.decode(plain)).max() > 1e9, (
        "wrong keys give noise over the whole modulus, and no error"
    )


def test_no_secret_key_lies_in_the_bundle() -> None:
    client, _ = at_hand()
    secret = dump(client._generator.secret_key())
    bundle = client.public_bundle()
    assert all(secret[i : i + 32] not in bundle for i in range(200, len(secret) - 32, 997))


def test_a_server_that_came_to_hold_a_secret_key_refuses_to_be_one() -> None:
    client, server = connected(tokens=8)
    server._forgotten = client._decryptor  # type: ignore[attr-defined]
    with pytest.raises(EncryptionContextError, match="can decrypt"):
        server._refuse_secrets()


def test_another_clients_reply_and_another_connections_request_are_refused() -> None:
    (client, server), (other, others) = connected(tokens=8), connected(tokens=8)
    x = activations(1, SHAPE[0])
    with pytest.raises(EncryptionContextError, match="another connection"):
        server.apply(other.encrypt(x))
    client.encrypt(x)
    with pytest.raises(EncryptionContextError, match="another connection"):
        client.decrypt(others.apply(other.encrypt(x)))


def test_what_does_not_fit_is_refused_before_anything_is_encrypted() -> None:
    client, _ = at_hand()
    asked = client._sent
    for x, words in (
        (activations(3, 47), r"\(S, 48\)"),
        (activations(3, 48)[0], r"\(S, 48\)"),
        (np.empty((0, 48)), "1 to 4096 tokens"),
        (np.zeros((4097, 48)), "1 to 4096 tokens"),
        (np.full((1, 48), np.nan), "NaN"),
        (np.full((1, 48), np.inf), "NaN or infinite"),
        (np.full((1, 48), 1e5), "beyond the declared bound"),
        ([["a"] * 48], "numbers"),
        (object(), "numbers"),
    ):
        with pytest.raises(ValidationError, match=words):
            client.encrypt(x)
    assert client._sent == asked


@pytest.mark.parametrize("shape", [(0, 4, 1), (4, 4, 257), (16_385, 4, 1), (4.0, 4, 1), (True, 4, 1)])
def test_shapes_have_bounds(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValidationError, match="whole number from 1"):
        HEClient(shape)


def test_adapters_that_are_none_are_refused() -> None:
    bundle = at_hand()[0].public_bundle()
    a, b, _ = adapter(*SHAPE)
    for wrong, words in (
        ((a[0], b, 1.0), "matrix"),
        ((a * np.nan, b, 1.0), "finite"),
        ((a[:2], b, 1.0), "rank"),
        ((a, b, np.inf), "scale"),
        ((a, b * 1e300, 1e300), "not finite"),
        ((a, b, 1e-200), "too small"),
        (([["x"]], b, 1.0), "numbers"),
    ):
        with pytest.raises(ValidationError, match=words):
            HEServer(wrong, bundle)  # type: ignore[arg-type]
    with pytest.raises(EncryptionContextError, match="another adapter"):
        HEServer(adapter(48, 40, 5), bundle)


@pytest.mark.parametrize("name", ["n8192-d3", "n8192-sum", "", None, "N8192-D2"])
def test_parameters_are_chosen_by_a_name_on_the_list(name: str) -> None:
    with pytest.raises(EncryptionContextError, match="names no parameter set"):
        HEClient(SHAPE, params=name)


def test_no_set_on_the_list_and_none_that_could_come_on_it_is_weaker_than_it_says() -> None:
    allowed = {(8192, 128): 218, (16384, 256): 237}  # of homomorphicencryption.org, in bits of the modulus
    assert all(sum(p.bits) <= allowed[p.degree, p.security] for p in ALLOWED.values())
    with pytest.raises(EncryptionContextError, match="SEAL refuses"):
        Scheme(Parameters("weak", 8192, (60, 60, 60, 60), 2.0**40, 128, "lora"))


def test_tokens_name_a_packing() -> None:
    for wrong in (2, "all", 8.0, True):
        with pytest.raises(ValidationError, match="share a ciphertext"):
            HEClient(SHAPE, tokens=wrong)


def test_an_encoded_adapter_that_finds_no_room_is_encoded_each_time_with_the_same_result() -> None:
    shape = (96, 64, 64)
    client = HEClient(shape, tokens=64)
    server = HEServer(adapter(*shape), client.public_bundle(), cache_mb=0.5)
    for seed in (1, 2):
        x = activations(8, shape[0], seed)
        assert error(client.decrypt(server.apply(client.encrypt(x))), in_clear(adapter(*shape), x)) <= BOUND
    assert len(server._encoded[""]._kept) == 3 < server.counts.multiplications / 2


def test_where_files_in_memory_are_not_to_be_had_it_goes_through_a_folder_of_its_own_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client, server = connected(tokens=8)
    x = activations(8, SHAPE[0])
    assert error(client.decrypt(server.apply(client.encrypt(x))), in_clear(adapter(*SHAPE), x)) <= BOUND
    assert not list(tmp_path.iterdir())


def test_without_tenseal_nothing_is_computed_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    scheme_of.cache_clear()
    with pytest.raises(EncryptionContextError, match=r"needs tenseal.*pip install tenseal.*in clear"):
        HEClient(SHAPE)


def test_tenseal_and_torch_load_with_the_first_key_not_with_the_import() -> None:
    code = "import sys, tensafe_nb.privacy.encrypted; print({'tenseal', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_set_of_twice_the_degree_gives_the_same() -> None:
    client, server = connected((20, 24, 2), params="n16384-d2", tokens=64)
    x = activations(5, 20)
    assert error(client.decrypt(server.apply(client.encrypt(x))), in_clear(adapter(20, 24, 2), x)) <= BOUND


def test_reprs_show_no_secret_and_the_threat_model_says_who_is_not_stopped() -> None:
    client, server = at_hand()
    assert client._connection.secret.hex() not in repr(client) + repr(client._connection) + repr(server)
    for words in (
        "honest-but-curious",
        "malicious server",
        "IND-CPA-D",
        "basis vectors",
        "client is compromised",
    ):
        assert words in THREAT_MODEL


def test_numbers_come_in_whatever_holds_them() -> None:
    import torch

    client, server = at_hand()
    x = torch.randn(3, SHAPE[0], generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    exact = in_clear(adapter(*SHAPE), x.double().numpy())
    for given in (x, x.double().requires_grad_(), x.tolist(), x.double().numpy()):
        assert error(client.decrypt(server.apply(client.encrypt(given))), exact) <= BOUND
    a, b, scale = adapter(*SHAPE)
    tensors = torch.tensor(a, requires_grad=True), torch.tensor(b), np.float32(scale)
    assert HEServer(tensors, client.public_bundle()).shape == client.shape  # type: ignore[arg-type]


def test_what_a_newcomer_gives_by_mistake_is_answered_in_our_words() -> None:
    client, server = at_hand()
    bundle, (a, b, scale) = client.public_bundle(), adapter(*SHAPE)
    mistakes: list[tuple[Any, str]] = [
        (lambda: HEClient("48,40,4"), "d_in, d_out, rank"),
        (lambda: HEClient((48, 40)), "d_in, d_out, rank"),
        (lambda: HEClient(SHAPE, max_abs=float("nan")), "max_abs= is a positive number"),
        (lambda: HEClient(SHAPE, max_abs="big"), "max_abs= is a positive number"),
        (lambda: HEClient(SHAPE, tokens=8, keys="secret").public_bundle(), r"wrap\(\) and unwrap"),
        (lambda: HEServer((a, b, scale), bundle, keys="secret"), r"wrap\(\) and unwrap"),
        (lambda: HEServer((a, b), bundle), r"\(A, B, scale\).* this is a tuple"),
        (lambda: HEServer(None, bundle), r"\(A, B, scale\).* this is a None"),
        (lambda: HEServer((b, a, scale), bundle), "A is .rank, d_in"),
        (lambda: HEServer((a, b, "2"), bundle), "scale of an adapter is a number"),
        (lambda: HEServer((a, b, scale), bundle, cache_mb=-1), "megabytes"),
        (lambda: HEServer((a, b, scale), bundle, cache_mb="all"), "megabytes"),
        (lambda: client.encrypt(activations(1, 48) * 1j), "complex"),
        (lambda: client.encrypt(activations(3, 48).T), r"tokens and width, not \(48, 3\)"),
    ]
    for mistake, words in mistakes:
        with pytest.raises(ValidationError, match=words):
            mistake()
    for half in (client, server):
        for spread in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(ValidationError, match="neither copied nor pickled"):
                spread(half)
    assert HEClient(tuple(np.array(SHAPE)), tokens=8).shape == client.shape == HEClient(client.shape).shape  # type: ignore[arg-type]


class Stop(Exception):
    """Raised by who cancels."""


def test_each_half_can_be_stopped_between_ciphertexts_and_goes_on_afterwards() -> None:
    client, server = connected((48, 2048, 4), tokens=8)
    x = activations(40, 48)
    seen: list[tuple[int, int]] = []

    def tick(done: int, total: int) -> None:
        assert 0 <= done < total
        seen.append((done, total))

    def stop(done: int, total: int) -> None:
        if done:
            raise Stop

    request = client.encrypt(x, tick=tick)
    assert [done for done, _ in seen] == list(range(seen[0][1])), "of the ciphertexts that go"
    seen.clear()
    reply = server.apply(request, tick=tick)
    last, total = seen[-1]
    assert last == total - 1 > 8, "of the turns that the server takes"
    seen.clear()
    assert error(client.decrypt(reply, tick=tick), in_clear(adapter(48, 2048, 4), x)) <= BOUND
    assert len(seen) == seen[0][1] > 1

    for cancelled in ("encrypt", "apply", "decrypt"):
        asked, done = client._sent, server.counts.multiplications
        with pytest.raises(Stop):
            request = client.encrypt(x, tick=stop if cancelled == "encrypt" else tick)
            reply = server.apply(request, tick=stop if cancelled == "apply" else tick)
            client.decrypt(reply, tick=stop if cancelled == "decrypt" else tick)
        assert client._sent == asked + (cancelled != "encrypt"), "nothing was asked"
        spent = server.counts.multiplications - done
        assert (spent == 0) == (cancelled == "encrypt")
    delta = client.decrypt(server.apply(client.encrypt(x)))
    assert error(delta, in_clear(adapter(48, 2048, 4), x)) <= BOUND
