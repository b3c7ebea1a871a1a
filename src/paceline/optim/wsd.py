"""Warm-up, a stable rate, then a decay (Hu et al. 2024, arXiv 2404.06395; its shape: Hägele et al., 2405.18392).

Until the decay begins nothing depends on where the run ends: it can be made longer from a checkpoint of that part, and
the decay tried from several.
"""

import math
from typing import Literal

from paceline.config import Share
from paceline.optim.warmup import Falling


class WarmupStableDecay(Falling):
    """The peak rate until shortly before the end, then a fall to ``final``.

    factor = 1, and in the last ``decay`` of the run final + (1 - final) shape(u), with u the share of the decay that is
    done: shape is 1 - sqrt(u), 1 - u or (1 + cos(pi u)) / 2
    """

    decay: Share = 0.2
    """Share of the steps in which the rate falls."""
    shape: Literal["one_minus_sqrt", "linear", "cosine"] = "one_minus_sqrt"
    """Of the fall."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, _ = self.split(step, steps)
        length = min(self.decay * steps, steps - self.warmup(steps))
        done = min(1.0, max(0.0, 1 - (steps - step) / length)) if length else 0.0
        left = {
            "one_minus_sqrt": 1 - math.sqrt(done),
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }
        return rise * (self.final + (1 - self.final) * left[self.shape])
