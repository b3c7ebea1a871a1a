"""The mean of a round's updates by secure aggregation, with simulated clients.

Each client codes its update in fixed point and masks it; replicas add up masked vectors, and what masks come to is
taken off at the end. Clients of the round that came too late are those who dropped out: they had shared their secrets,
and the others open their masks. All clients are played here, and their keys follow from the seed, so that every replica
knows the few messages of all of them: this shows what the protocol computes and costs, and hides nothing.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from paceline.comm.link import Link
from paceline.comm.replica import VisitedReplica
from paceline.config import Count, Options, Positive
from paceline.data.rounds import Round, Visit
from paceline.sync.aggregation import Update
from paceline.sync.base import SyncContext, SyncState
from paceline.sync.secure.fixed_point import FixedPoint
from paceline.sync.secure.primitives import Words, primitives
from paceline.sync.secure.protocol import Client, Opening, graph
from paceline.sync.secure.shamir import Random


class SecureOptions(Options):
    """A server that sees sums of updates only (SecAgg+)."""

    neighbours: Count | None = None
    """With how many others each client shares its secrets, an even number; default: all of up to 32, then 6 log2 n."""
    threshold: Count | None = None
    """How many of them open a secret; default: more than half. The others may drop out, at every stage."""
    most: Positive = 1.0
    """Greatest absolute value of a coordinate of an update; larger ones are cut."""
    bits: int = Field(default=32, ge=8, le=32)
    """Of the integers in which updates are added up."""

    @model_validator(mode="after")
    def _is_even(self) -> Self:
        if self.neighbours is not None and self.neighbours % 2:
            raise ValueError(f"neighbours={self.neighbours} is odd; expected as many on either side")
        return self

    def degree(self, clients: int) -> int:
        """Neighbours of a client, of so many in all."""
        own = self.neighbours or (clients if clients <= 32 else 2 * math.ceil(3 * math.log2(clients)))
        return min(own, clients - 1)

    def opens(self, clients: int) -> int:
        """Neighbours that open a secret."""
        return self.threshold or self.degree(clients) // 2 + 1

    def refused(self, clients: int, come: int) -> str | None:
        """Why it cannot be with so many clients that are asked, of which ``come`` are waited for, or None."""
        degree, opens = self.degree(clients), self.opens(clients)
        if come < 3:
            return f"secure: of {come} clients a round each knows the other from the sum. Use 3 or more"
        if not degree // 2 < opens <= degree:
            return (
                f"secure.threshold={opens} of {degree} neighbours: two groups of them could each open another secret "
                f"of a client, or nobody any. Use {degree // 2 + 1} to {degree}"
            )
        if degree == clients - 1 and come - 1 < opens:
            return (
                f"secure: of {clients} clients asked {come} come, each with {come - 1} neighbours, and {opens} "
                "are needed to open the sum. Use a smaller over_selection, or more clients_per_round"
            )
        if FixedPoint(bits=self.bits, most=self.most, clients=clients).steps * self.most < 1:
            return f"secure.bits={self.bits} are too few to add up {clients} updates. Use up to 32"
        return None


class SecureMean:
    """See ``Aggregation``; on one rank, which masks its own parts."""

    def __init__(self, context: SyncContext, options: SecureOptions) -> None:
        self._link: Link = context.link
        self._options, self._seed, self._rank = options, context.seed, context.rank
        self._primitives = primitives()

    def start(self, replica: VisitedReplica) -> None:
        """Nothing is summed yet."""
        self._shapes = {shard.name: shard.local.shape for shard in replica.shards}
        self._numel = sum(shape.numel() for shape in self._shapes.values())
        self._device = replica.shards[0].local.device
        self._dtype = torch.promote_types(replica.shards[0].local.dtype, torch.float32)

    def open(self, whole: Round, step: int) -> None:
        """All who were asked make their keys and share their secrets."""
        asked = sorted([*(visit.client for visit in whole.visits), *whole.late])
        n = len(asked)
        self._place = {client: place for place, client in enumerate(asked)}
        self._code = FixedPoint(bits=self._options.bits, most=self._options.most, clients=n)
        self._threshold = self._options.opens(n)
        neighbours = graph(n, self._options.degree(n), (self._seed, "secure", step))
        self._clients = [
            Client(place, own, self._threshold, self._primitives, self._random(step, client), self._options.bits)
            for place, (client, own) in enumerate(zip(asked, neighbours, strict=True))
        ]
        public = {client.index: client.public for client in self._clients}
        sealed = {client.index: client.share(public) for client in self._clients}
        self._inbox = [{i: sealed[i][place] for i in own} for place, own in enumerate(neighbours)]
        self._public, self._neighbours = public, dict(enumerate(neighbours))
        self._total = np.zeros(self._numel, np.uint32)

    def take(self, visit: Visit, update: Update, *, weight: float, scale: float, loss: float) -> None:
        """Code, mask and add a client's update."""
        flat = torch.cat([update[name].reshape(-1).double().cpu() for name in self._shapes]).numpy()
        place = self._place[visit.client]
        self._total += self._clients[place].mask(self._inbox[place], self._code.encode(flat * scale), self._rank)

    def told(self) -> Sequence[float]:
        """Nothing that is not masked."""
        return ()

    def result(self, told: Sequence[float], visits: Sequence[Visit], step: int) -> Update:
        """Add up, open, and read the mean."""
        summed = torch.from_numpy(self._total.astype(np.int64)).to(self._device)
        self._link.all_reduce(summed).wait()
        total: Words = summed.cpu().numpy().astype(np.uint32)
        came = [self._place[visit.client] for visit in visits]
        for place in came:
            self._clients[place].receive(self._inbox[place])
        opened = {place: self._clients[place].unmask(came) for place in came}
        opening = Opening(self._public, self._neighbours, came, opened, self._threshold, self._primitives)
        total -= opening.masks(self._numel, self._rank)
        mean = torch.from_numpy(self._code.decode(total) / len(visits)).to(self._device, self._dtype)
        parts: Sequence[Tensor] = mean.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def state(self) -> dict[str, SyncState]:
        """Nothing outlives a round."""
        return {}

    def _random(self, step: int, client: int) -> Random:
        """Bytes that follow from (seed, round, client), one call after the other."""
        calls = iter(range(1 << 30))

        def draw(count: int) -> bytes:
            return hashlib.shake_256(f"secure/{self._seed}/{step}/{client}/{next(calls)}".encode()).digest(count)

        return draw
