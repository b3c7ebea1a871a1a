"""Warm-up, then a straight line down."""

from paceline.optim.warmup import Falling


class Linear(Falling):
    """A straight line from the peak to ``final``.

    factor = 1 - (1 - final) t
    """

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, done = self.split(step, steps)
        return rise * (1 - (1 - self.final) * done)
