"""How well the held-out text is predicted without a neural network, in bits per byte.

Two yardsticks that every reader can place: ``gzip -9``, which sees the held-out text alone, and a byte 5-gram model
with interpolated Kneser-Ney smoothing, which learns from the same training text as the model it stands beside.
"""

import gzip
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from paceline.errors import DataError

Grams: TypeAlias = NDArray[np.uint64]

_DISCOUNT = (
    0.75  # Kneser-Ney's usual fixed discount; estimated from counts of counts it was no better on Python sources
)
_MAX_ORDER = 8  # bytes in a uint64


def gzip_bits_per_byte(text: bytes) -> float:
    """Size of ``gzip -9`` of the text, header included, in bits per byte of the text."""
    _not_empty(text, "the held-out text")
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


def ngram_bits_per_byte(train: bytes, held_out: bytes, order: int = 5) -> float:
    """Mean bits to code a byte of ``held_out`` with a byte n-gram model of ``train``.

    ``order`` 5 means 5-grams: each byte is predicted from up to four bytes before it. The first bytes of the text are
    predicted as if NUL bytes stood before them.
    """
    _not_empty(train, "the training text")
    _not_empty(held_out, "the held-out text")
    return float(-np.log2(ByteNgram(train, order).probabilities(grams_of(held_out, order))).mean())


def grams_of(text: bytes, order: int) -> Grams:
    """(len(text),): the n-gram that ends at each byte, packed with that byte lowest and the oldest byte highest."""
    padded = np.frombuffer(bytes(order - 1) + text, dtype=np.uint8)
    grams = padded[order - 1 :].astype(np.uint64)
    for back in range(1, order):
        grams |= padded[order - 1 - back : len(padded) - back].astype(np.uint64) << np.uint64(8 * back)
    return grams


class ByteNgram:
    """An interpolated Kneser-Ney model of bytes (Chen and Goodman 1999, equation 4.35, with one fixed discount).

    The longest grams count how often they occur, shorter ones how many different bytes stand before them. The shortest
    level falls back to 1/256 for each byte, so no byte is impossible and the probabilities of all 256 sum to one.
    Takes about 40 bytes of memory for each byte of ``train`` while it counts.
    """

    def __init__(self, train: bytes, order: int = 5) -> None:
        assert 1 <= order <= _MAX_ORDER, f"order={order}"
        grams, counts = np.unique(grams_of(train, order), return_counts=True)
        levels = [_Level.of(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Without its oldest, highest byte; every distinct longer gram counts once.
            grams, counts = np.unique(grams & np.uint64((1 << 8 * length) - 1), return_counts=True)
            levels.append(_Level.of(grams, counts))
        self._levels = levels[::-1]

    def probabilities(self, grams: Grams) -> NDArray[np.float64]:
        """(n,): the probability of each gram's last byte after the bytes before it; ``grams`` as from ``grams_of``."""
        p = np.full(len(grams), 1 / 256)
        for length, level in enumerate(self._levels, start=1):
            p = level.refine(grams & np.uint64((1 << 8 * length) - 1), p)
        return p


@dataclass(frozen=True, slots=True)
class _Level:
    """Counts of the grams of one length, sorted, and of the contexts they share."""

    grams: Grams
    counts: NDArray[np.int64]
    contexts: Grams
    totals: NDArray[np.int64]
    """Sum of the counts in each context."""
    followers: NDArray[np.int64]
    """Number of different bytes seen in each context."""

    @classmethod
    def of(cls, grams: Grams, counts: NDArray[np.int64]) -> "_Level":
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        followers = np.diff(first, append=len(grams))
        return cls(grams, counts, contexts, np.add.reduceat(counts, first), followers)

    def refine(self, grams: Grams, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mix what is known after the longer context with the probability after the shorter one."""
        counts = _lookup(self.grams, self.counts, grams)
        context = grams >> np.uint64(8)
        totals = _lookup(self.contexts, self.totals, context)
        followers = _lookup(self.contexts, self.followers, context)
        mixed = (np.maximum(counts - _DISCOUNT, 0) + _DISCOUNT * followers * shorter) / np.maximum(totals, 1)
        return np.where(totals > 0, mixed, shorter)


def _lookup(keys: Grams, values: NDArray[np.int64], wanted: Grams) -> NDArray[np.int64]:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _not_empty(text: bytes, what: str) -> None:
    if not text:
        raise DataError(f"{what} is empty: there is nothing to compare with; expected at least one byte")
