"""The mean of a round's updates by secure aggregation, with simulated clients.

Each client codes its update in fixed point and masks it; replicas add up masked vectors, and what masks come to is
taken off at the end. Clients of the round that came too late are those who dropped out: they had shared their secrets,
and the others open their masks. All clients are played here, and their keys follow from the seed, so that every replica
knows the few messages of all of them: this shows what the protocol computes and costs, and hides nothing. Clients that
are processes of their own play the same protocol over the wire (``sync.remote``), and here masked vectors are added up.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
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


class MaskedMean:
    """See ``Aggregation``: adds up vectors that clients have masked, and takes off what their masks come to.

    On one rank, of its own parts. ``opening``, what the clients have opened in the round, is given before ``result``.
    """

    opening: Opening

    def __init__(self, context: SyncContext, options: SecureOptions) -> None:
        self._link: Link = context.link
        self._options, self._seed, self._rank = options, context.seed, context.rank

    def start(self, replica: VisitedReplica) -> None:
        """Nothing is summed yet."""
        self._shapes = {shard.name: shard.local.shape for shard in replica.shards}
        self._numel = sum(shape.numel() for shape in self._shapes.values())
        self._device = replica.shards[0].local.device
        self._dtype = torch.promote_types(replica.shards[0].local.dtype, torch.float32)

    def open(self, whole: Round, step: int) -> None:
        """All who were asked are in the round, also those who come too late."""
        self._code = code(self._options, len(whole.visits) + len(whole.late))
        self._total = np.zeros(self._numel, np.uint32)

    def take(self, visit: Visit, update: Update, *, weight: float, scale: float, loss: float) -> None:
        """Add a masked vector."""
        self._total += update[MASKED].numpy().view(np.uint32)

    def told(self) -> Sequence[float]:
        """Nothing that is not masked."""
        return ()

    def result(self, told: Sequence[float], visits: Sequence[Visit], step: int) -> Update:
        """Take off the masks of all replicas' clients, and read the mean."""
        summed = torch.from_numpy(self._total.astype(np.int64)).to(self._device)
        self._link.all_reduce(summed).wait()
        total: Words = summed.cpu().numpy().astype(np.uint32)
        total -= self.opening.masks(self._numel, self._rank)
        mean = torch.from_numpy(self._code.decode(total) / len(visits)).to(self._device, self._dtype)
        parts: Sequence[Tensor] = mean.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def state(self) -> dict[str, SyncState]:
        """Nothing outlives a round."""
        return {}


class SecureMean(MaskedMean):
    """The same with clients that are all played here, each of which masks its own update."""

    def __init__(self, context: SyncContext, options: SecureOptions) -> None:
        super().__init__(context, options)
        self._primitives = primitives()

    def open(self, whole: Round, step: int) -> None:
        """All who were asked make their keys and share their secrets."""
        super().open(whole, step)
        asked = sorted([*(visit.client for visit in whole.visits), *whole.late])
        n = len(asked)
        self._place = {client: place for place, client in enumerate(asked)}
        self._threshold = self._options.opens(n)
        neighbours = neighbours_of(self._options, n, self._seed, step)
        self._clients = [
            Client(place, own, self._threshold, self._primitives, self._random(step, client), self._options.bits)
            for place, (client, own) in enumerate(zip(asked, neighbours, strict=True))
        ]
        public = {client.index: client.public for client in self._clients}
        sealed = {client.index: client.share(public) for client in self._clients}
        self._inbox = [{i: sealed[i][place] for i in own} for place, own in enumerate(neighbours)]
        self._public, self._neighbours = public, dict(enumerate(neighbours))

    def take(self, visit: Visit, update: Update, *, weight: float, scale: float, loss: float) -> None:
        """Code, mask and add a client's update."""
        place = self._place[visit.client]
        codes = self._code.encode(flattened(update, list(self._shapes)) * scale)
        masked = self._clients[place].mask(self._inbox[place], codes, self._rank)
        super().take(visit, as_masked(masked), weight=weight, scale=scale, loss=loss)

    def result(self, told: Sequence[float], visits: Sequence[Visit], step: int) -> Update:
        """Open, and read the mean."""
        came = [self._place[visit.client] for visit in visits]
        for place in came:
            self._clients[place].receive(self._inbox[place])
        opened = {place: self._clients[place].unmask(came) for place in came}
        self.opening = Opening(self._public, self._neighbours, came, opened, self._threshold, self._primitives)
        return super().result(told, visits, step)

    def _random(self, step: int, client: int) -> Random:
        """Bytes that follow from (seed, round, client), one call after the other."""
        return stream(f"secure/{self._seed}/{step}/{client}".encode())


MASKED = "masked"
"""The name of a masked vector, which stands in place of an update."""


def as_masked(words: Words) -> Update:
    """A masked vector as an update."""
    return {MASKED: torch.from_numpy(words.view(np.uint8))}


def flattened(update: Update, names: Sequence[str]) -> NDArray[np.float64]:
    """All values of an update, one tensor after the other."""
    flat: NDArray[np.float64] = torch.cat([update[name].reshape(-1).double().cpu() for name in names]).numpy()
    return flat


def code(options: SecureOptions, asked: int) -> FixedPoint:
    """How the values of an update are coded, of so many clients."""
    return FixedPoint(bits=options.bits, most=options.most, clients=asked)


def neighbours_of(options: SecureOptions, asked: int, seed: int, step: int) -> list[list[int]]:
    """Who shares secrets with whom in a round: places among those asked, by place."""
    return graph(asked, options.degree(asked), (seed, "secure", step))


def stream(secret: bytes) -> Random:
    """Bytes that follow from a secret, one call after the other."""
    calls = iter(range(1 << 30))

    def draw(count: int) -> bytes:
        return hashlib.shake_256(secret + f"/{next(calls)}".encode()).digest(count)

    return draw
