"""Warm-up, then the same share less in every step."""

import math

from paceline.config import Share
from paceline.optim.warmup import Warmup


class Exponential(Warmup):
    """The same share less in every step, so that the last one has ``final``.

    factor = final^t
    """

    final: Share = 0.1
    """The factor in the last step."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, done = self.split(step, steps)
        return rise * math.pow(self.final, done)
