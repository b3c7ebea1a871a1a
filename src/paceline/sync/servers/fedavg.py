"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1): theta <- theta + lr update; with lr = 1 the mean."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from paceline.config import Options, Positive
from paceline.sync.base import SyncState


class FedAvg(Options):
    """Go to the mean of the clients' weights."""

    lr: Positive = 1.0
    """How far to go towards it."""

    copies: ClassVar[int] = 0

    def build(self) -> "FedAvgServer":
        """The rule at work."""
        return FedAvgServer(self.lr)


class FedAvgServer:
    """The rule on one rank."""

    def __init__(self, lr: float) -> None:
        self._lr = lr

    def start(self, like: Mapping[str, Tensor]) -> None:
        """Nothing is remembered."""

    def step(self, name: str, before: Tensor, update: Tensor) -> Tensor:
        """See ``Server``."""
        return before.add(update, alpha=self._lr)

    def state(self) -> Mapping[str, SyncState]:
        """Nothing is remembered."""
        return {}
