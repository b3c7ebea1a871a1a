"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105, algorithm 1): local steps, then an outer step with momentum.

    Delta = theta - mean of the replicas' parameters        the pseudo-gradient; means are weighted by targets
    m     <- mu m + Delta
    theta <- theta - lr (Delta + mu m)                      with Nesterov, else theta - lr m: as torch's SGD

The inner optimizer is the run's own; its moments stay with their replica and are never reset. theta - lr Delta is
computed as an interpolation, so that with lr = 1 and mu = 0 it is local SGD, bit for bit.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from paceline.config import ChosenFrom, Count, Fraction, Options, Positive, SyncOptions
from paceline.registry import REDUCERS
from paceline.sync.alone import wide
from paceline.sync.base import Shapes, SyncContext, SyncState
from paceline.sync.periodic import PeriodicSync, periodic_delays, periodic_state_bytes, periodic_wire_bytes
from paceline.sync.reducers.mean import Mean


class OuterOptions(Options):
    """The outer optimizer, SGD on pseudo-gradients."""

    lr: Positive = 0.7
    """The outer rate; constant."""
    momentum: Fraction = 0.9
    """Share of the outer momentum that is kept."""
    nesterov: bool = True
    """Look ahead along the momentum, if there is any."""


class DiLoCo(SyncOptions):
    """Learn alone for many steps, then take one outer step with the mean of what replicas learned."""

    every: Count = 100
    """Inner steps of an outer step; the paper has 500."""
    outer: OuterOptions = OuterOptions()
    """The outer optimizer."""
    reducer: Annotated[Any, ChosenFrom(REDUCERS)] = Mean()
    """How pseudo-gradients are summed on the way."""

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """The pseudo-gradients, once every so many steps."""
        return periodic_wire_bytes(self.reducer, self.every, shapes, members, steps)

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """Those of the exchanges."""
        return periodic_delays(self.reducer, self.every, shapes, members, steps)

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The parameters agreed on, the outer momentum if there is any, and the reducer's."""
        return periodic_state_bytes(self.reducer, shapes, copies=1 + (self.outer.momentum > 0))

    def build(self, context: SyncContext) -> PeriodicSync:
        """The strategy at work."""
        reducer, outer = self.reducer, OuterSGD(self.outer)
        return PeriodicSync(
            context, every=self.every, reducer=reducer.build(context), is_exact=reducer.is_exact, outer=outer
        )


class OuterSGD:
    """The outer rule."""

    def __init__(self, options: OuterOptions) -> None:
        self._options = options
        self._momentum: dict[str, Tensor] = {}

    def start(self, like: Mapping[str, Tensor]) -> None:
        """No momentum yet."""
        if self._options.momentum > 0:
            self._momentum = {name: torch.zeros_like(wide(tensor)) for name, tensor in like.items()}

    def step(self, name: str, before: Tensor, mean: Tensor, rate: float) -> Tensor:
        """theta - lr Delta - lr mu m, with the m of after (Nesterov) or of before."""
        lr, mu = self._options.lr, self._options.momentum
        after = torch.lerp(before, mean, lr)
        if name in self._momentum:
            momentum = self._momentum[name]
            if not self._options.nesterov:
                after.sub_(momentum, alpha=lr * mu)
            momentum.mul_(mu).add_(before - mean)
            if self._options.nesterov:
                after.sub_(momentum, alpha=lr * mu)
        return after

    def state(self) -> Mapping[str, SyncState]:
        """The momentum."""
        return {f"{name}/outer_momentum": SyncState(tensor, like=name) for name, tensor in self._momentum.items()}
