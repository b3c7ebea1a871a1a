"""A replica's mesh on the workers of the test pool."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from paceline.comm.mesh import Mesh
from paceline.plan.layout import Grid
from paceline.workers.pool import Member


@contextmanager
def replica(member: Member, grid: Grid) -> Iterator[Mesh]:
    """The mesh of a replica made of all members of a call."""
    assert grid.ranks == member.size, (grid, member.size)
    if grid.ranks > 1:
        dist.init_process_group(
            "gloo", store=member.store, rank=member.index, world_size=member.size, timeout=timedelta(seconds=30)
        )
    try:
        yield Mesh.make(grid, member.index, "cpu")
    finally:
        if grid.ranks > 1:
            dist.destroy_process_group()
