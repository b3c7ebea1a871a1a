"""Triangles (Smith 2017, arXiv 1506.01186)."""

from paceline.config import Natural, Share
from paceline.optim.cycles import Cycles


class Cyclic(Cycles):
    """From ``low`` up to the peak and back, in straight lines, again and again.

    factor = low + (1 - low) shrink^c (1 - |1 - 2u|), in cycle c = 0, 1, ... of which the share u is done; with
    shrink 1 Smith's ``triangular``, with 0.5 his ``triangular2``
    """

    warmup_steps: Natural = 0
    """Steps of a rise from 0 to ``low`` before the first cycle."""
    low: Share = 0.1
    """The factor at the ends of a cycle."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, _ = self.split(step, steps)
        if rise < 1.0:
            return self.low * rise
        cycle, done = self.within(step, steps)
        return self.low + (1 - self.low) * self.shrink**cycle * (1 - abs(1 - 2 * max(0.0, done)))
