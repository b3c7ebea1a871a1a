"""Mean of snapshots of the weights (SWA; Izmailov et al. 2018, arXiv 1803.05407)."""

from typing import Literal

from paceline.config import Count
from paceline.optim.average import WeightAverage


class Swa(WeightAverage):
    """All weights that are taken count alike: those at the end of each cycle, where the rate is lowest.

    average = average + (weights - average) / (m + 1) after m weights
    """

    every: Count | Literal["cycle"] = "cycle"
    """Steps between the weights that are taken; ``cycle``: those at the end of each cycle of the schedule."""

    def weight(self, taken: int) -> float:
        """See ``WeightAverage.weight``."""
        return 1 / (taken + 1)
