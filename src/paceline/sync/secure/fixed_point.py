"""Real numbers as integers modulo 2^bits whose sum over some clients can be read.

    code    round(x steps) mod 2^bits, with x cut to [-most, most]
    sum     the representative of the sum in [-2^(bits-1), 2^(bits-1)), over steps

``steps`` is as large as it can be for the sum of ``clients`` not to leave that range.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.sync.secure.primitives import Words


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """How numbers are coded."""

    bits: int
    """Of the modulus, 32 at most."""
    most: float
    """Greatest absolute value; larger ones are cut."""
    clients: int
    """Terms of a sum."""

    @property
    def steps(self) -> float:
        """Codes of the numbers from 0 to 1."""
        return ((1 << (self.bits - 1)) - 1 - self.clients) / (self.clients * self.most)

    @property
    def mask(self) -> np.uint32:
        """What is kept of a word."""
        return np.uint32((1 << self.bits) - 1)

    def encode(self, values: NDArray[np.float64]) -> Words:
        """Codes; ``ValueError`` for what is not finite."""
        if not np.isfinite(values).all():
            raise ValueError("an update that is not finite has no code")
        codes = np.rint(np.clip(values, -self.most, self.most) * self.steps).astype(np.int64)
        return codes.astype(np.uint32) & self.mask

    def decode(self, total: Words) -> NDArray[np.float64]:
        """The sum that a sum of codes stands for."""
        signed = (total & self.mask).astype(np.int64)
        signed -= (signed >> (self.bits - 1)) << self.bits
        return signed / self.steps
