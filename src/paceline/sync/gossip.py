"""Gossip (NoLoCo: Kolehmainen et al. 2025, arXiv 2506.10911): each replica agrees a little with one other at a time.

    rounds    every so many steps; in each, seed and round put the replicas in pairs by chance. Of an odd number one is
              left over, and is a pair with itself
    Delta_i   theta_i - phi_i, what replica i learned since its last round; phi_i are its slow parameters
    delta_i   <- momentum delta_i + lr mean(Delta) - pull (phi_i - mean(phi))       means over the pair
    phi_i     <- phi_i + delta_i, and theta_i <- phi_i

The mean of Delta is weighted by targets, that of phi is plain. The rule is that of the authors' code (jkolehm/noloco,
``sparse_optimizer_c.py``), in which pull is lr. The paper also lets activations go by chance from a stage of one
replica to the next of another, which is not done here. Two replicas are always a pair, and so DiLoCo without Nesterov.

Replicas never agree in all, so each has its own phi and delta; what stands for all is the mean of phi, and the last
step of a run ends with it. Nobody waits for another than its partner: a request to stop goes round between two rounds.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from paceline.comm.link import Pending
from paceline.comm.replica import Replica, Shard
from paceline.config import Count, Fraction, NonNegative, Positive, SyncOptions
from paceline.models.chance import stream_seed
from paceline.plan.wire import MESSAGE_DELAYS, all_reduce_bytes
from paceline.sync.alone import Alone, exchanges, share_of, wide
from paceline.sync.base import COUNT_BYTES, Shapes, SyncContext, SyncState
from paceline.sync.buckets import bucketed, elements
from paceline.sync.reducers.mean import Mean


class Gossip(SyncOptions):
    """Learn alone for some steps, then take one outer step with another replica, drawn anew each time."""

    every: Count = 100
    """Steps from one round to the next."""
    lr: Positive = 0.7
    """The outer rate."""
    momentum: Fraction = 0.5
    """Share of the outer momentum that is kept."""
    pull: NonNegative | None = None
    """How strongly the parameters of a pair are drawn together; the same as ``lr`` if it is not given."""
    bucket_mib: Positive = 32.0
    """Tensors are sent in buckets of about this size."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.pulls > 2:
            key = "lr" if self.pull is None else "pull"
            raise ValueError(
                f"{key}={self.pulls:g} would drive a pair apart: the pull is 2 at most, where they change places"
            )
        return self

    @property
    def pulls(self) -> float:
        """``pull``, or what it is by default."""
        return self.lr if self.pull is None else self.pull

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """In each round phi, Delta and the targets, to one other; of an odd number of replicas the mean over them.

        Requests to stop between rounds; the mean of all at the end.
        """
        rounds = exchanges(self.every, steps)
        if rounds == 0 or members == 1:
            return 0
        once = COUNT_BYTES + 2 * sum(4 * math.prod(shape) for shape in shapes.values())
        stops = (rounds - 1) * all_reduce_bytes(COUNT_BYTES, members)
        return rounds * once * (members - members % 2) // members + stops + self.mean.wire_bytes(shapes, members)

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """In each round the targets, then phi and Delta, in one bucket; the mean of all at the end."""
        if members == 1 or steps == 0:
            return 0
        return 2 * MESSAGE_DELAYS * exchanges(self.every, steps) + self.mean.delays(shapes, members)

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """phi, delta if there is any, and a bucket in both directions or, at the end, those of the mean."""
        n_bytes = [8 * math.prod(shape) for shape in shapes.values()]
        largest = max(sum(n_bytes[i] for i in group) for group in self.buckets(n // 4 for n in n_bytes))
        buffers = max(2 * largest, self.mean.state_bytes(shapes))
        return (1 + (self.momentum > 0)) * sum(n_bytes) // 2 + buffers + COUNT_BYTES

    def buckets(self, numels: Iterable[int]) -> list[list[int]]:
        """Which tensors are sent together; of each there are phi and Delta."""
        return bucketed(list(numels), elements(self.bucket_mib))

    def build(self, context: SyncContext) -> "GossipSync":
        """The strategy at work."""
        return GossipSync(context, self)

    @property
    def mean(self) -> Mean:
        """Over all replicas."""
        return Mean(bucket_mib=self.bucket_mib)


def partner_of(index: int, replicas: int, *, seed: int, turn: int) -> int:
    """Whom a replica meets in a round; itself if it is left over."""
    order = sorted(range(replicas), key=lambda replica: stream_seed(seed, "gossip", turn, replica))
    place = order.index(index)
    return order[min(place ^ 1, replicas - 1)]


class GossipSync(Alone):
    """Gossip on one rank."""

    def __init__(self, context: SyncContext, options: Gossip) -> None:
        super().__init__(context)
        self._options = options
        self._reducer = options.mean.build(context)
        self._buckets: list[list[Shard]] = []
        self._slow: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._window = torch.zeros(1, dtype=torch.float64)  # targets since the last round
        self._asked: tuple[Tensor, Pending] | None = None

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and keep the parameters they start from."""
        super().start(replica)
        self._reducer.start(replica.shards)
        self._slow = {shard.name: shard.local.clone() for shard in replica.shards}
        if self._options.momentum > 0:
            self._momentum = {name: torch.zeros_like(wide(slow)) for name, slow in self._slow.items()}
        groups = self._options.buckets(2 * slow.numel() for slow in self._slow.values())
        self._buckets = [[replica.shards[i] for i in group] for group in groups]

    def total(self, values: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """This replica's own values. All stop in the round after that in which one said that it was asked to."""
        if self._link.size == 1:
            return values, stop
        if not self._talks(self._step):
            return values, False
        heard = self._heard()
        if self._step < self._steps and not heard:
            asked = torch.tensor([float(stop)], dtype=torch.float64, device=self._device)
            self._asked = asked, self._link.all_reduce(asked)
        return values, heard

    def is_agreed(self, step: int) -> bool:
        """At the end only."""
        return step == self._steps

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """The mean of the slow parameters."""
        slow = {name: wide(tensor) for name, tensor in self._slow.items()}
        return self._reducer.weighted_sum(slow, 1.0 / self._link.size, self._step)

    def state(self) -> Mapping[str, SyncState]:
        """The window, and this replica's slow parameters and their momentum."""
        if self._asked is not None:
            self._asked[1].wait()  # so that nothing is on its way where a run ends
        own = {"slow": self._slow, "slow_momentum": self._momentum}
        kept = {
            f"{name}/{what}": SyncState(tensor, like=name, rule="mean")
            for what, tensors in own.items()
            for name, tensor in tensors.items()
        }
        return {"window": SyncState(self._window, rule="fresh")} | kept

    def _talks(self, step: int) -> bool:
        return step == self._steps or step % self._options.every == 0

    def _heard(self) -> bool:
        """Whether a replica said in the last round that it was asked to stop."""
        if self._asked is None:
            return False
        (asked, pending), self._asked = self._asked, None
        pending.wait()
        return asked.item() > 0

    @torch.no_grad()
    def _stepped(self, replica: Replica, targets: int) -> None:
        self._window += targets
        if not self._talks(self._step):
            return
        turn = exchanges(self._options.every, self._step)
        partner = partner_of(self._link.index, self._link.size, seed=self._seed, turn=turn)
        if partner == self._link.index:
            self._alone(replica)
        else:
            self._meet(partner)
        if self._step == self._steps and self._link.size > 1:
            mean = self.agreed(replica)
            for shard in replica.shards:
                self._round(shard, mean[shard.name], self._slow[shard.name], "mean", self._step)
                shard.local.copy_(self._slow[shard.name])
        self._window.zero_()
        replica.refresh()

    def _alone(self, replica: Replica) -> None:
        """Take the outer step of a pair with oneself; as an interpolation, which is exact at a rate of 1."""
        for shard in replica.shards:
            slow, own = wide(self._slow[shard.name]), wide(shard.local)
            self._go(shard, torch.lerp(slow, own, self._options.lr), (own - slow).mul_(self._options.lr))

    def _meet(self, partner: int) -> None:
        """Take the outer step with what the other has. Both add the same two terms: where they agree they stay so."""
        learned = self._window.item()
        theirs = self._swap(self._window.to(self._device), partner).item()
        shares = [share_of(own, learned + theirs, 2) for own in (learned, theirs)]
        for shards in self._buckets:
            values = [wide(self._slow[shard.name]).reshape(-1) for shard in shards]
            own = torch.cat(values).repeat(2, 1)
            slow, moved = own
            torch.sub(torch.cat([wide(shard.local).reshape(-1) for shard in shards]), slow, out=moved)
            their_slow, their_moved = self._swap(own, partner)
            moved.mul_(shares[0]).add_(their_moved.mul_(shares[1])).mul_(self._options.lr)
            moved.add_(their_slow.sub_(slow), alpha=self._options.pulls / 2)
            sizes = [shard.local.numel() for shard in shards]
            for shard, after, by in zip(shards, slow.add_(moved).split(sizes), moved.split(sizes), strict=True):
                self._go(shard, after.view(shard.local.shape), by.view(shard.local.shape))

    def _go(self, shard: Shard, after: Tensor, by: Tensor) -> None:
        """To ``after``, which is ``by`` from here, and on from there with what is left of the steps before."""
        if self._momentum:
            momentum = self._momentum[shard.name].mul_(self._options.momentum)
            after = after + momentum
            momentum.add_(by)
        self._put(shard, after)
        self._slow[shard.name].copy_(shard.local)

    def _swap(self, own: Tensor, partner: int) -> Tensor:
        """What the other sends in exchange; of the two the first sends first, on links that do one after the other."""
        theirs = torch.empty_like(own)
        first = self._link.index < partner
        started = [self._link.send(own, partner)] if first else []
        started.append(self._link.receive(theirs, partner))
        started += [] if first else [self._link.send(own, partner)]
        for pending in started:
            pending.wait()
        return theirs
