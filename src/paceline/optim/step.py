"""Warm-up, then stairs (as He et al. 2016, arXiv 1512.03385, divide the rate when learning slows down)."""

import math

from paceline.config import Count, Share
from paceline.optim.warmup import Warmup


class Step(Warmup):
    """Stairs: every so many steps the rate is multiplied by ``multiply``.

    factor = multiply^floor((s - w - 1) / every), for s > w
    """

    every: Count | None = None
    """Steps of one stair; default: three stairs from the end of the warm-up to that of the run."""
    multiply: Share = 0.1
    """The height of a stair over that of the one before."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        warmup = self.warmup(steps)
        if step <= warmup:
            return step / warmup
        stair = self.every or max(1.0, (steps - warmup) / 3)
        return self.multiply ** max(0, math.ceil((step - warmup) / stair - 1e-9) - 1)
