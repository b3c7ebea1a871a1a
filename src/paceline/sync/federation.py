"""The federated strategy at work: rounds, the clients that have their turn, and what comes of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paceline.comm.replica import Finish, Replica, VisitedReplica
from paceline.data.rounds import Round, Visit
from paceline.sync.aggregates.base import Collected
from paceline.sync.aggregation import Aggregation, FairMean, WeightedMean
from paceline.sync.alone import wide
from paceline.sync.base import SyncContext, SyncState, check_equal_start
from paceline.sync.control import ControlVariates
from paceline.sync.moments import ClientMoments
from paceline.sync.privacy import Privacy
from paceline.sync.secure.mean import MaskedMean, SecureMean
from paceline.sync.turn import Learned, Turn, hold

if TYPE_CHECKING:
    from paceline.sync.federated import Federated

TOLD = 3
"""Numbers summed over the replicas besides those of the aggregation: losses, targets, requests to stop."""


@dataclass(frozen=True, kw_only=True)
class Closed:
    """How a round ended."""

    loss: float
    """Mean over the targets of all local steps, each before its update."""
    targets: int
    update_norm: float
    """L2 norm of the clients' joint update, over the replica; NaN if a value is not finite."""
    stop: bool


class FederatedSync:
    """The strategy on one rank.

    In a round: ``open``; for each client ``enter``, the methods of ``Sync`` in every local step, ``leave``; ``close``.
    What clients hand in that had their turn elsewhere is given to ``take``, in the order of the round.
    """

    def __init__(self, context: SyncContext, options: "Federated") -> None:
        self._link, self._options = context.link, options
        self.aggregation = _aggregation(context, options)
        self._server = options.server.build()
        self._control = ControlVariates(context.link, context.clients) if options.scaffold else None
        self._privacy: Privacy | None = None
        if options.privacy is not None:
            key = context.seed if context.secret is None else context.secret
            self._privacy = Privacy(options.privacy, options.clients_per_round, key)
        self._moments = ClientMoments(context.link) if options.moments == "keep" else None
        self._older = options.buffer.max_staleness if options.buffer else 0
        self._versions: list[dict[str, Tensor]] = []
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._turn = Turn(options, control=self._control, moments=self._moments, privacy=self._privacy)
        self._visit: Visit

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and make what is remembered."""
        check_equal_start(self._link, replica)
        visited: Any = replica
        self._device = replica.shards[0].local.device
        now = {shard.name: wide(shard.local) for shard in replica.shards}
        self._server.start(now)
        self.aggregation.start(visited)
        if self._control is not None:
            self._control.start(visited)
        if self._moments is not None:
            self._moments.start(visited)
        self._versions = [{name: tensor.clone() for name, tensor in now.items()} for _ in range(self._older)]

    def open(self, step: int, whole: Round, replica: VisitedReplica) -> None:
        """A round begins with the weights as they are."""
        self.aggregation.open(whole, step)
        self._now = {shard.name: shard.local.clone() for shard in replica.shards}
        self._sums.zero_()

    def enter(self, visit: Visit, replica: VisitedReplica) -> None:
        """A client begins, from the weights of the round in which it was asked."""
        self._visit = visit
        self._turn.enter(visit, self._now if visit.staleness == 0 else self._versions[visit.staleness - 1], replica)

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """See ``Turn``, as all of a local step."""
        return self._turn.begin(step, replica, count)

    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """See ``Turn``."""
        return self._turn.reduce(replica, values, stop)

    def update(self, replica: Replica) -> Finish:
        """A local step, for which nobody else is asked."""
        return self._turn.update(replica)

    def leave(self, replica: VisitedReplica) -> None:
        """The client is done."""
        self.take(self._visit, self._turn.leave(replica))

    def take(self, visit: Visit, learned: Learned) -> None:
        """What a client hands in."""
        self._sums += torch.tensor(learned.sums, dtype=torch.float64)
        if self._privacy is not None:
            self._privacy.count(learned.within)
        weights = {"targets": float(learned.targets), "data": float(visit.data_rows), "uniform": 1.0}
        self.aggregation.take(
            visit,
            learned.update,
            weight=weights[self._options.weights],
            scale=1.0 / math.sqrt(1.0 + visit.staleness),
            loss=learned.first_loss,
        )

    @property
    def clip(self) -> float | None:
        """To which length clients cut their updates in this round, if they do."""
        return None if self._privacy is None else self._privacy.clip

    @torch.no_grad()
    def close(self, step: int, whole: Round, replica: VisitedReplica, stop: bool) -> Closed:
        """Join the updates of all replicas' clients and go on from there, if the joint update is finite."""
        within = [] if self._privacy is None else [self._privacy.told()]
        own = [*self._sums.tolist(), float(stop), *within, *self.aggregation.told()]
        told = torch.tensor(own, dtype=torch.float64, device=self._device)
        self._link.all_reduce(told).wait()
        losses, targets, stops, *numbers = told.tolist()
        update = self.aggregation.result(numbers[len(within) :], whole.visits, step)
        if self._privacy is not None:
            self._privacy.blur(update, numbers[0], replica.shards, step)
        norm = math.sqrt(float(replica.square_sums([update])))
        if math.isfinite(norm):
            if self._control is not None:
                self._control.close(whole.visits)
            if self._moments is not None:
                self._moments.close(whole.visits)
            after = {name: self._server.step(name, wide(now), update[name]) for name, now in self._now.items()}
            for newer, older in zip([self._now, *self._versions][-2::-1], self._versions[::-1], strict=True):
                for name, tensor in older.items():
                    tensor.copy_(newer[name])
            hold(after, replica)
        replica.forget()
        return Closed(loss=losses / max(1.0, targets), targets=int(targets), update_norm=norm, stop=stops > 0)

    def is_agreed(self, step: int) -> bool:
        """Always: a step is a whole round."""
        return True

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """Their own."""
        return {shard.name: shard.local for shard in replica.shards}

    @property
    def remembered(self) -> dict[int, dict[str, Tensor]]:
        """The moments of the clients that keep theirs."""
        return {} if self._moments is None else self._moments.kept

    def state(self) -> Mapping[str, SyncState]:
        """The server's memory, control variates, and the weights from which slow clients began."""
        older = {
            f"{name}/version_{age}": SyncState(tensor, like=name)
            for age, version in enumerate(self._versions, 1)
            for name, tensor in version.items()
        }
        control = self._control.state() if self._control is not None else {}
        private = self._privacy.state() if self._privacy is not None else {}
        return {**self._server.state(), **self.aggregation.state(), **older, **control, **private}


def _aggregation(context: SyncContext, options: "Federated") -> Aggregation:
    if options.aggregate.is_robust:
        return Collected(context.link, options.aggregate.build())
    if options.secure is not None:
        return (MaskedMean if context.are_processes else SecureMean)(context, options.secure)
    reducer = options.reducer.build(context)
    return FairMean(reducer, options.q) if options.q else WeightedMean(reducer)
