"""Warm-up, then the inverse square root of the step (Vaswani et al. 2017, arXiv 1706.03762, equation 3)."""

import math

from paceline.optim.warmup import Warmup


class InverseSqrt(Warmup):
    """Falls with the square root of the steps, without knowing where the run ends (but for a default warm-up).

    factor = min(s / w, sqrt(w / s)), with w at least 1
    """

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        warmup = max(1.0, self.warmup(steps))
        return min(step / warmup, math.sqrt(warmup / step))
