"""Krum and Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757, sections 4 and 5).

The score of an update is the sum of its squared distances to its n - f - 2 nearest others. Krum takes the update with
the lowest score, Multi-Krum the mean of the ``keep`` lowest; of equal scores the first client's.
"""

from typing import ClassVar

import torch
from torch import Tensor

from paceline.config import Count
from paceline.sync.aggregates.base import Memoryless, RobustOptions, Updates
from paceline.sync.aggregation import Update


class Krum(RobustOptions):
    """The update, or the mean of the updates, nearest to most others."""

    keep: Count = 1
    """m, updates of which the mean is taken; 1 is Krum. At most n - f - 2."""

    needs: ClassVar[str] = "2f + 3"

    @property
    def fewest(self) -> int:
        """2f + 3."""
        return 2 * self.faulty + 3

    def refused(self, clients: int) -> str | None:
        """Too few clients, or too many of them kept."""
        most = clients - self.faulty - 2
        if (problem := super().refused(clients)) or self.keep <= most:
            return problem
        return (
            f"aggregate.keep={self.keep} of {clients} clients a round, of which {self.faulty} may be faulty, is more "
            f"than n - f - 2 = {most}. Use {most} or fewer"
        )

    def build(self) -> "KrumRule":
        """The rule at work."""
        return KrumRule(self.faulty, self.keep)


class KrumRule(Memoryless):
    """The rule on one rank."""

    def __init__(self, faulty: int, keep: int) -> None:
        self._faulty, self._keep = faulty, keep

    def combine(self, updates: Updates) -> Update:
        """See ``Rule``."""
        distances = updates.squared_distances()
        best = scores(distances, len(updates) - self._faulty - 2).argsort(stable=True)[: self._keep].tolist()
        return {name: tensor.mean(0) for name, tensor in updates.chosen(sorted(best)).items()}


def scores(distances: Tensor, neighbours: int) -> Tensor:
    """Krum's scores (n,) from squared distances (n, n): sums of those to the nearest others."""
    others = distances + torch.diag(torch.full((len(distances),), torch.inf, dtype=distances.dtype))
    return others.sort(1).values[:, :neighbours].sum(1)
