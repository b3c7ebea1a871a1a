"""What every learning-rate schedule is: what the peak rate is multiplied by, as a function of the place in the run.

Places are counted in steps of the full batch, over all ranks of all replicas. ``step`` is how many there have been when
the step in question is done, ``steps`` how many the whole run has. With ``unit: steps`` both are whole numbers; with
``unit: tokens`` a step of half the batch is half a step, which makes a difference while the batch grows.

Most schedules are nothing else. Two measure something and remember it: their config builds a ``Measured``.
"""

import math
from typing import Any, ClassVar, Literal, Protocol

from pydantic import model_validator

from paceline.config import Count, Options


class RateSchedule(Options):
    """Base of the config classes of all schedules."""

    unit: Literal["steps", "tokens"] = "steps"
    """What is counted. They differ only while the batch grows: tokens move the schedule on by what a step really had,
    and all ``_steps`` below are then steps of the full batch."""
    scale: Literal["none", "linear", "sqrt"] = "none"
    """How the rate grows with the sequences of a step: ``linear`` (Goyal et al. 2017, arXiv 1706.02677) or by the
    square root (Krizhevsky 2014, arXiv 1404.5997) of their ratio to ``base_sequences``."""
    base_sequences: Count | None = None
    """Sequences of a step for which ``optimizer.lr`` was found good; needed by ``scale``."""

    measures: ClassVar[Literal["change", "held_out"] | None] = None
    """What a ``Measured`` is told: the largest relative change of a tensor in a step, or the held-out loss."""
    has_cycles: ClassVar[bool] = False

    @model_validator(mode="after")
    def _knows_its_base(self) -> "RateSchedule":
        if (self.scale == "none") is not (self.base_sequences is None):
            raise ValueError(
                "scale and base_sequences go together: for which number of sequences is optimizer.lr right?"
            )
        return self

    def factor(self, step: float, steps: float) -> float:
        """What the peak rate is multiplied by in the step that ends at ``step`` of ``steps``: in (0, 1]."""
        raise NotImplementedError

    def cycle(self, step: float, steps: float) -> int:
        """The number of the cycle that ``step`` is in, from 0; always 0 without cycles."""
        return 0

    def scaled(self, sequences: int) -> float:
        """What the peak rate is multiplied by for a step of so many sequences."""
        if self.base_sequences is None:
            return 1.0
        ratio = sequences / self.base_sequences
        return ratio if self.scale == "linear" else math.sqrt(ratio)


class Measured(Protocol):
    """A schedule at work that follows what it measures; all ranks observe the same values, and have the same rate."""

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""

    def observe(self, value: float) -> None:
        """Take a measurement; it counts from the next step on."""

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""


class MeasuringSchedule(RateSchedule):
    """Base of the config classes of schedules that measure; the ``factor`` is that of what they build."""

    def build(self, peak: float) -> Measured:
        """The schedule at work; ``peak``: the rate that a factor of 1 stands for."""
        raise NotImplementedError
