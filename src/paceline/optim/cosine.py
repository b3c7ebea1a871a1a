"""Warm-up, then half a cosine down (Loshchilov & Hutter 2017, arXiv 1608.03983, one cycle)."""

import math

from paceline.optim.warmup import Warmup


class Cosine(Warmup):
    """factor = final + (1 - final) (1 + cos(pi t)) / 2; t is the share of the steps after the warm-up that is done."""

    def factor(self, step: int, steps: int) -> float:
        """What the peak rate is multiplied by in step ``step`` (1-based) of ``steps``."""
        rise, done = self.split(step, steps)
        return rise * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)
