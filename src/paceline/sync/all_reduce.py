"""Synchronous data parallelism: gradients are summed over replicas every step, while the backward pass still runs.

The loss is divided by the number of targets of all replicas before the backward pass, so the sum of the replicas'
gradients is the gradient of the whole batch. With a reducer that leaves something out, see ``reduced``.
"""

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import model_validator

from paceline.comm.link import Link, Pending
from paceline.comm.replica import Finish, Replica, Shard
from paceline.config import ChosenFrom, Natural, Positive, SyncOptions
from paceline.plan.wire import all_reduce_bytes, all_reduce_delays
from paceline.registry import REDUCERS
from paceline.sync.base import COUNT_BYTES, Shapes, SyncContext, SyncState, check_equal_start, start_total
from paceline.sync.buckets import bucketed, elements
from paceline.sync.reduced import ReducedSync
from paceline.sync.reducers.mean import Mean


class AllReduce(SyncOptions):
    """Sum gradients over replicas every step, bucket by bucket, overlapping the backward pass."""

    bucket_mib: Positive = 4.0
    """Gradients are sent in buckets of about this size: small ones start early, large ones waste less."""

    reducer: Annotated[Any, ChosenFrom(REDUCERS)] = Mean()
    """How gradients are summed on the way; any but ``mean`` after the backward pass, and not in buckets."""

    exact_steps: Natural = 0
    """In the first steps gradients are summed as they are, whatever the reducer."""

    keeps_equal: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_buckets(self) -> Self:
        plain, given = AllReduce.model_fields["bucket_mib"].default, self.bucket_mib
        if isinstance(self.reducer, Mean):
            if self.reducer != Mean():
                raise ValueError(
                    f"bucket_mib={given}: expected that of sync, got reducer.bucket_mib too; leave that out"
                )
            if self.exact_steps:
                raise ValueError(f"exact_steps={self.exact_steps}: all steps are with reducer=mean; leave it out")
        elif given != plain:
            raise ValueError(f"bucket_mib={given}: expected none, for only reducer=mean sends buckets; leave it out")
        return self

    @property
    def is_exact(self) -> bool:
        """Whether the sum is what one process with the whole batch would have."""
        exact: bool = self.reducer.is_exact
        return exact

    @property
    def keeps_own(self) -> bool:
        """Whether each replica keeps something of its own beside the state that all have: what is still to be sent."""
        return getattr(self.reducer, "error_feedback", False)

    @property
    def sends_evenly(self) -> bool:
        """But for the first steps, if these are to be exact."""
        return self.exact_steps == 0

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """In every step gradients, a mark for each, and four numbers: targets before, three sums after."""
        numels = [math.prod(shape) for shape in shapes.values()]
        counts = all_reduce_bytes(COUNT_BYTES, members) + all_reduce_bytes(3 * COUNT_BYTES, members)
        if not self.is_exact:
            marks = all_reduce_bytes(4 * len(numels), members)
            first = min(self.exact_steps, steps)
            reduced: int = self.reducer.wire_bytes(shapes, members)
            return first * Mean().wire_bytes(shapes, members) + (steps - first) * reduced + steps * (marks + counts)
        buckets = bucketed(numels, elements(self.bucket_mib))
        gradients = sum(
            all_reduce_bytes(value_bytes * sum(numels[i] + 1 for i in bucket), members) for bucket in buckets
        )
        return steps * (gradients + counts)

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """In every step the targets, then gradients and losses at once; with a reducer targets cost no wait."""
        numels = [math.prod(shape) for shape in shapes.values()]
        if self.is_exact:
            buckets = [sum(numels[i] + 1 for i in bucket) for bucket in bucketed(numels, elements(self.bucket_mib))]
            gradients = max((all_reduce_delays(4 * numel, members) for numel in buckets), default=0)
            return steps * (all_reduce_delays(COUNT_BYTES, members) + gradients)
        first, marks = min(self.exact_steps, steps), all_reduce_delays(4 * len(numels), members)
        reduced = max(marks, int(self.reducer.delays(shapes, members)))
        return first * max(marks, Mean().delays(shapes, members)) + (steps - first) * reduced

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The buckets: one copy of the gradients, in what they are summed in; or what the reducer needs."""
        if not self.is_exact:
            reduced: int = self.reducer.state_bytes(shapes)
            return reduced
        return sum(value_bytes * (math.prod(shape) + 1) for shape in shapes.values())

    def build(self, context: SyncContext) -> "AllReduceSync | ReducedSync":
        """The strategy at work."""
        if not self.is_exact:
            return ReducedSync(
                context,
                self.reducer.build(context),
                exact=Mean().build(context),
                exact_steps=self.exact_steps,
            )
        return AllReduceSync(context.link, elements(self.bucket_mib))


class _Bucket:
    """A flat buffer of the gradients of a few shards, with a mark for each that has one.

    A parameter without a gradient in every replica must stay without one (an optimizer would decay it otherwise), so
    the number of replicas that have it is summed along with the gradients. Where it can, the buffer is the gradients'
    own memory from then on, until the next step fills it: nothing is copied back, and they are not in memory twice.
    """

    def __init__(self, shards: list[Shard], reduction: torch.dtype | None) -> None:
        self.shards = shards
        sizes = [shard.local.numel() for shard in shards]
        dtype = functools.reduce(torch.promote_types, (shard.summed_in(reduction) for shard in shards))
        self.buffer = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=shards[0].local.device)
        *self.views, self.marks = self.buffer.split([*sizes, len(sizes)])
        self.waiting = len(shards)
        self.pending: Pending | None = None

    def clear(self) -> None:
        self.waiting = len(self.shards)
        self.pending = None

    def fill(self) -> None:
        for i, (shard, view) in enumerate(zip(self.shards, self.views, strict=True)):
            gradient = shard.gradient
            if gradient is None:
                view.zero_()
            else:
                view.copy_(gradient.reshape(-1))
                if self._is_home(shard):
                    shard.parameter.grad = None
            self.marks[i] = float(gradient is not None)

    def empty(self) -> None:
        present = self.marks.tolist()
        for shard, view, mark in zip(self.shards, self.views, present, strict=True):
            if self._is_home(shard):
                shard.parameter.grad = view.view(shard.parameter.shape) if mark > 0 else None
            else:
                shard.set_gradient(view if mark > 0 else None)

    def _is_home(self, shard: Shard) -> bool:
        return shard.is_plain and shard.parameter.dtype == self.buffer.dtype


class AllReduceSync:
    """The all-reduce strategy on one rank."""

    def __init__(self, link: Link, bucket_numel: int) -> None:
        self.link = link
        self._bucket_numel = bucket_numel
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[str, _Bucket] = {}
        self._launched = 0

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and plan the buckets."""
        check_equal_start(self.link, replica)
        numels = [shard.local.numel() for shard in replica.shards]
        groups = bucketed(numels, self._bucket_numel) if self.link.size > 1 else []
        self._buckets = [_Bucket([replica.shards[i] for i in group], replica.reduction) for group in groups]
        self._bucket_of = {shard.name: bucket for bucket in self._buckets for shard in bucket.shards}
        self._device = replica.shards[0].local.device

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """All replicas' targets; from here on, a full bucket is sent as soon as those before it have been."""
        for bucket in self._buckets:
            bucket.clear()
        self._launched = 0
        replica.on_gradient_ready(self._ready)
        total = torch.tensor([count], dtype=torch.int64, device=self._device)
        self.link.all_reduce(total).wait()
        return int(total.item())

    def reduce(
        self, replica: Replica, values: torch.Tensor | None = None, stop: bool = False
    ) -> tuple[torch.Tensor, bool]:
        """Put the sums of all replicas in the place of their gradients; all stop if one was asked to."""
        told = start_total(self.link, values, stop, self._device)
        for bucket in self._buckets:
            assert bucket.pending is not None
            bucket.pending.wait()
            bucket.empty()
        return told()

    def update(self, replica: Replica) -> Finish:
        """Step, or do not, as all others: summed gradients are the same bits in all replicas.

        What is not finite in one is so in the sum, and the loss scale, which follows from that, is the same in all.
        """
        return replica.finish(vote=lambda wish: wish)

    def is_agreed(self, step: int) -> bool:
        """Always."""
        return True

    def agreed(self, replica: Replica) -> Mapping[str, torch.Tensor]:
        """Their own."""
        return {shard.name: shard.local for shard in replica.shards}

    def state(self) -> Mapping[str, SyncState]:
        """Nothing outlives a step."""
        return {}

    def _ready(self, shard: Shard) -> None:
        if bucket := self._bucket_of.get(shard.name):
            bucket.waiting -= 1
            self._launch()

    def _launch(self) -> None:
        # Always in bucket order: exchanges are matched by the order in which they start.
        while self._launched < len(self._buckets) and self._buckets[self._launched].waiting == 0:
            bucket = self._buckets[self._launched]
            bucket.fill()
            bucket.pending = self.link.all_reduce(bucket.buffer)
            self._launched += 1
