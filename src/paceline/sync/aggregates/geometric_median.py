"""The geometric median by the smoothed Weiszfeld algorithm (Pillutla et al. 2022, arXiv 1912.13445, algorithm 2).

    some times:  w_i = 1 / max(smoothing, ||x_i - z||)      z <- sum of w_i x_i / sum of w_i

It begins at the median of each coordinate: from the mean, which one far update moves far, it would need many times.
"""

import torch

from paceline.config import Count, Positive
from paceline.sync.aggregates.base import Memoryless, RobustOptions, Updates
from paceline.sync.aggregates.bulyan import median
from paceline.sync.aggregation import Update


class GeometricMedian(RobustOptions):
    """The point with the least sum of distances to all updates."""

    iterations: Count = 5
    """Of Weiszfeld's algorithm; the paper finds 3 enough."""
    smoothing: Positive = 1e-6
    """Distances below this count as this."""

    def build(self) -> "GeometricMedianRule":
        """The rule at work."""
        return GeometricMedianRule(self)


class GeometricMedianRule(Memoryless):
    """The rule on one rank."""

    def __init__(self, options: GeometricMedian) -> None:
        self._options = options

    def combine(self, updates: Updates) -> Update:
        """See ``Rule``."""
        center = {name: median(tensor) for name, tensor in updates.by_name.items()}
        for _ in range(self._options.iterations):
            away = updates.squared_norms(center).sqrt().clamp(min=self._options.smoothing)
            weights = torch.where(updates.lost, 0.0, 1.0 / away)
            if not weights.sum() > 0:
                break
            center = updates.mean(weights / weights.sum())
        return center
