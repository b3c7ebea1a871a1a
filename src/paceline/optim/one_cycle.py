"""One cycle up and down (Smith & Topin 2018, arXiv 1708.07120); the rate alone, momentum stays as it is."""

import math
from typing import Literal

from paceline.config import Share
from paceline.optim.schedule import RateSchedule


class OneCycle(RateSchedule):
    """From ``first`` up to the peak, then down to ``final``, each by half a cosine or a straight line.

    factor = a + (b - a) (1 - cos(pi u)) / 2, from a = ``first`` to b = 1 in the first ``rise`` of the run, then from
    a = 1 to b = ``final``; u is the share of that part that is done, 0 in the first step and 1 in the last
    """

    rise: Share = 0.3
    """Share of the steps in which the rate rises."""
    first: Share = 0.04
    """The factor in the first step."""
    final: Share = 4e-6
    """The factor in the last step."""
    shape: Literal["cosine", "linear"] = "cosine"
    """Of both parts."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        place, top, last = max(0.0, step - 1), max(0.0, self.rise * steps - 1), steps - 1
        if place <= top:
            return self._between(self.first, 1.0, place / top if top else 1.0)
        return self._between(1.0, self.final, min(1.0, (place - top) / (last - top)))

    def _between(self, start: float, end: float, done: float) -> float:
        share = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return start + (end - start) * share
