"""The trimmed mean (Yin et al. 2018, arXiv 1803.01498, definition 2): in each coordinate, without f on either side."""

from paceline.sync.aggregates.base import Memoryless, RobustOptions, Updates
from paceline.sync.aggregation import Update


class TrimmedMean(RobustOptions):
    """The mean in each coordinate of all but the f smallest and the f largest values."""

    def build(self) -> "TrimmedMeanRule":
        """The rule at work."""
        return TrimmedMeanRule(self.faulty)


class TrimmedMeanRule(Memoryless):
    """The rule on one rank."""

    def __init__(self, faulty: int) -> None:
        self._faulty = faulty

    def combine(self, updates: Updates) -> Update:
        """See ``Rule``."""
        kept = slice(self._faulty, len(updates) - self._faulty)
        return {name: tensor.sort(0).values[kept].mean(0) for name, tensor in updates.by_name.items()}
