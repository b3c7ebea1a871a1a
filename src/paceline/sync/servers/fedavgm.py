"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335, section 4.3): momentum over the rounds.

v     <- momentum v + update
theta <- theta + lr v                           or, with Nesterov, lr (update + momentum v)
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from paceline.config import Fraction, Options, Positive
from paceline.sync.base import SyncState


class FedAvgM(Options):
    """Follow the mean update with momentum."""

    lr: Positive = 1.0
    """The server's rate."""
    momentum: Fraction = 0.9
    """Share of the last rounds' update that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    copies: ClassVar[int] = 1

    def build(self) -> "FedAvgMServer":
        """The rule at work."""
        return FedAvgMServer(self)


class FedAvgMServer:
    """The rule on one rank."""

    def __init__(self, options: FedAvgM) -> None:
        self._options = options
        self._momentum: dict[str, Tensor] = {}

    def start(self, like: Mapping[str, Tensor]) -> None:
        """No momentum yet."""
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in like.items()}

    def step(self, name: str, before: Tensor, update: Tensor) -> Tensor:
        """See ``Server``."""
        lr, kept = self._options.lr, self._options.momentum
        momentum = self._momentum[name].mul_(kept).add_(update)
        if self._options.nesterov:
            return before.add(update, alpha=lr).add_(momentum, alpha=lr * kept)
        return before.add(momentum, alpha=lr)

    def state(self) -> Mapping[str, SyncState]:
        """The momentum."""
        return {f"{name}/server_momentum": SyncState(tensor, like=name) for name, tensor in self._momentum.items()}
