"""Cycles one after the other, shared by the schedules that have them.

The last step of a cycle has its lowest rate: there a snapshot of the weights is best taken. The first step of the next
one stands high again.
"""

import math
from typing import ClassVar

from paceline.config import AtLeastOne, Count, Share
from paceline.optim.warmup import Warmup

SLACK = 1e-6
"""Of a step: a cycle whose end falls on a step holds it, whatever is lost by rounding."""
DEFAULT_CYCLES = 4


class Cycles(Warmup):
    """Base of schedules with cycles, which begin after the warm-up."""

    cycle_steps: Count | None = None
    """Steps of the first cycle; default: so that four cycles fill the run."""
    growth: AtLeastOne = 1.0
    """Steps of a cycle over those of the one before."""
    shrink: Share = 1.0
    """Height of a cycle over that of the one before."""

    has_cycles: ClassVar[bool] = True

    def cycle(self, step: float, steps: float) -> int:
        """The number of the cycle that ``step`` is in, from 0."""
        return self._place(step, steps)[0]

    def within(self, step: float, steps: float) -> tuple[int, float]:
        """The number of the cycle, and the share of it that is done when ``step`` is: in (0, 1]."""
        cycle, begin, length = self._place(step, steps)
        return cycle, min(1.0, (step - self.warmup(steps) - begin) / length)

    def _place(self, step: float, steps: float) -> tuple[int, float, float]:
        """Of the cycle that ``step`` is in: its number, where it begins after the warm-up, and its length."""
        warmup = self.warmup(steps)
        after, length, growth = step - warmup, float(self.cycle_steps or 0), self.growth
        if not length:
            parts = sum(growth**cycle for cycle in range(DEFAULT_CYCLES))
            length = max(1.0, (steps - warmup) / parts)
        if growth == 1.0:
            cycle = max(0, math.ceil((after - SLACK) / length) - 1)
            return cycle, cycle * length, length
        cycle, begin = 0, 0.0
        while after > begin + length + SLACK:
            cycle, begin, length = cycle + 1, begin + length, length * growth
        return cycle, begin, length
