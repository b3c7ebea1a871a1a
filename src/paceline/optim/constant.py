"""Warm-up, then the peak rate to the end."""

from paceline.config import Natural
from paceline.optim.schedule import RateSchedule


class Constant(RateSchedule):
    """The peak rate, after a linear rise if asked.

    factor = min(1, s / w), with w the ``warmup_steps``
    """

    warmup_steps: Natural = 0
    """Steps of the rise from 0; none by default."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
