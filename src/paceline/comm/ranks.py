"""Who a process is: its replica, and its place inside the replica."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Group:
    """A replica's place among those with which it agrees at one level; all of these have the same ``name``."""

    index: int
    size: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The place of one rank: which replica, and which rank of it.

    The ranks of a replica form a torch.distributed world of their own; between replicas there are only links.
    """

    replica: int
    replicas: int
    rank: int
    """Rank inside the replica's world."""
    ranks: int
    """Size of the replica's world."""
    local_rank: int
    """Rank among the processes of this node: chooses the device."""
    local_ranks: int
    """Processes of this run on this node: shares out the cores."""

    @property
    def global_rank(self) -> int:
        """Rank over the whole run, replica by replica."""
        return self.replica * self.ranks + self.rank

    @property
    def global_ranks(self) -> int:
        """Ranks of the whole run."""
        return self.replicas * self.ranks

    @property
    def is_leader(self) -> bool:
        """The rank that writes what the run writes once."""
        return self.global_rank == 0

    def groups(self, sizes: Sequence[int]) -> tuple[Group, ...]:
        """This replica's place at each level of a hierarchy of ``sizes``, innermost first; neighbours are a group."""
        assert math.prod(sizes) == self.replicas, (sizes, self.replicas)
        groups, stride = [], 1
        for level, size in enumerate(sizes):
            index = self.replica // stride % size
            groups.append(Group(index=index, size=size, name=f"level-{level}-of-{self.replica - index * stride}"))
            stride *= size
        return tuple(groups)

    @classmethod
    def of(cls, global_rank: int, *, replicas: int, ranks: int, local_rank: int, local_ranks: int) -> "Coordinates":
        """The coordinates of a rank of the whole run; ranks of one replica are neighbours."""
        replica, rank = divmod(global_rank, ranks)
        return cls(
            replica=replica,
            replicas=replicas,
            rank=rank,
            ranks=ranks,
            local_rank=local_rank,
            local_ranks=local_ranks,
        )


ALONE = Coordinates(replica=0, replicas=1, rank=0, ranks=1, local_rank=0, local_ranks=1)
