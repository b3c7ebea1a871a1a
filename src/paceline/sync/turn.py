"""A client's turn at a replica: its local steps, and what it hands in after them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paceline.comm.replica import Finish, Replica, VisitedReplica
from paceline.data.rounds import Visit
from paceline.sync.alone import wide
from paceline.sync.base import NOTHING
from paceline.sync.control import ControlVariates
from paceline.sync.moments import ClientMoments
from paceline.sync.privacy import Privacy

if TYPE_CHECKING:
    from paceline.sync.federated import Federated


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a client hands in."""

    update: dict[str, Tensor]
    """Its weights minus those it began from, fp32 or more; cut to the clip where the run promises privacy."""
    targets: int
    """That it learned from, over all its local steps."""
    sums: tuple[float, float]
    """Of its losses, each before the update, and of their targets: for what is shown."""
    first_loss: float
    """Mean loss of its first local step that had a target; NaN if none had."""
    within: bool = False
    """Whether its update was within the clip of privacy."""


class Turn:
    """On one rank, for one client after the other: ``enter``, the methods of ``Stepping``, ``leave``."""

    def __init__(
        self,
        options: "Federated",
        *,
        control: ControlVariates | None = None,
        moments: ClientMoments | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        self._proximal = options.proximal
        self._control, self._moments, self._privacy = control, moments, privacy

    def enter(self, visit: Visit, begin: Mapping[str, Tensor], replica: VisitedReplica) -> None:
        """A client begins, from weights by name, without moments or with its own."""
        self._visit, self._begin = visit, begin
        self._learned, self._loss = 0, math.nan
        self._sums = torch.zeros(2, dtype=torch.float64)
        hold(begin, replica)
        if self._moments is None:
            replica.forget()
        else:
            self._moments.enter(visit, replica)

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """The client's own targets."""
        self._count = count
        return count

    @torch.no_grad()
    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """Add what holds the client near the others to its gradient. Values are its own; the round tells its."""
        if values is not None:
            self._sums += values.cpu()
            self._learned += self._count
            if math.isnan(self._loss) and self._count > 0:
                self._loss = float(values[0]) / self._count
        self._correct(replica)
        return (NOTHING, False) if values is None else (values, stop)

    def update(self, replica: Replica) -> Finish:
        """A local step, for which nobody else is asked."""
        return replica.finish(vote=lambda wish: wish)

    def _correct(self, replica: Replica) -> None:
        if not (self._proximal or self._control is not None):
            return
        for shard in replica.shards:
            if (gradient := shard.gradient) is None:
                continue
            if self._proximal:
                gradient.add_(shard.local - self._begin[shard.name], alpha=self._proximal)
            if self._control is not None:
                self._control.correct(self._visit, shard, gradient)

    def leave(self, replica: VisitedReplica) -> Learned:
        """The client is done."""
        update = {shard.name: wide(shard.local) - wide(self._begin[shard.name]) for shard in replica.shards}
        if self._control is not None:
            self._control.leave(self._visit, update, replica.rate)
        if self._moments is not None:
            self._moments.leave(self._visit, replica)
        within = self._privacy is not None and self._privacy.cut(update, replica)
        losses, targets = self._sums.tolist()
        return Learned(
            update=update, targets=self._learned, sums=(losses, targets), first_loss=self._loss, within=within
        )


@torch.no_grad()
def hold(weights: Mapping[str, Tensor], replica: VisitedReplica) -> None:
    """Set a replica's parameters by name."""
    for shard in replica.shards:
        shard.local.copy_(weights[shard.name])
    replica.refresh()
