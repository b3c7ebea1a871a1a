"""Warm-up, then the peak rate to the end."""

from paceline.config import Natural, Options


class Constant(Options):
    """The peak rate, after a linear rise if asked."""

    warmup_steps: Natural = 0
    """Steps of the rise from 0; none by default."""

    def factor(self, step: int, steps: int) -> float:
        """What the peak rate is multiplied by in step ``step`` (1-based) of ``steps``."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
