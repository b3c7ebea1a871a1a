"""Bulyan (El Mhamdi et al. 2018, arXiv 1802.07927, section 4), over Krum.

n - 2f updates are chosen one after the other, each by Krum among those that are left (with one neighbour at least).
Then, in each coordinate, the mean is taken of the n - 4f of them that are nearest to their median.
"""

from typing import ClassVar

import torch
from torch import Tensor

from paceline.sync.aggregates.base import Memoryless, RobustOptions, Updates
from paceline.sync.aggregates.krum import scores
from paceline.sync.aggregation import Update


class Bulyan(RobustOptions):
    """Krum's choice of many, then a mean around the median in each coordinate."""

    needs: ClassVar[str] = "4f + 3"

    @property
    def fewest(self) -> int:
        """4f + 3."""
        return 4 * self.faulty + 3

    def build(self) -> "BulyanRule":
        """The rule at work."""
        return BulyanRule(self.faulty)


class BulyanRule(Memoryless):
    """The rule on one rank."""

    def __init__(self, faulty: int) -> None:
        self._faulty = faulty

    def combine(self, updates: Updates) -> Update:
        """See ``Rule``."""
        left, distances = list(range(len(updates))), updates.squared_distances()
        chosen = []
        for _ in range(len(updates) - 2 * self._faulty):
            among = distances[left][:, left]
            best = int(scores(among, max(1, len(left) - self._faulty - 2)).argmin())
            chosen.append(left.pop(best))
        kept = len(chosen) - 2 * self._faulty
        return {name: _around_median(tensor, kept) for name, tensor in updates.chosen(sorted(chosen)).items()}


def _around_median(tensor: Tensor, kept: int) -> Tensor:
    """The mean, in each coordinate, of the ``kept`` of (m, ...) values that are nearest to their median."""
    away = (tensor - median(tensor)).abs()
    nearest = torch.sort(away, dim=0, stable=True).indices[:kept]
    return torch.take_along_dim(tensor, nearest, 0).mean(0)


def median(tensor: Tensor) -> Tensor:
    """The median of (m, ...) values in each coordinate; of an even number the mean of the two in the middle."""
    ordered, m = tensor.sort(0).values, len(tensor)
    return (ordered[(m - 1) // 2] + ordered[m // 2]) / 2
