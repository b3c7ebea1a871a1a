"""SlowMo (Wang et al. 2020, arXiv 1910.00643, algorithm 1): local SGD with a momentum over its means.

    u     <- beta u + (theta - mean of the replicas' parameters) / gamma
    theta <- theta - alpha gamma u

gamma is the rate of the optimizer: here the mean of its rates since the last exchange, so that a schedule within that
time is taken as a whole. theta - alpha (theta - mean) is computed as an interpolation, so that with alpha = 1 and
beta = 0 it is local SGD, bit for bit.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from paceline.config import ChosenFrom, Count, Fraction, Positive, SyncOptions
from paceline.registry import REDUCERS
from paceline.sync.alone import wide
from paceline.sync.base import Shapes, SyncContext, SyncState
from paceline.sync.periodic import PeriodicSync, periodic_delays, periodic_state_bytes, periodic_wire_bytes
from paceline.sync.reducers.mean import Mean


class SlowMo(SyncOptions):
    """Local SGD whose means are followed with momentum."""

    every: Count = 10
    """Steps from one mean to the next."""
    lr: Positive = 1.0
    """alpha, the slow rate: how far to go towards the mean."""
    momentum: Fraction = 0.7
    """beta, the share of the slow momentum that is kept."""
    reducer: Annotated[Any, ChosenFrom(REDUCERS)] = Mean()
    """How parameters are summed on the way."""

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """As local SGD's."""
        return periodic_wire_bytes(self.reducer, self.every, shapes, members, steps)

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """Those of the exchanges."""
        return periodic_delays(self.reducer, self.every, shapes, members, steps)

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The parameters agreed on, their momentum, and the reducer's."""
        return periodic_state_bytes(self.reducer, shapes, copies=2)

    def build(self, context: SyncContext) -> PeriodicSync:
        """The strategy at work."""
        reducer, outer = self.reducer, SlowMomentum(self.lr, self.momentum)
        return PeriodicSync(
            context, every=self.every, reducer=reducer.build(context), is_exact=reducer.is_exact, outer=outer
        )


class SlowMomentum:
    """The outer rule."""

    def __init__(self, lr: float, momentum: float) -> None:
        self._lr, self._momentum = lr, momentum
        self._slow: dict[str, Tensor] = {}

    def start(self, like: Mapping[str, Tensor]) -> None:
        """No momentum yet."""
        self._slow = {name: torch.zeros_like(wide(tensor)) for name, tensor in like.items()}

    def step(self, name: str, before: Tensor, mean: Tensor, rate: float) -> Tensor:
        """theta - alpha (theta - mean) - alpha gamma beta u, with the u of before."""
        slow = self._slow[name]
        after = torch.lerp(before, mean, self._lr).sub_(slow, alpha=self._lr * rate * self._momentum)
        slow.mul_(self._momentum)
        if rate > 0:  # at a rate of zero nothing has moved
            slow.add_(before - mean, alpha=1.0 / rate)
        return after

    def state(self) -> Mapping[str, SyncState]:
        """The momentum."""
        return {f"{name}/slow_momentum": SyncState(slow, like=name) for name, slow in self._slow.items()}
