"""Warm-up, then a straight line down."""

from paceline.optim.warmup import Warmup


class Linear(Warmup):
    """factor = 1 - (1 - final) t, with t the share of the steps after the warm-up that is done."""

    def factor(self, step: int, steps: int) -> float:
        """What the peak rate is multiplied by in step ``step`` (1-based) of ``steps``."""
        rise, done = self.split(step, steps)
        return rise * (1 - (1 - self.final) * done)
