"""Linear warm-up, shared by the schedules."""

from paceline.config import Fraction, Natural, Options


class Warmup(Options):
    """Base of schedules that start with a linear rise from 0 to the peak."""

    warmup_steps: Natural | None = None
    """Steps of the rise; default: a twentieth of the run."""
    final: Fraction = 0.1
    """The factor in the last step."""

    def split(self, step: int, steps: int) -> tuple[float, float]:
        """The warm-up factor in step ``step`` (1-based), and the share of what follows it that is done, in [0, 1]."""
        warmup = min(steps // 20 if self.warmup_steps is None else self.warmup_steps, steps)
        if step <= warmup:
            return step / warmup, 0.0
        return 1.0, min(1.0, (step - warmup) / max(1, steps - warmup))
