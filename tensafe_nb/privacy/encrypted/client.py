"""The half that holds the secret key: it encrypts activations, and decrypts what comes back."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, NoReturn

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import EncryptionContextError, ValidationError
from tensafe_nb.privacy.encrypted.envelope import MOST_MESSAGE, Connection, KeySource
from tensafe_nb.privacy.encrypted.packing import (
    MOST_TOKENS,
    PACKINGS,
    PackingPlan,
    Shape,
    best_plan,
    packings_of,
    plan_of,
)
from tensafe_nb.privacy.encrypted.parameters import Parameters, parameters_named
from tensafe_nb.privacy.encrypted.scheme import Tick, Vector, dump, no_tick, numbers, scheme_of, unshared

# A token's largest value is brought into [2^7, 2^8) before it is encrypted. A rotation adds noise of about 1e-6, since
# the prime for key switching is no larger than the first: what is rotated should be well above that.
LOUDEST = 8
MOST_EXPONENT = 512
MOST_WAITING = 256  # requests whose reply is still to come


@dataclass(frozen=True, slots=True)
class _Asked:
    plan: PackingPlan
    tokens: int
    exponents: Vector  # (tokens,): the power of two that each was multiplied with


class HEClient:
    """Encrypts activations for an adapter that somebody else holds. Its keys are fresh and are kept nowhere.

    Each token is scaled by a power of two of its own, so that neither an outlier nor a quiet token loses digits; the
    result comes within a relative error of 1e-5, measured against the longest entry of its token.

    Args:
        shape: (d_in, d_out, rank) of the adapter.
        params: Name of a parameter set: "n8192-d2", or "n16384-d2" for 256-bit security.
        tokens: "auto" for keys of all packings, or 1, 8, 64 or 512: how many tokens share a ciphertext. One packing
            alone needs fewer keys, and a smaller bundle.
        keys: Wraps the key that authenticates the connection; both halves then need the same source. Without one the
            bundle brings that key as it is, and belongs on a protected line, as a password does.
        max_abs: No activation may be larger; a larger one is a fault of the model, and is refused.

    Raises:
        ValidationError: An argument does not fit.
        EncryptionContextError: No such parameter set, or tenseal is not installed.

    Example:
        >>> client = HEClient((576, 576, 8))
        >>> server = HEServer((A, B, 2.0), client.public_bundle())
        >>> delta = client.decrypt(server.apply(client.encrypt(x)))  # every arrow is bytes
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        params: str = "n8192-d2",
        *,
        tokens: int | str = "auto",
        keys: KeySource | None = None,
        max_abs: float = 65_504.0,
    ) -> None:
        if isinstance(max_abs, bool) or not isinstance(max_abs, int | float) or not 0 < max_abs < inf:
            raise ValidationError(
                f"max_abs= is a positive number that no activation exceeds, not {as_given(max_abs)}."
            )
        self.shape = Shape.of(shape)
        self.parameters = parameters_named(params, "lora")
        self.packings = packings_of(tokens)
        self.max_abs = max_abs
        self._scheme = scheme_of(self.parameters)
        seal = self._scheme.seal
        self._generator = seal.KeyGenerator(self._scheme.context)
        secret = self._generator.secret_key()
        # with the secret key half of a ciphertext is a seed, and it is half as long
        self._encryptor = seal.Encryptor(self._scheme.context, secret)
        self._decryptor = seal.Decryptor(self._scheme.context, secret)
        self._keys = keys
        self._connection = Connection()
        self._lock = threading.Lock()
        self._sent = self._answered = 0
        self._waiting: OrderedDict[int, _Asked] = OrderedDict()

    def __reduce__(self) -> NoReturn:
        unshared(
            "An HEClient",
            "its secret key stays where it was made. Send public_bundle() and requests.",
        )

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"HEClient({s.d_in} → r{s.rank} → {s.d_out}, {self.parameters.name}, context {self.context[:8]}…)"
        )

    @property
    def context(self) -> str:
        """Names this connection; it is no secret."""
        return self._connection.context

    def public_bundle(self) -> bytes:
        """Return what a server needs: the rotation keys, and no secret key of the scheme."""
        s, scheme = self.shape, self._scheme
        steps = steps_of(s, self.packings, self.parameters)
        # SEAL takes automorphisms here, where rotations take steps
        elements = [scheme.element(step) for step in steps]
        parts = [dump(self._generator.create_galois_keys(elements))] if steps else []
        fields = {
            "params": self.parameters.name,
            "shape": [s.d_in, s.d_out, s.rank],
            "packings": list(self.packings),
        }
        return self._connection.bundle(fields, parts, self._keys)

    def encrypt(self, x: Any, adapter: str = "", *, tick: Tick = no_tick) -> bytes:
        """Encrypt (S, d_in) activations of S tokens, in as few ciphertexts as they cost least.

        Args:
            x: The activations.
            adapter: Its name, where the server holds several.
            tick: Called as `tick(done, total)` between ciphertexts. If it raises, nothing was asked.

        Raises:
            ValidationError: Another shape, values that are not finite or beyond `max_abs`, or too many tokens.
        """
        given = checked_activations(x, self.shape.d_in, self.max_abs, MOST_TOKENS)
        plan = best_plan(self.shape, len(given), self.packings, self.parameters)
        sent = upload_bytes(plan, len(given), self.parameters)
        if sent > MOST_MESSAGE:
            most = max(1, len(given) * MOST_MESSAGE // sent // plan.tokens * plan.tokens)
            raise ValidationError(
                f"{len(given)} tokens are too many for one message. Encrypt {most} at a time."
            )
        loudest = np.abs(given).max(axis=1)
        exponents = np.where(loudest > 0, LOUDEST - np.frexp(loudest)[1], 0)
        scaled = np.ldexp(given, exponents[:, None])
        parts: list[bytes] = []
        for start in range(0, len(scaled), plan.tokens):
            for slots in plan.packed(scaled[start : start + plan.tokens]):
                tick(len(parts), ceil(len(given) / plan.tokens) * plan.inputs)
                parts.append(self._encrypted(slots))
        with self._lock:
            if len(self._waiting) >= MOST_WAITING:
                raise ValidationError(
                    f"{MOST_WAITING} requests wait for their reply already. Decrypt those first."
                )
            self._sent += 1
            self._waiting[self._sent] = _Asked(plan, len(given), exponents)
            fields = {"tokens": len(given), "packing": plan.tokens} | (
                {"adapter": adapter} if adapter else {}
            )
            return self._connection.seal("request", self._sent, fields, parts)

    def decrypt(self, reply: bytes, *, tick: Tick = no_tick) -> Vector:
        """Return the (S, d_out) that a server computed; each reply once, in the order of the requests.

        A reply may be missing: those after it are taken, and it is refused when it comes late.

        Args:
            reply: What `HEServer.apply` returned.
            tick: Called as `tick(done, total)` between ciphertexts. If it raises, the reply has been used up.

        Raises:
            EncryptionContextError: It is not the reply to a request of this client that waits, or was altered.
        """
        message = self._connection.open(reply, "reply")
        with self._lock:
            asked = self._waiting.get(message.sequence)
            if asked is None:
                raise EncryptionContextError(
                    f"Reply {message.sequence} was decrypted before, came behind a later one, or answers nothing that "
                    f"was asked. It was not used."
                )
            plan, blocks = asked.plan, ceil(asked.tokens / asked.plan.tokens)
            if len(message.parts) != blocks * plan.outputs:
                raise EncryptionContextError(
                    "The reply has another number of ciphertexts than was asked for."
                )
            exponent = message.number("exponent", -MOST_EXPONENT, MOST_EXPONENT)
            while self._waiting and next(iter(self._waiting)) <= message.sequence:
                self._waiting.popitem(last=False)
        slots: list[Vector] = []
        for part in message.parts:
            tick(len(slots), len(message.parts))
            slots.append(self._decrypted(part))
        rounds = np.stack(slots).reshape(blocks, plan.outputs, plan.slots)
        y = np.concatenate([plan.unpacked(one) for one in rounds])[: asked.tokens]
        result: Vector = np.ldexp(y, exponent - asked.exponents[:, None])
        return result

    def _encrypted(self, slots: Vector) -> bytes:
        plain = self._scheme.encode(slots, 0, self.parameters.scale)
        return dump(self._encryptor.encrypt_symmetric(plain))

    def _decrypted(self, part: bytes | memoryview) -> Vector:
        if not part:  # the adapter is zero there
            return np.zeros(self.parameters.slots)
        plain = self._scheme.seal.Plaintext()
        self._decryptor.decrypt(self._scheme.ciphertext(part, self.parameters.levels - 1), plain)
        return self._scheme.decode(plain)


def checked_activations(x: Any, width: int, max_abs: float, most_tokens: int) -> Vector:
    """Return activations as they are encrypted.

    Raises:
        ValidationError: Another shape, values that are not finite or beyond a bound, or too many tokens.
    """
    given = numbers(f"Activations are numbers, (S, {width})", x)
    if given.ndim != 2 or given.shape[1] != width:
        raise ValidationError(f"Activations are (S, {width}), tokens and width, not {given.shape}.")
    if not 1 <= len(given) <= most_tokens:
        raise ValidationError(f"One call takes 1 to {most_tokens} tokens, not {len(given)}.")
    if not np.isfinite(given).all():
        raise ValidationError("An activation is NaN or infinite. Nothing was encrypted.")
    if (largest := np.abs(given).max()) > max_abs:
        raise ValidationError(
            f"An activation of {largest:.3g} lies beyond the declared bound max_abs={max_abs:g}."
        )
    return given


def steps_of(shape: Shape, packings: tuple[int, ...], parameters: Any) -> list[int]:
    """Return the rotations that a server of these packings takes: it gets a key for each, and for no other."""
    return sorted(set().union(*(plan_of(shape, packing, parameters).steps for packing in packings)))


def upload_bytes(plan: PackingPlan, tokens: int, parameters: Parameters) -> int:
    """Return how many bytes the ciphertexts of so many tokens have, at most: half of each is a seed."""
    return ceil(tokens / plan.tokens) * plan.inputs * parameters.ciphertext_bytes(parameters.levels) // 2


def tokens_at_once(shape: Shape, packings: tuple[int, ...], parameters: Parameters, most_bytes: int) -> int:
    """Return how many tokens to put into one message, as many as share a ciphertext if it is not too large then."""
    for tokens in PACKINGS[::-1]:
        plan = best_plan(shape, tokens, packings, parameters)
        if upload_bytes(plan, tokens, parameters) <= most_bytes:
            return tokens
    return 1
