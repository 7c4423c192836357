"""The half that holds the adapter: it computes on ciphertexts that it cannot read."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf, log2
from typing import Any, NoReturn, TypeAlias

import numpy as np

from tensafe_nb.display import as_given, with_article
from tensafe_nb.errors import EncryptionContextError, ValidationError
from tensafe_nb.privacy.encrypted.client import LOUDEST, MOST_EXPONENT, steps_of
from tensafe_nb.privacy.encrypted.envelope import MOST_MESSAGE, KeySource, Message, open_bundle
from tensafe_nb.privacy.encrypted.packing import MOST_TOKENS, PACKINGS, PackingPlan, Shape, plan_of
from tensafe_nb.privacy.encrypted.parameters import parameters_named
from tensafe_nb.privacy.encrypted.scheme import (
    Arithmetic,
    Counts,
    Scheme,
    Tick,
    Vector,
    dump,
    no_tick,
    numbers,
    scheme_of,
    unshared,
)

# A result is read modulo the last prime, 60 bits, at a scale of 40: it has to stay below 2^19 in every slot.
MOST_RESULT = 2.0**18
Adapter: TypeAlias = tuple[Any, Any, float]


class HEServer:
    """Applies an adapter to encrypted activations. It holds no secret key, and cannot decrypt.

    Args:
        adapter: (A, B, scale), of (rank, d_in), (d_out, rank) and a number: x → scale · B (A x). Or several of one
            shape, by the names that requests give: those of several layers, for one set of keys.
        bundle: What `HEClient.public_bundle` returned.
        keys: Opens the key that authenticates the connection, if the client wrapped it.
        cache_mb: How much memory the encoded adapters may take; what finds no room is encoded at each call.

    Raises:
        ValidationError: An adapter is none, or they differ in shape.
        EncryptionContextError: The bundle is not whole, or is of another adapter's shape.

    Example:
        >>> server = HEServer((A, B, 2.0), bundle)
        >>> reply = server.apply(request)
    """

    def __init__(
        self,
        adapter: Adapter | Mapping[str, Adapter],
        bundle: bytes,
        *,
        keys: KeySource | None = None,
        cache_mb: float = 512,
    ) -> None:
        if isinstance(cache_mb, bool) or not isinstance(cache_mb, int | float) or not 0 <= cache_mb < inf:
            raise ValidationError(f"cache_mb= is a number of megabytes from 0, not {as_given(cache_mb)}.")
        self._room = int(cache_mb * 2**20)
        checked = {name: _checked(each) for name, each in _named(adapter).items()}
        self.shape = _shape_of(checked)
        self._connection, message = open_bundle(bundle, keys)
        self.parameters = parameters_named(message.fields.get("params"), "lora")
        self.packings = self._agreed(message)
        self._scheme = scheme_of(self.parameters)
        steps = steps_of(self.shape, self.packings, self.parameters)
        galois_keys = self._galois_keys(message, steps)
        self._arithmetic = Arithmetic(self._scheme, galois_keys)
        self._encoded = self._to_encode(checked)
        self._lock = threading.Lock()
        self._last = 0
        self._refuse_secrets()

    def __reduce__(self) -> NoReturn:
        unshared(
            "An HEServer",
            "each copy would take a message once. Make another from the adapter and a bundle.",
        )

    def __repr__(self) -> str:
        s = self.shape
        return f"HEServer({s.d_in} → r{s.rank} → {s.d_out}, {self.parameters.name}, holds no secret key)"

    @property
    def counts(self) -> Counts:
        """What was done to ciphertexts so far."""
        return self._arithmetic.counts

    @property
    def most_bytes(self) -> int:
        """No request of a client that keeps to the parameters is larger: what is need not be read."""
        whole = self.parameters.ciphertext_bytes(self.parameters.levels) + 4
        plans = [plan_of(self.shape, packing, self.parameters) for packing in self.packings]
        most = max(ceil(MOST_TOKENS / plan.tokens) * plan.inputs for plan in plans)
        return min(MOST_MESSAGE, 2**16 + most * whole)

    def replace(self, adapter: Adapter | Mapping[str, Adapter]) -> None:
        """Serve other weights from the next request on, under the same names and keys.

        Raises:
            ValidationError: They have another shape, or other names.
        """
        checked = {name: _checked(each) for name, each in _named(adapter).items()}
        with self._lock:
            if checked.keys() != self._encoded.keys() or _shape_of(checked) != self.shape:
                raise ValidationError(
                    "The new weights have another shape, or other names, than those served."
                )
            self._encoded = self._to_encode(checked)

    def _to_encode(self, checked: Mapping[str, Adapter]) -> "dict[str, EncodedAdapter]":
        room = Room(self._room)
        return {name: EncodedAdapter(self._scheme, *each, room) for name, each in checked.items()}

    def apply(self, request: bytes, *, tick: Tick = no_tick) -> bytes:
        """Return the reply to a request; each is taken once, and none behind a later one.

        Args:
            request: What `HEClient.encrypt` returned.
            tick: Called as `tick(done, total)` between ciphertexts. If it raises, the request has been used up.

        Raises:
            EncryptionContextError: It was altered, replayed or reordered, is too large, or of another shape.
        """
        with self._lock:
            message = self._connection.open(request, "request", most=self.most_bytes)
            if message.sequence <= self._last:
                raise EncryptionContextError(
                    f"Request {message.sequence} comes behind {self._last}: replayed or reordered. It was not used."
                )
            self._last = message.sequence
            packing = message.number("packing", 1, PACKINGS[-1])
            blocks = ceil(message.number("tokens", 1, MOST_TOKENS) / packing)
            if packing not in self.packings:
                raise EncryptionContextError(
                    f"The client's bundle has no keys for {packing} tokens in a ciphertext."
                )
            encoded = self._encoded.get(str(message.fields.get("adapter", "")))
            if encoded is None:
                raise EncryptionContextError(
                    "The request names an adapter that this connection does not serve."
                )
            plan = plan_of(self.shape, packing, self.parameters)
            if len(message.parts) != blocks * plan.inputs:
                raise EncryptionContextError(
                    f"The request has {len(message.parts)} ciphertexts; its tokens make {blocks * plan.inputs}."
                )
            # all of them are looked at before any is computed with
            turns = blocks * plan.chunks * (plan.turns_in + plan.turns_out)
            inputs = []
            for part in message.parts:
                tick(0, turns)
                inputs.append(self._scheme.ciphertext(part, 0))
            ahead = iter(range(turns))
            parts = [
                part
                for block in range(blocks)
                for part in self._applied(
                    encoded,
                    plan,
                    inputs[block * plan.inputs : (block + 1) * plan.inputs],
                    lambda: tick(next(ahead), turns),
                )
            ]
            return self._connection.seal("reply", message.sequence, {"exponent": encoded.exponent}, parts)

    def _applied(
        self, encoded: "EncodedAdapter", plan: PackingPlan, inputs: list[Any], turned: Callable[[], None]
    ) -> list[bytes]:
        do, outputs = self._arithmetic, [None] * plan.outputs
        for chunk in range(plan.chunks):
            w = None
            for turn in reversed(range(plan.turns_in)):  # Horner: w = x∘A_0 + rot(x∘A_1 + rot(x∘A_2 + …))
                turned()
                if w is not None:
                    w = do.rotated(w, plan.tokens)
                for which, x in enumerate(inputs):
                    w = do.add_product(w, x, encoded.a(plan, chunk, turn, which))
            if w is None:
                continue
            u = do.folded(do.rescaled(w), plan.sum_steps)
            for turn in range(plan.turns_out):
                turned()
                if turn:
                    u = do.rotated(u, plan.tokens)
                for which in range(plan.outputs):
                    outputs[which] = do.add_product(outputs[which], u, encoded.b(plan, chunk, turn, which))
        return [b"" if y is None else dump(do.folded(do.rescaled(y), plan.row_steps)) for y in outputs]

    def _agreed(self, message: Message) -> tuple[int, ...]:
        s, packings = self.shape, message.fields.get("packings")
        if message.fields.get("shape") != [s.d_in, s.d_out, s.rank]:
            raise EncryptionContextError(
                f"The bundle is for another adapter: this one takes ({s.d_in}, {s.d_out}, {s.rank}), width in, width "
                f"out and rank. Make the client with that shape."
            )
        known = isinstance(packings, list) and all(type(one) is int and one in PACKINGS for one in packings)
        if not known or not packings or packings != sorted(set(packings)):
            raise EncryptionContextError("The bundle names packings that this toolkit does not have.")
        return tuple(packings)

    def _galois_keys(self, message: Message, steps: list[int]) -> Any:
        if not steps and not message.parts:
            return self._scheme.seal.GaloisKeys()
        if len(message.parts) != 1 or len(message.parts[0]) > len(steps) * self.parameters.galois_key_bytes:
            raise EncryptionContextError("The bundle does not hold the rotation keys that its packings need.")
        return self._scheme.galois_keys(message.parts[0], steps)

    def _refuse_secrets(self) -> None:
        """Assert what this class promises, of everything that it holds.

        Raises:
            EncryptionContextError: There is something here that can decrypt.
        """
        seal = self._scheme.seal
        able = (seal.SecretKey, seal.Decryptor, seal.KeyGenerator, seal.Encryptor)
        holders = (self, self._arithmetic, self._scheme, *self._encoded.values())
        if any(isinstance(value, able) for holder in holders for value in vars(holder).values()):
            raise EncryptionContextError(
                "The server's side holds something that can decrypt. It must not be used."
            )


@dataclass(slots=True)
class Room:
    """How many bytes of encoded adapters there is still room for, of all adapters together."""

    left: int


class EncodedAdapter:
    """An adapter as plaintexts of the scheme, each encoded once as long as there is room.

    Attributes:
        exponent: Of the power of two that a result is to be multiplied with.
    """

    def __init__(self, scheme: Scheme, a: Vector, b: Vector, scale: float, room: Room) -> None:
        a, b, self.exponent = normalised(a, b, scale)
        self._scheme, self._matrices = scheme, (a, b)
        self._room = room
        self._kept: dict[tuple[int, int, int, int, int], Any | None] = {}

    def a(self, plan: PackingPlan, chunk: int, turn: int, which: int) -> Any | None:
        """Return A_t for an input ciphertext; None where all of it is zero."""
        return self._plain(0, plan, chunk, turn, which)

    def b(self, plan: PackingPlan, chunk: int, turn: int, which: int) -> Any | None:
        """Return B_t for an output ciphertext; None where all of it is zero."""
        return self._plain(1, plan, chunk, turn, which)

    def _plain(self, level: int, plan: PackingPlan, chunk: int, turn: int, which: int) -> Any | None:
        place = (plan.tokens, level, chunk, turn, which)
        if place in self._kept:
            return self._kept[place]
        lay = plan.diagonal_out if level else plan.diagonal_in
        # at the scale of the prime that the rescaling after it divides by: scales then come out as they were
        prime = self._scheme.primes[-1 - level]
        encoded = self._scheme.encode(lay(self._matrices[level], chunk, turn, which), level, prime)
        plain = None if encoded.is_zero() else encoded
        size = 8 * self._scheme.parameters.degree * (self._scheme.parameters.levels - level)
        if self._room.left >= size:
            self._room.left -= size
            self._kept[place] = plain
        return plain


def normalised(a: Vector, b: Vector, scale: float) -> tuple[Vector, Vector, int]:
    """Return A and B, both scaled by powers of two so that nothing is lost in rounding and no result wraps around.

    Returns:
        A' and B' with scale · B A = 2^exponent · B' A', and the exponent, which the reply tells.
    """
    if not np.isfinite(scale):
        raise ValidationError(f"The scale of the adapter is not a finite number: {scale!r}.")
    up_a = int(np.frexp(np.abs(a).max())[1])
    with np.errstate(over="ignore"):  # it is said below
        scaled = float(scale) * b
    if not np.isfinite(scaled).all():
        raise ValidationError(f"scale · B is not finite, with scale={scale!r}.")
    up_b = int(np.frexp(np.abs(scaled).max())[1])
    a, scaled = np.ldexp(a, -up_a), np.ldexp(scaled, -up_b)
    # what any slot can reach, those that nobody reads included: Σ_k |u_k| · max |B[·, k]|, with |x| < 2^LOUDEST
    most = 2.0**LOUDEST * float(np.abs(a).sum(axis=1) @ np.abs(scaled).max(axis=0))
    down = ceil(log2(most / MOST_RESULT)) if most else 0
    exponent = up_a + up_b + down
    if abs(exponent) > MOST_EXPONENT:
        raise ValidationError(
            f"The adapter's values are about 2^{exponent}: too large or too small to be one."
        )
    return a, np.ldexp(scaled, -down), exponent


def _matrix(name: str, values: Any) -> Vector:
    matrix = numbers(f"{name} of an encrypted adapter is a matrix of numbers", values)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValidationError(
            f"{name} of an encrypted adapter is a finite matrix, not of shape {matrix.shape}."
        )
    return matrix


def _named(adapter: Adapter | Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    return adapter if isinstance(adapter, Mapping) else {"": adapter}


def _checked(adapter: Adapter) -> tuple[Vector, Vector, float]:
    if not isinstance(adapter, tuple | list) or len(adapter) != 3:
        raise ValidationError(
            f"An adapter is (A, B, scale), of (rank, d_in), (d_out, rank) and a number, and this is "
            f"{with_article(type(adapter).__name__)}."
        )
    a, b, scale = adapter
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number):
        raise ValidationError(f"The scale of an adapter is a number, alpha / rank, not {as_given(scale)}.")
    a, b = _matrix("A", a), _matrix("B", b)
    if len(a) != b.shape[1]:
        raise ValidationError(f"A is (rank, d_in) and B (d_out, rank), not {a.shape} and {b.shape}.")
    return a, b, scale


def _shape_of(checked: Mapping[str, Adapter]) -> Shape:
    shapes = {(a.shape[1], b.shape[0], a.shape[0]) for a, b, _ in checked.values()}
    if len(shapes) != 1:
        raise ValidationError(f"Adapters that share keys have one shape, not {sorted(shapes)}.")
    return Shape(*shapes.pop())
