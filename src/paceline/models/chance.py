"""Chance that follows from numbers, not from a stream: which elements dropout takes, what is rounded up.

A stream of random numbers gives each element what is next, so what an element gets depends on which others a rank
computes, and in what order. Here it depends on where the element stands alone: the numbers that say so (which step,
which sequence, which position, ...) are folded one after the other into a 64-bit key, and the last of them, the column,
is mixed in by a hash of few operations on 32 bits, for it is computed for every element.

``fold`` is element n of the generator SplitMix64 that starts at the key (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators", figure 16). The hash has the rounds and constants of lowbias32 (Wellons 2018,
"Prospecting for hash functions"), with the upper half of the key between its rounds and without the last shift, which
changes low bits only: a comparison hardly sees these, and who wants fewer bits takes the upper ones.
"""

from hashlib import blake2b

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_ROUND = (0x21F0AAAD, 0xD35A2D97 - (1 << 32))


def stream_seed(*parts: object) -> int:
    """A 63-bit number that is a function of ``parts`` alone."""
    digest = blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fold(key: Tensor | int, numbers: Tensor) -> Tensor:
    """A key for each of ``numbers`` under each of ``key``: int64, of the shape to which both are broadcast."""
    z = numbers * _GAMMA + key
    for shift, factor in zip((30, 27), _MIX, strict=True):
        z = (z ^ _shifted(z, shift, 64)) * factor
    return z ^ _shifted(z, 31, 64)


def taken(keys: Tensor, columns: Tensor, probability: float) -> Tensor:
    """Which elements dropout takes: bool (..., C), for ``keys`` (...) and ``columns`` (C,), both int64.

    True with ``probability``, rounded to a multiple of 2^-32, independently of all other keys and columns.
    """
    x = drawn(keys, columns)
    threshold = round(probability * (1 << 32)) - (1 << 31)
    return x < threshold if threshold < 1 << 31 else torch.ones_like(x, dtype=torch.bool)


def drawn(keys: Tensor, columns: Tensor) -> Tensor:
    """Numbers of all bits alike: int32 (..., C), for ``keys`` (...) and ``columns`` (C,), both int64.

    Each is drawn independently of those for all other keys and columns. The upper bits are the better ones.
    """
    low, high = keys.contiguous().unsqueeze(-1).view(torch.int32).unsqueeze(-2).unbind(-1)
    x = low ^ fold(0, columns).to(torch.int32)
    x ^= _shifted(x, 16, 32)
    x *= _ROUND[0]
    x ^= high
    x ^= _shifted(x, 15, 32)
    x *= _ROUND[1]
    return x


def _shifted(x: Tensor, by: int, bits: int) -> Tensor:
    """To the right, with zeros coming in: torch shifts signed integers only."""
    return (x >> by).bitwise_and_((1 << (bits - by)) - 1)
