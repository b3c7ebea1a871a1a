"""A keyed permutation of range(n) without a table: any element at once, in constant memory.

A Feistel network is a bijection of the 2**bits integers whatever its round function is. The smallest such range that
holds n is less than twice as large, and a value that lands outside range(n) is sent through again until it is inside
(cycle walking), which keeps the map a bijection of range(n). Black and Rogaway, "Ciphers with arbitrary finite domains"
(CT-RSA 2002). The result is part of a run's identity: it depends on no library's random numbers.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from paceline.data.rows import Ints

Key = tuple[int | str, ...]

LARGEST = 2**40
_ROUNDS = 6
_LEAST_BITS = 6  # with 4 some orders of a tiny range come twice as often as others; costs it a few more walks


class Permutation:
    """The permutation of range(n) named by ``key``, a tuple of ints and strings; 1 <= n <= 2**40."""

    def __init__(self, n: int, key: Key) -> None:
        assert 1 <= n <= LARGEST, n
        self.n = n
        bits = max((n - 1).bit_length(), _LEAST_BITS)
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = _round_keys(key)

    def __call__(self, index: Ints) -> Ints:
        """Images (k,) of ``index`` (k,), both int64 in range(n)."""
        value = self._scramble(index.astype(np.uint64))
        outside = np.flatnonzero(value >= self.n)
        while outside.size:
            value[outside] = self._scramble(value[outside])
            outside = outside[value[outside] >= self.n]
        return value.astype(np.int64)

    def _scramble(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = value >> self._low_bits, value & self._low_mask
        for even, odd in self._keys:
            high ^= _hash(low ^ even) & self._high_mask
            low ^= _hash(high ^ odd) & self._low_mask
        return high << self._low_bits | low


def _round_keys(key: Key) -> NDArray[np.uint64]:
    """(rounds / 2, 2) keys: BLAKE2b of the tuple's text, read as little-endian words on every machine."""
    text = repr(tuple(part if isinstance(part, str) else int(part) for part in key))
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS, person=b"paceline-order").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64).reshape(-1, 2)


def _hash(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), modulo 2**64."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
