"""No encoding: tensors are summed in their own dtype, fp32 or fp64."""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from paceline.comm.link import Link
from paceline.comm.replica import Shard
from paceline.config import Options, Positive
from paceline.plan.wire import all_reduce_bytes, all_reduce_delays
from paceline.sync.base import Shapes, SyncContext, SyncState
from paceline.sync.buckets import bucketed, elements
from paceline.sync.reducers.base import Wait


class Mean(Options):
    """Sum the tensors as they are."""

    bucket_mib: Positive = 2.0
    """Tensors are sent in buckets of about this size: several are under way at once, and fill each other's pauses."""

    is_exact: ClassVar[bool] = True
    ns_per_value: ClassVar[float] = 0
    source: ClassVar[str] = "no encoding"

    def wire_bytes(self, shapes: Shapes, members: int) -> int:
        """The tensors once round a ring."""
        numels = [math.prod(shape) for shape in shapes.values()]
        buckets = bucketed(numels, elements(self.bucket_mib))
        return sum(all_reduce_bytes(4 * sum(numels[i] for i in bucket), members) for bucket in buckets)

    def delays(self, shapes: Shapes, members: int) -> int:
        """Of the slowest bucket, for all are on their way together."""
        numels = [math.prod(shape) for shape in shapes.values()]
        buckets = bucketed(numels, elements(self.bucket_mib))
        return max((all_reduce_delays(4 * sum(numels[i] for i in bucket), members) for bucket in buckets), default=0)

    def late_delays(self, shapes: Shapes, members: int) -> int:
        """None: it is one exchange."""
        return 0

    def state_bytes(self, shapes: Shapes) -> int:
        """A copy to send from, while it is sent."""
        return sum(4 * math.prod(shape) for shape in shapes.values())

    def build(self, context: SyncContext) -> "MeanReducer":
        """The reducer at work."""
        return MeanReducer(context.link, elements(self.bucket_mib))


class MeanReducer:
    """Sums over a link, bucket by bucket."""

    def __init__(self, link: Link, bucket_numel: int) -> None:
        self._link = link
        self._bucket_numel = bucket_numel
        self._buckets: list[list[Shard]] = []

    def start(self, shards: Sequence[Shard]) -> None:
        """Plan the buckets."""
        groups = bucketed([shard.local.numel() for shard in shards], self._bucket_numel)
        self._buckets = [[shards[i] for i in group] for group in groups]

    def weighted_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Mapping[str, Tensor]:
        """See ``Reducer``."""
        return self.start_sum(values, share, step)()

    def start_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Wait:
        """See ``Reducer``."""
        started = []
        for shards in self._buckets:
            dtype = functools.reduce(torch.promote_types, (values[shard.name].dtype for shard in shards))
            buffer = torch.cat([values[shard.name].reshape(-1).to(dtype) for shard in shards]).mul_(share)
            started.append((shards, buffer, self._link.all_reduce(buffer)))

        def wait() -> Mapping[str, Tensor]:
            sums: dict[str, Tensor] = {}
            for shards, buffer, pending in started:
                pending.wait()
                views = buffer.split([shard.local.numel() for shard in shards])
                sums |= {shard.name: view.view(shard.local.shape) for shard, view in zip(shards, views, strict=True)}
            return sums

        return wait

    def settle(self, unused: Collection[str] = ()) -> None:
        """Nothing to settle."""

    def state(self) -> Mapping[str, SyncState]:
        """Nothing is left out."""
        return {}
