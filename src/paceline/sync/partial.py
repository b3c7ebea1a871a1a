"""Partial exchange: of each parameter tensor its mean is taken only when it has changed enough, each at its own pace.

    every so many steps    replicas look at the tensors whose turn it is
    change                 |theta_i - theta| / |theta|, of full tensors; theta as all had it when it was last sent
    vote                   whether it is ``threshold`` at least; a tensor is sent if one replica says so
    sent                   theta <- mean of theta_i, by the targets learned from since it was last sent; all go on from
                           it
    not sent               each replica keeps what it learned, which counts at the next look
    pace                   a tensor that was sent is looked at twice as often from there, up to every time; one that was
                           not half as often, down to once in ``longest`` times

Whether to send is decided by the votes of all, so all decide alike; the paces follow from these decisions. Nothing is
lost: what is not sent stays in the replica's parameters. The last step of a run sends everything. With a threshold of 0
it is local SGD, bit for bit.

The threshold is Gaia's significance filter (Hsieh et al. 2017, NSDI, section 3.2) for whole tensors, the pace after
FedLAMA (Lee et al. 2021, arXiv 2110.10302), which gives each layer an interval of its own; the rules here are ours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from paceline.comm.replica import Replica, Shard
from paceline.config import Count, NonNegative, Positive, SyncOptions
from paceline.plan.wire import all_reduce_bytes, all_reduce_delays
from paceline.sync.alone import Alone, exchanges, share_of, wide
from paceline.sync.base import COUNT_BYTES, Shapes, SyncContext, SyncState
from paceline.sync.reducers.mean import Mean


class Partial(SyncOptions):
    """Local SGD in which a tensor is sent only when it has changed enough since it was last sent."""

    every: Count = 10
    """Steps from one look at the tensors to the next."""
    threshold: NonNegative = 0.01
    """By how much a tensor has to change, relative to its norm."""
    longest: Count = 8
    """Looks after which a tensor is looked at again at the latest."""
    bucket_mib: Positive = 32.0
    """Tensors are sent in buckets of about this size."""

    sends_less: ClassVar[bool] = True
    """``wire_bytes`` is the most that can be: what is sent depends on what is learned."""

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """At most: at each look all tensors, a vote and the targets of each, and a request to stop."""
        numbers = all_reduce_bytes(COUNT_BYTES, members) + all_reduce_bytes(2 * COUNT_BYTES * len(shapes), members)
        return exchanges(self.every, steps) * (self.mean.wire_bytes(shapes, members) + numbers)

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """At most: at each look a request to stop, the votes, then the tensors."""
        stop = all_reduce_delays(COUNT_BYTES, members)
        votes = all_reduce_delays(2 * COUNT_BYTES * len(shapes), members)
        return exchanges(self.every, steps) * (stop + votes + self.mean.delays(shapes, members))

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The parameters as they were sent and times their shares, buckets to send from, and three numbers a tensor."""
        copies = 2 * sum(4 * math.prod(shape) for shape in shapes.values())
        return copies + self.mean.state_bytes(shapes) + 3 * COUNT_BYTES * len(shapes)

    def build(self, context: SyncContext) -> "PartialSync":
        """The strategy at work."""
        return PartialSync(context, self)

    @property
    def mean(self) -> Mean:
        """How tensors are summed."""
        return Mean(bucket_mib=self.bucket_mib)


class PartialSync(Alone):
    """Partial exchange on one rank."""

    def __init__(self, context: SyncContext, options: Partial) -> None:
        super().__init__(context)
        self._context, self._options = context, options
        self._sent: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}
        self._pace: dict[str, Tensor] = {}

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and keep the parameters they start from."""
        super().start(replica)
        self._sent = {shard.name: shard.local.clone() for shard in replica.shards}
        self._targets = {name: torch.zeros(1, dtype=torch.float64) for name in self._sent}  # since it was last sent
        self._pace = {
            name: torch.ones(2, dtype=torch.float64) for name in self._sent
        }  # looks: its pace, and those left

    def is_agreed(self, step: int) -> bool:
        """After the last step; where everything is sent, whenever replicas talk."""
        return step == self._steps or (self._options.threshold == 0 and self._talks(step))

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """The mean of now."""
        return self._mean(replica.shards, self._sum(*(self._targets[s.name].item() for s in replica.shards)))

    def state(self) -> Mapping[str, SyncState]:
        """Parameters as they were sent, the targets since, and the paces."""
        state: dict[str, SyncState] = {}
        for name, sent in self._sent.items():
            state[f"{name}/sent"] = SyncState(sent, like=name)
            state[f"{name}/targets"] = SyncState(self._targets[name], rule="fresh")
            state[f"{name}/pace"] = SyncState(self._pace[name])
        return state

    def _talks(self, step: int) -> bool:
        return step == self._steps or step % self._options.every == 0

    @torch.no_grad()
    def _stepped(self, replica: Replica, targets: int) -> None:
        for since in self._targets.values():
            since += targets
        if self._talks(self._step):
            self._look(replica)

    def _look(self, replica: Replica) -> None:
        """Vote on the tensors whose turn it is, and send those that are to be sent."""
        is_last = self._step == self._steps
        for pace in self._pace.values():
            pace[1] -= 1
        looked = [shard for shard in replica.shards if is_last or self._pace[shard.name][1] <= 0]
        if not looked:
            return
        wishes = self._wishes(replica, looked)
        votes, targets = self._sum(*wishes, *(self._targets[s.name].item() for s in looked)).chunk(2)
        to_send = [i for i, n in enumerate(votes.tolist()) if is_last or n > 0]
        chosen = [looked[i] for i in to_send]
        mean = self._mean(chosen, targets[to_send])
        for shard in chosen:
            self._put(shard, mean[shard.name])
            self._sent[shard.name].copy_(shard.local)
            self._targets[shard.name].zero_()
        for shard in looked:
            pace = self._pace[shard.name]
            pace[:] = pace[0] // 2 if shard.name in mean else pace[0] * 2
            pace.clamp_(1, self._options.longest)
        replica.refresh()

    def _wishes(self, replica: Replica, looked: Sequence[Shard]) -> list[float]:
        """This replica's votes: the same on all ranks of it."""
        moved = {shard.name: wide(shard.local) - wide(self._sent[shard.name]) for shard in looked}
        changes = replica.norms(moved)
        sizes = replica.norms({shard.name: self._sent[shard.name] for shard in looked})
        return [float(changes[s.name] >= self._options.threshold * sizes[s.name]) for s in looked]

    def _mean(self, shards: Sequence[Shard], targets: Tensor) -> Mapping[str, Tensor]:
        """Of some parameters, each by the targets that each replica learned from since it was last sent."""
        own = {}
        for shard, all_targets in zip(shards, targets.tolist(), strict=True):
            share = share_of(self._targets[shard.name].item(), all_targets, self._link.size)
            own[shard.name] = wide(shard.local) * share
        reducer = self._options.mean.build(self._context)
        reducer.start(shards)
        return reducer.weighted_sum(own, 1.0, self._step)
