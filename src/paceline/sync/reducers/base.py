"""What a reducer is: it adds up tensors of several replicas, each times the share of its replica, by some encoding.

A reducer sees this rank's parts of the tensors and, in ``Shard.part``, which boxes of the full tensors they are. What
it makes of a value must not depend on how a replica is cut: it works on single values, or on blocks of full tensors.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, Protocol, TypeAlias

from torch import Tensor

from paceline.comm.replica import Shard
from paceline.sync.base import Shapes, SyncContext, SyncState

Wait: TypeAlias = Callable[[], Mapping[str, Tensor]]
"""Waits for sums that were started, and gives them."""


class ReducerConfig(Protocol):
    """The frozen config class of a reducer."""

    is_exact: ClassVar[bool]
    """Whether sums are what was put in, but for rounding; if not, only small differences should be put in."""

    ns_per_value: ClassVar[float]
    """What encoding and decoding take on one core more than a plain sum (``benchmarks/reducers.py``)."""

    def wire_bytes(self, shapes: Shapes, members: int) -> int:
        """Payload bytes one rank sends for one sum of fp32 tensors."""
        ...

    def delays(self, shapes: Shapes, members: int) -> int:
        """For how many delays a rank waits in one sum, as in ``SyncConfig.delays``."""
        ...

    def late_delays(self, shapes: Shapes, members: int) -> int:
        """For how many of them when a sum is waited for that has long been on its way: of exchanges that begin then."""
        ...

    def state_bytes(self, shapes: Shapes) -> int:
        """Bytes the reducer needs on one rank at most."""
        ...

    def build(self, context: SyncContext) -> "Reducer":
        """The reducer at work over the link of its strategy."""
        ...


class Reducer(Protocol):
    """A reducer at work on one rank."""

    def start(self, shards: Sequence[Shard]) -> None:
        """Plan for tensors like these, before the first sum."""

    def weighted_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Mapping[str, Tensor]:
        """Sum over the members of ``share`` times ``values``, by the names of the shards; the same bits on all.

        Results may be views of buffers that the next call uses. ``step``: what is drawn follows from it. What is not
        finite in one member leaves something that is not finite in the sum.
        """
        ...

    def start_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Wait:
        """``weighted_sum`` that does not wait: what it returns does, and may exchange more.

        ``values`` may change as soon as this returns. A sum is waited for before the next one is started.
        """
        ...

    def settle(self, unused: Collection[str] = ()) -> None:
        """Say that the last sum has been used, but for some names, whose state becomes what it was before that sum.

        Until then both are kept; who always uses a sum may leave this out.
        """
        ...

    def state(self) -> Mapping[str, SyncState]:
        """What was left out and is still to be sent, as in ``Sync.state``."""
        ...
