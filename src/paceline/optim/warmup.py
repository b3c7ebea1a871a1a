"""Linear warm-up, shared by the schedules."""

from paceline.config import Fraction, Natural
from paceline.optim.schedule import MeasuringSchedule, RateSchedule


class Warmup(RateSchedule):
    """Base of schedules that start with a linear rise from 0 to the peak."""

    warmup_steps: Natural | None = None
    """Steps of the rise; default: a twentieth of the run."""

    def warmup(self, steps: float) -> float:
        """Steps of the rise in a run of ``steps``."""
        return min(steps // 20 if self.warmup_steps is None else self.warmup_steps, steps)

    def split(self, step: float, steps: float) -> tuple[float, float]:
        """The warm-up factor in step ``step`` (1-based), and the share of what follows it that is done, in [0, 1]."""
        warmup = self.warmup(steps)
        if step <= warmup:
            return step / warmup, 0.0
        return 1.0, min(1.0, (step - warmup) / max(1, steps - warmup))


class Falling(Warmup):
    """Base of schedules that fall from the peak to a last value."""

    final: Fraction = 0.1
    """The factor in the last step."""


class MeasuredWarmup(MeasuringSchedule, Warmup):
    """Base of schedules that measure, and start with the same rise."""
