"""The parameter sets there are. One is chosen by its name; nothing that a peer sends ever becomes a parameter."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from tensafe_nb.errors import EncryptionContextError, nearest


@dataclass(frozen=True, slots=True)
class Parameters:
    """One set of CKKS parameters.

    Attributes:
        name: What both sides call it.
        degree: N of the ring Z[X]/(X^N + 1); a ciphertext holds N/2 numbers.
        bits: Of the primes of the coefficient modulus; the last is for key switching alone.
        scale: What a number is multiplied with before it is rounded.
        security: Bits against the best known attacks on RLWE, by the tables of homomorphicencryption.org (2018), which
            SEAL checks.
        use: What it is for: "lora", two multiplications deep, or "sum", none.
    """

    name: str
    degree: int
    bits: tuple[int, ...]
    scale: float
    security: Literal[128, 256]
    use: Literal["lora", "sum"]

    @property
    def slots(self) -> int:
        return self.degree // 2

    @property
    def levels(self) -> int:
        """How many primes a fresh ciphertext has."""
        return len(self.bits) - 1

    def ciphertext_bytes(self, primes: int) -> int:
        """Return the most bytes that SEAL writes for a ciphertext: two polynomials of 64-bit words for each prime."""
        return 2 * primes * self.degree * 8 + SLACK

    @property
    def galois_key_bytes(self) -> int:
        """The most bytes of one key: a pair of polynomials over all primes, for each prime of the data."""
        return 2 * prod((self.levels, len(self.bits), self.degree, 8)) + SLACK


SLACK = 4096  # headers of SEAL's formats, and what compression adds to noise that cannot be compressed
ALLOWED = {
    parameters.name: parameters
    for parameters in (
        # 200 of the 218 bits that 128-bit security leaves at N = 8192
        Parameters("n8192-d2", 8192, (60, 40, 40, 60), 2.0**40, 128, "lora"),
        # the same depth with 256-bit security (237 bits are allowed), at twice the size and time of each ciphertext
        Parameters("n16384-d2", 16384, (60, 40, 40, 60), 2.0**40, 256, "lora"),
        Parameters("n8192-sum", 8192, (60, 60), 2.0**45, 128, "sum"),
    )
}


def parameters_named(name: object, use: Literal["lora", "sum"]) -> Parameters:
    """Return the set of this name.

    Raises:
        EncryptionContextError: There is none for this use.
    """
    for_use = {known for known, parameters in ALLOWED.items() if parameters.use == use}
    if not isinstance(name, str) or name not in for_use:
        raise EncryptionContextError(
            f"params={str(name)[:80]!r} names no parameter set of this toolkit.{nearest(str(name), for_use)} "
            f"Sets are chosen by name only, so that nobody can hand over weak ones."
        )
    return ALLOWED[name]
