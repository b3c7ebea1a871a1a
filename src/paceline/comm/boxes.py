"""Where the part of a tensor that a rank holds lies in the full one.

A part is one or several boxes: sharding over states leaves one run of rows, a fused matrix that is cut by its parts
several runs of either dimension. What is in no box is padding.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A box: ``full[start : start + shape]`` is ``local[inner : inner + shape]``, in every dimension."""

    start: Shape
    shape: Shape
    inner: Shape

    def of(self, local: Tensor) -> Tensor:
        """The box as a view of the local tensor."""
        return local[tuple(slice(at, at + size) for at, size in zip(self.inner, self.shape, strict=True))]

    def of_full(self, full: Tensor) -> Tensor:
        """The box as a view of the full tensor."""
        return full[tuple(slice(at, at + size) for at, size in zip(self.start, self.shape, strict=True))]


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank holds of a tensor."""

    full_shape: Shape
    blocks: tuple[Block, ...]


def whole(shape: Sequence[int]) -> Part:
    """All of a tensor."""
    return Part(tuple(shape), (block(shape),))


def block(shape: Sequence[int], start: Sequence[int] | None = None) -> Block:
    """A local tensor that is one box, at ``start`` of the full one."""
    zeros = (0,) * len(shape)
    return Block(zeros if start is None else tuple(start), tuple(shape), zeros)


def dtensor_blocks(shape: Shape, mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[Block, ...]:
    """The boxes of this rank's local tensor of a DTensor; of any placements but ``Partial``."""
    runs = [_runs(size, dim, mesh, placements) for dim, size in enumerate(shape)]
    blocks = []
    for box in itertools.product(*runs):
        start, sizes, inner = zip(*box, strict=True) if box else ((), (), ())
        blocks.append(Block(start, sizes, inner))
    return tuple(blocks)


def _runs(size: int, dim: int, mesh: DeviceMesh, placements: Sequence[Placement]) -> list[tuple[int, int, int]]:
    """(start in the full tensor, length, start in the local one) of each run of neighbours held along ``dim``.

    A ``_StridedShard`` may hold several runs (fused projections), which torch's
    ``compute_local_shape_and_global_offset`` does not show; so the indices themselves are cut as the tensor is.
    ``src_data_rank=None`` does it without messages.
    """
    assert not any(p.is_partial() for p in placements), f"{placements} is not a value yet: reduce it first"
    if not any(p.is_shard(dim) or _is_strided(p, dim) for p in placements):
        return [(0, size, 0)]
    alone = [_along_first(p, dim) for p in placements]
    held = distribute_tensor(torch.arange(size), mesh, alone, src_data_rank=None).to_local().tolist()
    breaks = [0, *(i for i in range(1, len(held)) if held[i] != held[i - 1] + 1), len(held)]
    return [(held[a], b - a, a) for a, b in itertools.pairwise(breaks) if b > a]


def _is_strided(placement: Placement, dim: int) -> bool:
    return isinstance(placement, _StridedShard) and placement.dim == dim


def _along_first(placement: Placement, dim: int) -> Placement:
    if isinstance(placement, _StridedShard):
        return _StridedShard(0, split_factor=placement.split_factor) if placement.dim == dim else Replicate()
    return Shard(0) if placement.is_shard(dim) else Replicate()
