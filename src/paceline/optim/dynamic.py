"""A rate that follows how much the weights move."""

from collections import deque
from typing import Any, ClassVar, Literal

from paceline.config import Count, Fraction, Positive, Share
from paceline.optim.warmup import MeasuredWarmup


class Dynamic(MeasuredWarmup):
    """The upper bound while the weights move a lot, else an exponential average that follows their movement.

    Of each parameter tensor p the change in a step is |p after - p before| / |p before|, with the L2 norms of the whole
    tensor over all ranks that hold a part of it (0 for a tensor of zeros). A is the largest change of any tensor in the
    last ``window`` steps. With ``optimizer.lr``, times its ``scale``, as the upper bound, and ``lower`` times that as
    the lower one:

    rate = upper if A > floor, else min(upper, max(lower, keep rate + (1 - keep) gain A))

    With a gain of 1 the rate moves toward A itself. Most optimizers hold A far above the rate, which then stays at its
    upper bound, or far below it, and then it falls to its lower one; a gain near rate / A lets it settle between.
    """

    window: Count = 10
    """Steps over which the largest change is taken."""
    floor: Positive = 0.05
    """Changes above it call for the upper bound."""
    gain: Positive = 1.0
    """What A is multiplied by where the rate moves toward it."""
    keep: Fraction = 0.9
    """Share of the rate that is kept when it moves toward A."""
    lower: Share = 0.01
    """The lower bound, as a share of the upper one."""

    measures: ClassVar[Literal["change", "held_out"] | None] = "change"

    def build(self, peak: float) -> "DynamicRate":
        """The schedule at work."""
        return DynamicRate(self, peak)


class DynamicRate:
    """What ``Dynamic`` remembers: the rate, as a share of its upper bound, and the changes of the last steps."""

    def __init__(self, options: Dynamic, upper: float) -> None:
        self._options, self._upper = options, upper
        self._share = 1.0
        self._changes: deque[float] = deque(maxlen=options.window)

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, _ = self._options.split(step, steps)
        return rise * self._share

    def observe(self, value: float) -> None:
        """Take the largest change of a tensor in a step."""
        self._changes.append(value)
        largest, options = max(self._changes), self._options
        if largest > options.floor:
            self._share = 1.0
        else:
            toward = options.keep * self._share + (1 - options.keep) * options.gain * largest / self._upper
            self._share = min(1.0, max(options.lower, toward))

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {"share": self._share, "changes": list(self._changes)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._share = state["share"]
        self._changes.clear()
        self._changes.extend(state["changes"])
