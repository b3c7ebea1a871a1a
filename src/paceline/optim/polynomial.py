"""Warm-up, then a power of what is left (as BERT's code and DeepLab have it; Chen et al. 2017, arXiv 1606.00915)."""

import math

from paceline.config import Positive
from paceline.optim.warmup import Falling


class Polynomial(Falling):
    """A power of the share of the run that is left; power 1 is ``linear``.

    factor = final + (1 - final) (1 - t)^power
    """

    power: Positive = 2.0
    """Above 1 the rate falls soon, below 1 late."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, done = self.split(step, steps)
        left = math.pow(1 - done, self.power)
        return rise * (self.final + (1 - self.final) * left)
