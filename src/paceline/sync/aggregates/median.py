"""The median in each coordinate (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

from paceline.sync.aggregates.base import Memoryless, RobustOptions, Updates
from paceline.sync.aggregates.bulyan import median
from paceline.sync.aggregation import Update


class Median(RobustOptions):
    """The median in each coordinate."""

    def build(self) -> "MedianRule":
        """The rule at work."""
        return MedianRule()


class MedianRule(Memoryless):
    """The rule on one rank."""

    def combine(self, updates: Updates) -> Update:
        """See ``Rule``."""
        return {name: median(tensor) for name, tensor in updates.by_name.items()}
