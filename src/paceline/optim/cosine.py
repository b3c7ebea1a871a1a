"""Warm-up, then half a cosine down (Loshchilov & Hutter 2017, arXiv 1608.03983, one cycle)."""

import math

from paceline.optim.warmup import Falling


class Cosine(Falling):
    """Half a cosine from the peak to ``final``.

    factor = final + (1 - final) (1 + cos(pi t)) / 2
    """

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, done = self.split(step, steps)
        return rise * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)
