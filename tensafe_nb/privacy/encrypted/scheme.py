"""SEAL's CKKS through `tenseal.sealapi`: a context, what encodes, and bytes in and out. tenseal loads at first use.

SEAL 4 through TenSEAL's own vectors does one rotation for each row of a matrix; here rotations are ours to choose.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tensafe_nb.errors import EncryptionContextError, ValidationError
from tensafe_nb.privacy.encrypted.parameters import Parameters

Vector = NDArray[np.float64]
Tick = Callable[[int, int], None]  # told how much of how much is done; what it raises stops the call there
GENERATOR = 3  # of the rotations: one by `step` slots is the automorphism X → X^(3^step)
SCALE_SLACK = 1e-6  # how far a ciphertext's scale may lie from the declared one, as a ratio


def no_tick(done: int, total: int) -> None:
    """Report progress to nobody."""


def numbers(what: str, values: Any) -> Vector:
    """Return numbers as an array, whatever holds them: lists, arrays, tensors of torch of any type and device.

    Raises:
        ValidationError: They are none; begins with `what`.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    try:
        given = np.asarray(values)
        if given.dtype.kind == "c":
            raise TypeError("they are complex, and their second part would be lost")
        if given.dtype.kind not in "biuf":
            raise TypeError(f"they are of the type {given.dtype}")
        return given.astype(np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0].rstrip(".")
        raise ValidationError(f"{what}. These are not: {reason}.") from err


def unshared(what: str, instead: str) -> NoReturn:
    """Refuse to be copied or pickled.

    Raises:
        ValidationError: Always.
    """
    raise ValidationError(f"{what} is neither copied nor pickled: {instead}")


def library() -> Any:
    """Return `tenseal.sealapi`.

    Raises:
        EncryptionContextError: tenseal is not installed. Nothing is computed in clear instead.
    """
    try:
        from tenseal import sealapi
    except ImportError as err:
        raise EncryptionContextError(
            f"Encrypted computation needs tenseal, which cannot be imported ({err}). Install it: pip install tenseal. "
            f"Nothing is ever computed in clear instead."
        ) from err
    return sealapi


@functools.cache
def scheme_of(parameters: Parameters) -> "Scheme":
    """Return the context of a parameter set; it holds no key, and so one serves all."""
    return Scheme(parameters)


class Scheme:
    """The ring and its primes, and all that can be done without a key."""

    def __init__(self, parameters: Parameters) -> None:
        self.seal = seal = library()
        self.parameters = parameters
        asked = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        asked.set_poly_modulus_degree(parameters.degree)
        asked.set_coeff_modulus(seal.CoeffModulus.Create(parameters.degree, list(parameters.bits)))
        security = {128: seal.SEC_LEVEL_TYPE.TC128, 256: seal.SEC_LEVEL_TYPE.TC256}[parameters.security]
        self.context = seal.SEALContext(asked, True, security)
        if not self.context.parameters_set():
            raise EncryptionContextError(
                f"SEAL refuses {parameters.name}: {self.context.parameters_error_message()}"
            )
        self.encoder = seal.CKKSEncoder(self.context)
        self.levels: list[Any] = []  # ids from the fresh level down: all primes, then one less each
        data = self.context.first_context_data()
        self.primes = [float(modulus.value()) for modulus in data.parms().coeff_modulus()]
        while data is not None:
            self.levels.append(data.parms_id())
            data = data.next_context_data()

    def encode(self, values: Vector | NDArray[np.complex128], level: int, scale: float) -> Any:
        """Return the plaintext of (slots,) numbers for ciphertexts of this level, 0 being the fresh one."""
        plain = self.seal.Plaintext()
        self.encoder.encode(values.tolist(), self.levels[level], scale, plain)
        return plain

    def decode(self, plain: Any) -> Vector:
        return np.array(self.encoder.decode_double(plain))

    def decode_complex(self, plain: Any) -> NDArray[np.complex128]:
        return np.array(self.encoder.decode_complex(plain))

    def element(self, step: int) -> int:
        """Return the automorphism that rotates by so many slots to the left."""
        return pow(GENERATOR, step, 2 * self.parameters.degree)

    def ciphertext(self, data: bytes | memoryview, level: int) -> Any:
        """Read a ciphertext of another side, at the level and scale that it has to have.

        Raises:
            EncryptionContextError: It is something else.
        """
        most = self.parameters.ciphertext_bytes(self.parameters.levels - level)
        if len(data) > most:
            raise EncryptionContextError(
                f"A ciphertext has {len(data):,} bytes; {most:,} are the most it may have."
            )
        read = _read(self.seal.Ciphertext(), self.context, data)
        ratio = read.scale / self.parameters.scale
        if read.parms_id() != self.levels[level] or read.size() != 2 or abs(ratio - 1) > SCALE_SLACK:
            raise EncryptionContextError(
                "A ciphertext has another level, size or scale than it has to have. The other side runs another "
                "version of this toolkit, or is not to be trusted."
            )
        return read

    def secret_key(self, data: bytes) -> Any:
        """Read a secret key."""
        return _read(self.seal.SecretKey(), self.context, data)

    def galois_keys(self, data: bytes | memoryview, steps: Sequence[int]) -> Any:
        """Read the keys that rotate by these steps.

        Raises:
            EncryptionContextError: They are other keys, or none.
        """
        keys = _read(self.seal.GaloisKeys(), self.context, data)
        if keys.size() != len(steps) or not all(keys.has_key(self.element(step)) for step in steps):
            raise EncryptionContextError("The bundle does not hold the rotation keys that its packings need.")
        return keys


def _read(empty: Any, context: Any, data: bytes | memoryview) -> Any:
    with passage(data) as path:
        try:
            empty.load(context, path)  # SEAL checks sizes and values against the context
        except (RuntimeError, ValueError, OSError, MemoryError) as err:
            raise EncryptionContextError(f"A part of the message is not what SEAL writes ({err}).") from err
    return empty


def dump(written: Any) -> bytes:
    """Return the bytes of anything of SEAL's that has `save`."""
    with passage() as path:
        written.save(path)
        return Path(path).read_bytes()


@contextlib.contextmanager
def passage(data: bytes | memoryview = b"") -> Iterator[str]:
    """Lend a file with these bytes: sealapi reads and writes paths only. In memory on Linux, else in our own folder."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tensafe-seal", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, data)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="tensafe-seal-") as folder:
            path = Path(folder) / "blob"
            path.write_bytes(data)
            yield str(path)


@dataclass(slots=True)
class Counts:
    """What was done to ciphertexts."""

    rotations: int = 0
    multiplications: int = 0
    rescales: int = 0


class Arithmetic:
    """What a side without the secret key does, counted."""

    def __init__(self, scheme: Scheme, galois_keys: Any) -> None:
        self._seal = scheme.seal
        self._evaluator = scheme.seal.Evaluator(scheme.context)
        self._keys = galois_keys
        self._product = scheme.seal.Ciphertext()
        self.counts = Counts()

    def add_product(self, total: Any | None, factor: Any, plain: Any | None) -> Any | None:
        """Return total + factor · plain; None stands for zero, which SEAL does not hold as a ciphertext."""
        if plain is None:
            return total
        self.counts.multiplications += 1
        if total is None:
            total = self._seal.Ciphertext()
            self._evaluator.multiply_plain(factor, plain, total)
        else:
            self._evaluator.multiply_plain(factor, plain, self._product)
            self._evaluator.add_inplace(total, self._product)
        return total

    def rotated(self, ciphertext: Any, step: int) -> Any:
        """Return a ciphertext whose slot i is slot i + step of the given one."""
        self.counts.rotations += 1
        turned = self._seal.Ciphertext()
        self._evaluator.rotate_vector(ciphertext, step, self._keys, turned)
        return turned

    def folded(self, ciphertext: Any, steps: Sequence[int]) -> Any:
        """Add to a ciphertext what it is when rotated, step after step: log2(n) rotations sum n slots."""
        for step in steps:
            self._evaluator.add_inplace(ciphertext, self.rotated(ciphertext, step))
        return ciphertext

    def rescaled(self, ciphertext: Any) -> Any:
        """Return the ciphertext divided by its last prime, one level further down."""
        self.counts.rescales += 1
        lower = self._seal.Ciphertext()
        self._evaluator.rescale_to_next(ciphertext, lower)
        return lower

    def add(self, total: Any, more: Any) -> None:
        self._evaluator.add_inplace(total, more)
