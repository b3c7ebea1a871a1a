"""SCAFFOLD's control variates (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II).

    local step     y   <- y - rate (g(y) - c_k + c)
    after K steps  c_k <- c_k - c + (theta - y) / (K rate)
    after a round  c   <- c + 1/N sum over its clients of (c_k - c_k before)

c_k estimates the gradient of client k, c that of all N. A client's variate is kept by every replica, for any may train
it next; so after a round each is sent once from the replica where it was made. Sums go in the order of the round's
clients, so that they do not depend on the number of replicas.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paceline.comm.link import Link
from paceline.comm.replica import Shard, VisitedReplica
from paceline.data.rounds import Visit
from paceline.sync.aggregation import Update, wide_zeros
from paceline.sync.base import SyncState


class ControlVariates:
    """Those of the server and of all clients, on one rank."""

    def __init__(self, link: Link, clients: int) -> None:
        self._link, self._clients = link, clients
        self._server: dict[str, Tensor] = {}
        self._own: list[dict[str, Tensor]] = []
        self._made: dict[int, Tensor] = {}

    def start(self, replica: VisitedReplica) -> None:
        """All begin at zero."""
        self._server = {shard.name: wide_zeros(shard) for shard in replica.shards}
        self._own = [{shard.name: wide_zeros(shard) for shard in replica.shards} for _ in range(self._clients)]

    def correct(self, visit: Visit, shard: Shard, gradient: Tensor) -> None:
        """Add c - c_k to the gradient of a local step."""
        gradient.add_(self._server[shard.name]).sub_(self._own[visit.client][shard.name])

    def leave(self, visit: Visit, update: Update, rate: float) -> None:
        """The client is done: its next variate, which the others are told of when the round is over."""
        own, factor = self._own[visit.client], -1.0 / (visit.steps * rate)
        parts = [
            (own[name] - server).add_(update[name], alpha=factor).reshape(-1) for name, server in self._server.items()
        ]
        self._made[visit.place] = torch.cat(parts)

    def close(self, visits: Sequence[Visit]) -> None:
        """Tell each other, and follow with the server's."""
        shapes = [tensor.shape for tensor in self._server.values()]
        numels = [shape.numel() for shape in shapes]
        for visit in visits:
            made = self._made.pop(visit.place, None)
            if made is None:
                made = torch.cat([tensor.reshape(-1) for tensor in self._server.values()])
            self._link.broadcast(made, root=visit.place % self._link.size).wait()
            own = self._own[visit.client]
            for (name, server), new, shape in zip(self._server.items(), made.split(numels), shapes, strict=True):
                server.add_(new.view(shape) - own[name], alpha=1.0 / self._clients)
                own[name].copy_(new.view(shape))

    def state(self) -> Mapping[str, SyncState]:
        """All of them."""
        server = {f"{name}/control": SyncState(tensor, like=name) for name, tensor in self._server.items()}
        return server | {
            f"{name}/control_{client}": SyncState(tensor, like=name)
            for client, own in enumerate(self._own)
            for name, tensor in own.items()
        }
