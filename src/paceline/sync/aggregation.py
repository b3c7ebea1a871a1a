"""From the updates of a round's clients, which came at several replicas, to one update, the same on all.

An update is client minus server weights. It is taken after each client, so that what is only summed takes no more
memory for many clients than for one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from paceline.comm.replica import Shard, VisitedReplica
from paceline.data.rounds import Round, Visit
from paceline.sync.base import SyncState
from paceline.sync.reducers.base import Reducer

Update = Mapping[str, Tensor]
"""By the names of the shards: this rank's parts, fp32 or more."""


class Aggregation(Protocol):
    """A way to make one update of many, at work on one rank."""

    def start(self, replica: VisitedReplica) -> None:
        """Before the first round."""

    def open(self, whole: Round, step: int) -> None:
        """A round begins."""

    def take(self, visit: Visit, update: Update, *, weight: float, scale: float, loss: float) -> None:
        """A client's update. ``weight``: its share in a mean, before all are divided by their sum; ``scale``: by what
        its update is multiplied on top; ``loss``: its own, at the weights it began from."""

    def told(self) -> Sequence[float]:
        """Numbers that are summed over the replicas before ``result``."""
        ...

    def result(self, told: Sequence[float], visits: Sequence[Visit], step: int) -> Update:
        """The update of the round whose ``visits`` all replicas together had; ready for the next round after it."""
        ...

    def state(self) -> Mapping[str, SyncState]:
        """As in ``Sync.state``."""
        ...


class WeightedMean:
    """Sum of weight x scale x update, over the sum of weights."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._sums: dict[str, Tensor] = {}
        self._total = 0.0

    def start(self, replica: VisitedReplica) -> None:
        """Sums of nothing yet."""
        self._sums = {shard.name: wide_zeros(shard) for shard in replica.shards}
        self._reducer.start(replica.shards)

    def open(self, whole: Round, step: int) -> None:
        """Whoever comes is added."""

    def take(self, visit: Visit, update: Update, *, weight: float, scale: float, loss: float) -> None:
        """See ``Aggregation``."""
        self._add(update, weight * scale)
        self._total += weight

    def told(self) -> Sequence[float]:
        """The sum of weights."""
        return (self._total,)

    def result(self, told: Sequence[float], visits: Sequence[Visit], step: int) -> Update:
        """See ``Aggregation``; where nobody learned from anything, no update."""
        (total,) = told
        summed = self._reducer.weighted_sum(self._sums, 1.0 / total if total > 0 else 0.0, step)
        for tensor in self._sums.values():
            tensor.zero_()
        self._total = 0.0
        return summed

    def state(self) -> Mapping[str, SyncState]:
        """What the reducer remembers."""
        return self._reducer.state()

    def _add(self, update: Update, factor: float) -> None:
        for name, tensor in update.items():
            self._sums[name].add_(tensor, alpha=factor)


class FairMean(WeightedMean):
    """q-FedAvg (Li et al. 2020, arXiv 1905.10497, algorithm 2): who has a high loss counts for more.

        Delta_k = F_k^q L (theta - theta_k)        h_k = q F_k^(q - 1) ||L (theta - theta_k)||^2 + L F_k^q
        theta  <- theta - sum of Delta_k / sum of h_k

    with L = 1 / rate. F_k, the client's loss at theta, is that of its first local step.
    """

    def __init__(self, reducer: Reducer, q: float) -> None:
        super().__init__(reducer)
        self._q = q

    def start(self, replica: VisitedReplica) -> None:
        """Sums of nothing yet."""
        super().start(replica)
        self._replica = replica

    def take(self, visit: Visit, update: Update, *, weight: float, scale: float, loss: float) -> None:
        """See ``Aggregation``."""
        if math.isnan(loss):  # the client has not a single target
            return
        q, lipschitz = self._q, 1.0 / self._replica.rate
        loss = max(loss, 1e-10)  # as in the authors' code: q - 1 may be negative
        self._add(update, lipschitz * loss**q)
        squares = float(self._replica.square_sums([update]))
        self._total += q * loss ** (q - 1) * lipschitz**2 * squares + lipschitz * loss**q


def wide_zeros(shard: Shard) -> Tensor:
    """Zeros like a parameter's local part, fp32 or more."""
    local = shard.local
    return torch.zeros_like(local, dtype=torch.promote_types(local.dtype, torch.float32))
