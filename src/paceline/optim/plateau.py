"""A lower rate when the held-out loss stops falling (the rule of torch's ``ReduceLROnPlateau``, for a minimum)."""

import math
from typing import Any, ClassVar, Literal

from paceline.config import Fraction, Natural, Share
from paceline.optim.warmup import MeasuredWarmup


class Plateau(MeasuredWarmup):
    """The peak rate, multiplied by ``multiply`` whenever the held-out loss has not fallen for a while.

    factor = max(final, multiply^m); m grows by one when more than ``patience`` evaluations (every ``evaluate.every``
    steps) in a row did not bring the loss below (1 - threshold) times the least so far; then it counts anew, and the
    next ``cooldown`` evaluations are not counted
    """

    multiply: Share = 0.3
    """The next rate over the one before."""
    patience: Natural = 2
    """So many evaluations without a fall are put up with."""
    threshold: Fraction = 1e-3
    """The share by which the loss must fall to count as lower."""
    cooldown: Natural = 0
    """Evaluations after a change that are not counted."""
    final: Share = 0.01
    """The lowest factor."""

    measures: ClassVar[Literal["change", "held_out"] | None] = "held_out"

    def build(self, peak: float) -> "PlateauRate":
        """The schedule at work."""
        return PlateauRate(self)


class PlateauRate:
    """What ``Plateau`` remembers: the level, the least loss, and how long ago that was."""

    def __init__(self, options: Plateau) -> None:
        self._options = options
        self._level = 1.0
        self._least: float | None = None
        self._waited = 0
        self._cooling = 0

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        rise, _ = self._options.split(step, steps)
        return rise * self._level

    def observe(self, value: float) -> None:
        """Take a held-out loss."""
        options = self._options
        if value < (math.inf if self._least is None else self._least * (1 - options.threshold)):
            self._least, self._waited = value, 0
        else:
            self._waited += 1
        if self._cooling:
            self._cooling, self._waited = self._cooling - 1, 0
        if self._waited > options.patience:
            self._level = max(options.final, self._level * options.multiply)
            self._cooling, self._waited = options.cooldown, 0

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {"level": self._level, "least": self._least, "waited": self._waited, "cooling": self._cooling}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._level, self._least = state["level"], state["least"]
        self._waited, self._cooling = state["waited"], state["cooling"]
