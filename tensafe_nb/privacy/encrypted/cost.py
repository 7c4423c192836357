"""What an encrypted call will cost, before its keys are made: counts by formula, times what one of each takes here."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import Any

import numpy as np

from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy.encrypted.client import steps_of
from tensafe_nb.privacy.encrypted.packing import MOST_TOKENS, PackingPlan, Shape, best_plan, packings_of
from tensafe_nb.privacy.encrypted.parameters import Parameters, parameters_named
from tensafe_nb.privacy.encrypted.scheme import Arithmetic, dump, scheme_of

RELATIVE_ERROR = 1e-5  # what the tests hold; usually it is below 1e-6
REPEATS = 5


@dataclass(frozen=True, slots=True)
class HECost:
    """An estimate of one call, or of one token of it; nothing was encrypted.

    Attributes:
        tokens: Of the call.
        packing: How many share a ciphertext.
        client_ms: To encrypt and to decrypt, in CPU time of one core of this machine.
        server_ms: To apply the adapter, once it is encoded, likewise.
        encoding_ms: To encode the adapter for this packing, at its first call.
        upload_kb: Of the request.
        download_kb: Of the reply.
        galois_mb: Of the bundle with the rotation keys, once for a connection.
        rotations: Of ciphertexts, on the server.
        multiplications: Of ciphertexts with plaintexts, on the server.
        relative_error: The bound: of the result, against the largest entry of its token.
    """

    tokens: float
    packing: int
    client_ms: float
    server_ms: float
    encoding_ms: float
    upload_kb: float
    download_kb: float
    galois_mb: float
    rotations: float
    multiplications: float
    relative_error: float = RELATIVE_ERROR

    @property
    def per_token(self) -> "HECost":
        """What grows with the tokens, divided by them."""
        shared = (
            "client_ms",
            "server_ms",
            "upload_kb",
            "download_kb",
            "rotations",
            "multiplications",
            "tokens",
        )
        return replace(self, **{name: getattr(self, name) / self.tokens for name in shared})

    def __str__(self) -> str:
        one = self.per_token
        return (
            f"estimate for {self.tokens:g} token(s), {self.packing} a ciphertext: server {self.server_ms:.0f} ms "
            f"({one.server_ms:.2f} a token), client {self.client_ms:.0f} ms, up {self.upload_kb:,.0f} kB "
            f"({one.upload_kb:.0f} a token), down {self.download_kb:,.0f} kB ({one.download_kb:.0f} a token); once: "
            f"keys {self.galois_mb:.1f} MB, encoding {self.encoding_ms:.0f} ms; {self.rotations:g} rotations, "
            f"{self.multiplications:g} multiplications"
        )


def estimate(
    shape: tuple[int, int, int], tokens: int, params: str = "n8192-d2", *, packing: int | str = "auto"
) -> HECost:
    """Estimate what an encrypted call costs on this machine.

    The first estimate for a parameter set times each operation, in about a tenth of a second of CPU.

    Args:
        shape: (d_in, d_out, rank) of the adapter.
        tokens: Of one call.
        params: Name of the parameter set.
        packing: "auto", or 1, 8, 64 or 512, as `tokens` of `HEClient`.

    Raises:
        ValidationError: An argument does not fit.
        EncryptionContextError: No such parameter set, or tenseal is not installed.

    Example:
        >>> print(estimate((576, 576, 8), tokens=64))
    """
    if type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS:
        raise ValidationError(f"One call takes 1 to {MOST_TOKENS} tokens, not {tokens!r}.")
    parameters, packings, of = parameters_named(params, "lora"), packings_of(packing), Shape.of(shape)
    plan = best_plan(of, tokens, packings, parameters)
    each, blocks = primitives(parameters), ceil(tokens / plan.tokens)
    return HECost(
        tokens=tokens,
        packing=plan.tokens,
        client_ms=blocks * (plan.inputs * each.encrypt + plan.outputs * each.decrypt),
        server_ms=blocks * _server_ms(plan, each),
        encoding_ms=plan.multiplications * each.encode,
        upload_kb=blocks * plan.inputs * each.request_bytes / 1e3,
        download_kb=blocks * plan.outputs * each.reply_bytes / 1e3,
        galois_mb=len(steps_of(of, packings, parameters)) * each.key_bytes / 1e6,
        rotations=blocks * plan.rotations,
        multiplications=blocks * plan.multiplications,
    )


def estimate_all(
    shapes: Sequence[tuple[int, int, int]], tokens: int, params: str, *, packing: int | str = "auto"
) -> HECost:
    """Estimate what one pass through several adapters costs, one after the other; those of one shape share keys."""
    costs = [estimate(shape, tokens, params, packing=packing) for shape in shapes]
    keys = dict(zip(shapes, (cost.galois_mb for cost in costs), strict=True))
    adds_up = (
        "client_ms",
        "server_ms",
        "encoding_ms",
        "upload_kb",
        "download_kb",
        "rotations",
        "multiplications",
    )
    sums = {name: sum(getattr(cost, name) for cost in costs) for name in adds_up}
    return replace(costs[0], galois_mb=sum(keys.values()), **sums)


@dataclass(frozen=True, slots=True)
class Primitives:
    """Milliseconds of one operation of each kind, by level where it matters, and bytes of one part of each kind."""

    encrypt: float
    decrypt: float
    encode: float
    load: float
    dump: float
    rotate: tuple[float, float, float]
    multiply: tuple[float, float]  # and add
    rescale: tuple[float, float]
    request_bytes: int
    reply_bytes: int
    key_bytes: int


def _server_ms(plan: PackingPlan, each: Primitives) -> float:
    return (
        sum(n * ms for n, ms in zip(plan.rotations_by_level, each.rotate, strict=True))
        + sum(n * ms for n, ms in zip(plan.multiplications_by_level, each.multiply, strict=True))
        + plan.chunks * each.rescale[0]
        + plan.outputs * (each.rescale[1] + each.dump)
        + plan.inputs * each.load
    )


@functools.cache
def primitives(parameters: Parameters) -> Primitives:
    """Time one of each operation, with keys that are thrown away."""
    scheme = scheme_of(parameters)
    seal, slots = scheme.seal, np.cos(np.arange(parameters.slots))
    generator = seal.KeyGenerator(scheme.context)
    secret = generator.secret_key()
    encryptor, decryptor = seal.Encryptor(scheme.context, secret), seal.Decryptor(scheme.context, secret)
    key = dump(generator.create_galois_keys([scheme.element(1)]))
    do = Arithmetic(scheme, scheme.galois_keys(key, [1]))

    def encrypted() -> bytes:
        return dump(encryptor.encrypt_symmetric(scheme.encode(slots, 0, parameters.scale)))

    request = encrypted()
    levels = [scheme.ciphertext(request, 0)]
    products, plains = [], []
    for level in (0, 1):
        plains.append(scheme.encode(slots, level, scheme.primes[-1 - level]))
        products.append(do.add_product(None, levels[level], plains[level]))
        levels.append(do.rescaled(products[level]))
    reply = dump(levels[2])

    def decrypted() -> Any:
        plain = seal.Plaintext()
        decryptor.decrypt(scheme.ciphertext(reply, 2), plain)
        return scheme.decode(plain)

    rotate = [_ms(functools.partial(do.rotated, level, 1)) for level in levels]
    multiply = [
        _ms(functools.partial(do.add_product, products[level], levels[level], plains[level]))
        for level in (0, 1)
    ]
    rescale = [_ms(functools.partial(do.rescaled, product)) for product in products]
    return Primitives(
        encrypt=_ms(encrypted),
        decrypt=_ms(decrypted),
        encode=_ms(lambda: scheme.encode(slots, 0, scheme.primes[-1])),
        load=_ms(lambda: scheme.ciphertext(request, 0)),
        dump=_ms(lambda: dump(levels[2])),
        rotate=(rotate[0], rotate[1], rotate[2]),
        multiply=(multiply[0], multiply[1]),
        rescale=(rescale[0], rescale[1]),
        request_bytes=len(request),
        reply_bytes=len(reply),
        key_bytes=len(key),
    )


def _ms(action: Callable[[], object]) -> float:
    action()
    taken = []
    for _ in range(REPEATS):
        started = time.thread_time()  # of this thread alone: what others do to the machine is not in it
        action()
        taken.append(1e3 * (time.thread_time() - started))
    return median(taken)
