"""Cosine with warm restarts (SGDR; Loshchilov & Hutter 2017, arXiv 1608.03983)."""

import math

from paceline.config import Fraction
from paceline.optim.cycles import Cycles


class CosineRestarts(Cycles):
    """Half a cosine from the peak to ``final``, again and again; one cycle is ``cosine``.

    factor = final + (1 - final) shrink^c (1 + cos(pi u)) / 2, in cycle c = 0, 1, ... of which the share u is done
    """

    final: Fraction = 0.1
    """The factor in the last step of a cycle."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, _ = self.split(step, steps)
        if rise < 1.0:
            return rise
        cycle, done = self.within(step, steps)
        return self.final + (1 - self.final) * self.shrink**cycle * (1 + math.cos(math.pi * max(0.0, done))) / 2
