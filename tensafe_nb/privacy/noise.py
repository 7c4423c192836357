"""Gaussian noise nobody can foresee: a ChaCha20 keystream under a fresh key, and no seed that would repeat it.

Box-Muller in float64 from the keystream, four draws added and halved (Holohan and Braghin 2021, arXiv:2107.10138).
Whoever adds it has to add in float64 and round once, into the type of what is released: noise that is rounded to
float32 before it is added leaves low bits of the sum readable (Mironov 2012, "On significance of the least significant
bits for differential privacy", CCS 2012, doi:10.1145/2382196.2382264).

That is hardening, no proof. The noise is still drawn from the finitely many values of float64, so that epsilon, which
is computed for real numbers, holds up to rounding of the order of 2^-53.
"""

import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

NAME = "ChaCha20 under os.urandom, Box-Muller in float64, four draws halved"
VERSION = 1
PIECE = 2**18  # values made at a time: 8 MiB of keystream
_MANTISSA = (1 << 53) - 1
NoiseSource: TypeAlias = Callable[[Sequence[Tensor], float], list[Tensor]]


def gaussian(like: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
    """Return independent N(0, standard_deviation²) noise in the shapes, types and places of some tensors.

    One call is one draw: a private step makes exactly one.
    """
    count = sum(tensor.numel() for tensor in like)
    # a fresh key each time, so that the nonce may be zero and no two draws share a keystream
    stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    flat = torch.empty(count, dtype=torch.float64)
    for piece in torch.split(flat, PIECE):
        piece.copy_(standard_normals(stream.update, len(piece)))
    parts = torch.split(flat.mul_(standard_deviation), [tensor.numel() for tensor in like])
    return [part.reshape(t.shape).to(t.device, t.dtype) for part, t in zip(parts, like, strict=True)]


def standard_normals(keystream: Callable[[bytes], bytes], count: int) -> Tensor:
    """Return (count,) values of N(0, 1) in float64: half the sum of four, two Box-Muller pairs.

    One pair is √(-2 log u₁) · (cos 2πu₂, sin 2πu₂). Each value takes 32 bytes of keystream: u₁ and u₂ of two pairs.
    """
    bits = torch.frombuffer(bytearray(keystream(bytes(32 * count))), dtype=torch.int64)
    # in (0, 1]: 53 bits are all that float64 holds, and log of 0 is left out
    uniform = ((bits & _MANTISSA) + 1).to(torch.float64).mul_(2.0**-53).view(4, count)
    radius = uniform[:2].log_().mul_(-2.0).sqrt_()
    angle = uniform[2:].mul_(2 * torch.pi)
    return (radius * (angle.cos() + angle.sin_())).sum(0) / 2
