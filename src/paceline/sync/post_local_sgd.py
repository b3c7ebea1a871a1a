"""Post-local SGD (Lin et al. 2020, arXiv 1808.07217): all-reduce while much is learned a step, local SGD after that.

Up to and including step ``start`` gradients are summed in every step; periods are counted from there.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from paceline.comm.replica import Finish, Replica
from paceline.config import ChosenFrom, Count, Natural, Positive, SyncOptions
from paceline.registry import REDUCERS
from paceline.sync.all_reduce import AllReduce, AllReduceSync
from paceline.sync.base import Shapes, SyncContext, SyncState
from paceline.sync.periodic import PeriodicSync, periodic_delays, periodic_state_bytes, periodic_wire_bytes
from paceline.sync.reducers.mean import Mean


class PostLocalSGD(SyncOptions):
    """All-reduce up to a step, local SGD from there on."""

    start: Natural = 1000
    """The last step in which gradients are summed; the paper's is that of the first drop of the rate."""
    every: Count = 10
    """Steps from one mean of the parameters to the next, after that."""
    reducer: Annotated[Any, ChosenFrom(REDUCERS)] = Mean()
    """How parameters are summed on the way."""
    bucket_mib: Positive = 4.0
    """Gradients are sent in buckets of about this size."""

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """All-reduce's in the first steps, local SGD's in the others."""
        first = min(self.start, steps)
        after = periodic_wire_bytes(self.reducer, self.every, shapes, members, steps - first)
        return self._all_reduce.wire_bytes(shapes, members, first, value_bytes) + after

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """All-reduce's in the first steps, local SGD's in the others."""
        first = min(self.start, steps)
        after = periodic_delays(self.reducer, self.every, shapes, members, steps - first)
        return self._all_reduce.delays(shapes, members, first) + after

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Of both."""
        local = periodic_state_bytes(self.reducer, shapes, copies=int(not self.reducer.is_exact))
        return self._all_reduce.state_bytes(shapes, value_bytes) + local

    def build(self, context: SyncContext) -> "PostLocalSGDSync":
        """The strategy at work."""
        local = PeriodicSync(
            context,
            every=self.every,
            reducer=self.reducer.build(context),
            is_exact=self.reducer.is_exact,
            first=self.start,
        )
        early = self._all_reduce.build(context)
        assert isinstance(early, AllReduceSync)
        return PostLocalSGDSync(early, local, self.start)

    @property
    def _all_reduce(self) -> AllReduce:
        return AllReduce(bucket_mib=self.bucket_mib)


class PostLocalSGDSync:
    """Two strategies, one after the other."""

    def __init__(self, early: AllReduceSync, late: PeriodicSync, start: int) -> None:
        self._early, self._late, self._start = early, late, start
        self._now: AllReduceSync | PeriodicSync = early

    def start(self, replica: Replica) -> None:
        """Make both ready."""
        self._early.start(replica)
        self._late.start(replica)

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """As the strategy of this step."""
        self._now = self._early if step <= self._start else self._late
        return self._now.begin(step, replica, count)

    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """As the strategy of this step."""
        return self._now.reduce(replica, values, stop)

    def update(self, replica: Replica) -> Finish:
        """As the strategy of this step; differences are counted from where the first steps led."""
        finish = self._now.update(replica)
        if self._now is self._early:
            self._late.follow(replica)
        return finish

    def is_agreed(self, step: int) -> bool:
        """In all of the first steps, and whenever local SGD exchanges."""
        return step <= self._start or self._late.is_agreed(step)

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """As local SGD, for the other never differs."""
        return self._late.agreed(replica)

    def state(self) -> Mapping[str, SyncState]:
        """What local SGD remembers."""
        return self._late.state()
