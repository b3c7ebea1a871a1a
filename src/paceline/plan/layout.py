"""The arithmetic of a layout: how many ranks a replica has, and where each stands."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from paceline.config import LayoutConfig
from paceline.errors import PlanError

AXES = ("pipeline", "shard", "context", "tensor")
"""Those that ranks are counted by; ``expert`` deals the experts of a mixture out to the ranks of shard x context."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The coordinates of a rank in its replica's grid."""

    pipeline: int
    shard: int
    context: int
    tensor: int
    expert: int = 0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The sizes of a replica's axes. Ranks are numbered with ``tensor`` fastest: it talks the most.

    Neighbours in shard x context hold different experts; every ``expert`` ranks there hold all of them once.
    """

    pipeline: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def states(self) -> int:
        """Ranks that share the states of what they compute with."""
        return self.shard * self.context

    @property
    def ranks(self) -> int:
        """Ranks that hold one copy of the training state."""
        return math.prod((self.pipeline, self.shard, self.context, self.tensor))

    def place(self, rank: int) -> Place:
        """Where a rank of the replica stands."""
        assert 0 <= rank < self.ranks, (rank, self.ranks)
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, shard = divmod(rest, self.shard)
        expert = (shard * self.context + context) % self.expert
        return Place(pipeline=pipeline, shard=shard, context=context, tensor=tensor, expert=expert)

    def cuts(self, rank: int) -> list[tuple[str, int, int]]:
        """Axis, coordinate and size for each axis of more than one rank."""
        place = self.place(rank)
        return [(axis, getattr(place, axis), size) for axis in (*AXES, "expert") if (size := getattr(self, axis)) > 1]

    @classmethod
    def of(cls, layout: LayoutConfig) -> Self:
        """The grid a layout asks for; ``PlanError`` if experts cannot be dealt out evenly."""
        states = layout.shard * layout.context
        if states % layout.expert:
            shard = -(-layout.shard // layout.expert) * layout.expert
            raise PlanError(
                f"layout.expert={layout.expert} does not divide the {states} ranks of shard={layout.shard} x "
                f"context={layout.context} that experts are dealt out to. Use expert="
                f"{nearest_divisor(layout.expert, states)}, or shard={shard}"
            )
        return cls(
            pipeline=layout.pipeline,
            shard=layout.shard,
            context=layout.context,
            tensor=layout.tensor,
            expert=layout.expert,
        )


def data_rank(replica: int, group_sizes: Sequence[int], shard: int) -> int:
    """The place of a ``shard`` rank of a replica among the ranks that learn from different rows.

    Rows are dealt out to these places one by one. The outermost level of ``group_sizes`` (innermost first) counts
    fastest, and ``shard`` slowest: so a group of replicas learns from the rows that one in its place would have, and
    how a replica is cut does not change its rows.
    """
    place = 0
    for size in group_sizes:
        replica, index = divmod(replica, size)
        place = place * size + index
    return shard * math.prod(group_sizes) + place


def nearest_divisor(wanted: int, *numbers: int) -> int:
    """The number nearest to ``wanted`` that divides all ``numbers``."""
    common = math.gcd(*numbers)
    return min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: (abs(n - wanted), -n))


def check_offload(layout: LayoutConfig, replicas: int) -> None:
    """Raise ``PlanError`` where ``offload`` has nothing to move, or where replicas would need it on the device."""
    if layout.offload and layout.shard * layout.context == 1:
        raise PlanError(
            "layout.offload=true moves what ranks share to main memory, and layout.shard=1 shares nothing. Set "
            "layout.shard, or offload=false"
        )
    if layout.offload and replicas > 1:
        raise PlanError(
            f"layout.offload=true with replicas={replicas} is not built: replicas exchange gradients on the device. "
            f"Use replicas=1 and layout.shard={replicas * layout.shard}, or offload=false"
        )
