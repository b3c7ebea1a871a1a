"""What FedAdagrad, FedAdam and FedYogi share (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    m     <- beta1 m + (1 - beta1) update
    v     <- by the rule, from v and update^2
    theta <- theta + lr m / (sqrt(v) + tau)

There is no correction of the bias of m and v; v starts at tau^2.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from paceline.config import Fraction, Options, Positive
from paceline.sync.base import SyncState

Second = Callable[[Tensor, Tensor], Tensor]
"""From v and the squared update to the next v, in place of v."""


class AdaptiveOptions(Options):
    """What all three are told."""

    lr: Positive = 0.01
    """The server's rate; the paper looks for it from 10^-3 to 10."""
    tau: Positive = 1e-3
    """Below this a coordinate's updates no longer count as small."""
    beta1: Fraction = 0.9
    """Share of the mean of the updates that is kept."""

    copies: ClassVar[int] = 2


class AdaptiveServer:
    """One of the three on one rank."""

    def __init__(self, options: AdaptiveOptions, second: Second) -> None:
        self._options, self._second = options, second
        self._m: dict[str, Tensor] = {}
        self._v: dict[str, Tensor] = {}

    def start(self, like: Mapping[str, Tensor]) -> None:
        """m = 0, v = tau^2."""
        self._m = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        self._v = {name: torch.full_like(tensor, self._options.tau**2) for name, tensor in like.items()}

    def step(self, name: str, before: Tensor, update: Tensor) -> Tensor:
        """See ``Server``."""
        options = self._options
        m = self._m[name].mul_(options.beta1).add_(update, alpha=1 - options.beta1)
        v = self._second(self._v[name], update.square())
        return before.addcdiv(m, v.sqrt().add_(options.tau), value=options.lr)

    def state(self) -> Mapping[str, SyncState]:
        """Both moments."""
        first = {f"{name}/server_m": SyncState(tensor, like=name) for name, tensor in self._m.items()}
        return first | {f"{name}/server_v": SyncState(tensor, like=name) for name, tensor in self._v.items()}
