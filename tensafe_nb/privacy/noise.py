"""Gaussian noise nobody can foresee: a ChaCha20 keystream under a fresh key, and no seed that would repeat it.

Box-Muller in float64 from the keystream, four draws added and halved (Holohan and Braghin 2021, arXiv:2107.10138): two
pairs, each cos 2πu + sin 2πu = √2 sin(2πu + π/4), which takes one sine, of an angle that is uniform as u is.
Whoever adds it has to add in float64 and round once, into the type of what is released: noise that is rounded to
float32 before it is added leaves low bits of the sum readable (Mironov 2012, "On significance of the least significant
bits for differential privacy", CCS 2012, doi:10.1145/2382196.2382264).

That is hardening, no proof. The noise is still drawn from the finitely many values of float64, so that epsilon, which
is computed for real numbers, holds up to rounding of the order of 2^-53.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Tensor

NAME = "ChaCha20 under os.urandom, Box-Muller in float64, four draws halved"
VERSION = 1
PIECE = 2**14  # values made at a time: 512 KiB of keystream, which stay in a core's cache
_MANTISSA = (1 << 53) - 1
NoiseSource: TypeAlias = Callable[[Sequence[Tensor], float], list[Tensor]]


def gaussian(like: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
    """Return independent N(0, standard_deviation²) noise in the shapes, types and places of some tensors.

    One call is one draw: a private step makes exactly one.
    """
    count = sum(tensor.numel() for tensor in like)
    flat = torch.empty(count, dtype=torch.float64)
    # a fresh key each time, so that the nonce may be zero and no two draws share a keystream
    stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    fill_with_normals(flat, stream, standard_deviation)
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.reshape(t.shape).to(t.device, t.dtype) for part, t in zip(parts, like, strict=True)]


def fill_with_normals(flat: Tensor, stream: CipherContext, deviation: float) -> None:
    """Write N(0, deviation²) into float64 (count,): of each value half the sum of four, which are two Box-Muller pairs.

    One pair is √(-2 log u₁) · (cos 2πu₂, sin 2πu₂), and half its sum √(-log u₁) sin 2πu₃, where u₃ = u₂ + 1/8 is as
    uniform on the circle as u₂. Each value takes 32 bytes of keystream: u₁ and u₃ of two pairs.
    """
    most = min(PIECE, len(flat))
    zeros, keystream = bytes(32 * most), bytearray(32 * most)  # what is encrypted, and the bare stream
    bits, uniform = torch.frombuffer(keystream, dtype=torch.int64), torch.empty(4 * most, dtype=torch.float64)
    for piece in torch.split(flat, PIECE):
        count = len(piece)
        stream.update_into(memoryview(zeros)[: 32 * count], keystream)
        # 1 to 2^53: 53 bits are all that float64 holds, and log of 0 is left out
        bits[: 2 * count].bitwise_and_(_MANTISSA).add_(1)
        uniform[: 4 * count].copy_(bits[: 4 * count])
        radius, angle = uniform[: 2 * count].mul_(2.0**-53), uniform[2 * count : 4 * count]
        same = radius.numpy()  # NumPy's log and root take half of the time of torch's
        np.log(same, out=same)
        np.sqrt(np.negative(same, out=same), out=same)
        radius.mul_(angle.mul_(2 * math.pi * 2.0**-64).sin_())  # all 64 bits, as a number from -2^63 on
        torch.add(*radius.view(2, count), out=piece).mul_(deviation)
