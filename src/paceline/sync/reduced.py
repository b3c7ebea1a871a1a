"""Gradients summed over replicas by a reducer that leaves something out, in every step after the backward pass.

In a step that is not taken (a gradient overflowed, in whatever replica or level) nothing may be lost of what was to be
sent. Whether it is taken is known when all levels have summed, so the reducer keeps what it had until then. Values go
into it without the loss scale, which may change until what was left out is sent.

In the first ``exact_steps`` gradients are summed as they are: what is left out counts most where most is learned. An
optimizer may have something else than gradients summed after that (1-bit Adam).

Nobody waits for numbers. The loss is divided by the replica's own targets, and gradients are weighted by its share when
the targets of all are known, which were sent before the backward pass; losses are on their way with the gradients.
Below another level the loss is divided by what that one names, which has to know the targets of the group.

Replicas hold the same weights and moments after every step; what is left out each has for itself.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from paceline.comm.link import Pending
from paceline.comm.replica import Finish, Replica, Shard
from paceline.sync.alone import share_of
from paceline.sync.base import SyncContext, SyncState, check_equal_start, start_total
from paceline.sync.reducers.base import Reducer


class ReducedSync:
    """All-reduce with a reducer, on one rank."""

    def __init__(self, context: SyncContext, reducer: Reducer, *, exact: Reducer, exact_steps: int) -> None:
        self._link, self._reducer, self._divides = context.link, reducer, context.is_outermost
        self._exact, self._exact_steps = exact, exact_steps
        self._step = self._count = 0
        self._targets: tuple[Tensor, Pending]
        self._unused: list[str] = []
        """Parameters that had no gradient in any replica."""

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and plan."""
        check_equal_start(self._link, replica)
        self._device = replica.shards[0].local.device
        self._reducer.start(replica.shards)
        self._exact.start(replica.shards)

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """This replica's own targets; below another level those of all."""
        self._step, self._count = step, count
        total = torch.tensor([count], dtype=torch.int64, device=self._device)
        self._targets = total, self._link.all_reduce(total)
        return count if self._divides else self._all_targets()

    @torch.no_grad()
    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """Put the sums of all replicas in the place of their gradients; what no replica has stays without one."""
        shards, scale = replica.shards, replica.gradient_scale
        told = start_total(self._link, values, stop, self._device)
        marks = torch.tensor([shard.gradient is not None for shard in shards], dtype=torch.int32, device=self._device)
        marked = self._link.all_reduce(marks)
        gradients = {shard.name: _wide(shard) / scale for shard in shards}
        share = share_of(self._count, self._all_targets(), self._link.size) if self._divides else 1.0
        if self._is_exact:
            sums = self._exact.weighted_sum(gradients, share, self._step)
        else:
            sums = self._reducer.weighted_sum(replica.outgoing(gradients), share, self._step)
        marked.wait()
        self._unused = []
        for shard, mark in zip(shards, marks.tolist(), strict=True):
            if mark == 0:
                self._unused.append(shard.name)
            shard.set_gradient(sums[shard.name] * scale if mark else None)
        return told()

    def update(self, replica: Replica) -> Finish:
        """Step, or do not, as all others: sums are the same bits in all replicas."""
        finish = replica.finish(vote=lambda wish: wish)
        if not self._is_exact:
            self._reducer.settle(self._unused if finish.stepped else [shard.name for shard in replica.shards])
        return finish

    def _all_targets(self) -> int:
        total, pending = self._targets
        pending.wait()
        return int(total.item())

    @property
    def _is_exact(self) -> bool:
        return self._step <= self._exact_steps

    def is_agreed(self, step: int) -> bool:
        """Always."""
        return True

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """Their own."""
        return {shard.name: shard.local for shard in replica.shards}

    def state(self) -> Mapping[str, SyncState]:
        """What is still to be sent."""
        return self._reducer.state()


def _wide(shard: Shard) -> Tensor:
    """The gradient in fp32 at least; zeros if there is none."""
    dtype, gradient = shard.summed_in(None), shard.gradient
    return torch.zeros_like(shard.local, dtype=dtype) if gradient is None else gradient.to(dtype)
