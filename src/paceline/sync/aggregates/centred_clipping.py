"""Centred clipping (Karimireddy et al. 2021, arXiv 2012.10333, section 4): no update pulls further than a radius.

    v <- v + mean of (x_i - v) min(1, radius / ||x_i - v||)        some times, from the v of the round before

The paper's guarantee is for clients with momentum of their own: without it small false pulls add up over rounds.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from paceline.config import Count, Positive
from paceline.sync.aggregates.base import RobustOptions, Updates
from paceline.sync.aggregation import Update
from paceline.sync.base import SyncState


class CentredClipping(RobustOptions):
    """The mean of updates that are cut off at a radius around the last round's result."""

    radius: Positive
    """As far as one client pulls; of the size of an honest update's distance from the mean."""
    iterations: Count = 1
    """More come nearer where the updates have moved far since the last round."""

    def build(self) -> "CentredClippingRule":
        """The rule at work."""
        return CentredClippingRule(self)


class CentredClippingRule:
    """The rule on one rank."""

    def __init__(self, options: CentredClipping) -> None:
        self._options = options
        self._center: dict[str, Tensor] = {}

    def start(self, like: Mapping[str, Tensor]) -> None:
        """The first center is zero: no change."""
        self._center = {name: torch.zeros_like(tensor) for name, tensor in like.items()}

    def combine(self, updates: Updates) -> Update:
        """See ``Rule``."""
        for _ in range(self._options.iterations):
            away = updates.squared_norms(self._center).sqrt()
            shares = (self._options.radius / away).clamp(max=1.0).masked_fill(updates.lost, 0.0) / len(updates)
            pulled = updates.mean(shares)
            for name, center in self._center.items():
                center.mul_(1.0 - float(shares.sum())).add_(pulled[name])
        return {name: center.clone() for name, center in self._center.items()}

    def state(self) -> Mapping[str, SyncState]:
        """The center."""
        return {f"{name}/clipping_center": SyncState(tensor, like=name) for name, tensor in self._center.items()}
