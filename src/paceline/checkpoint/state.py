"""What a piece of training state is: its kind, and which boxes of the full tensor this rank holds.

Kinds, and what happens when a checkpoint is loaded under another layout or another number of replicas:

    parameter     one logical tensor, cut as the parameter is cut: loads under any cut
    replicated    one logical tensor, whole on every rank that has it: loads anywhere
    per_replica   one logical tensor for each replica, kept with a leading axis of replicas: with another number of
                  replicas its rule decides (mean: the mean over the replicas saved; clone: replica r takes that of
                  replica r modulo the number saved; fresh: what the caller has stays)
    opaque        one tensor for each rank, kept with a leading axis of ranks: refused under any other layout
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

Shape: TypeAlias = tuple[int, ...]


class Kind(StrEnum):
    """How a tensor relates to ranks and replicas; see the top of this file."""

    PARAMETER = "parameter"
    REPLICATED = "replicated"
    PER_REPLICA = "per_replica"
    OPAQUE = "opaque"


class Rule(StrEnum):
    """What a per-replica tensor becomes when the number of replicas changes."""

    MEAN = "mean"
    CLONE = "clone"
    FRESH = "fresh"


@dataclass(frozen=True, slots=True)
class Block:
    """A box: ``full[start : start + shape]`` is ``local[inner : inner + shape]``, in every dimension."""

    start: Shape
    shape: Shape
    inner: Shape

    def of(self, local: Tensor) -> Tensor:
        """The box as a view of the local tensor."""
        return local[tuple(slice(at, at + size) for at, size in zip(self.inner, self.shape, strict=True))]


@dataclass(frozen=True, slots=True)
class TensorState:
    """One named piece of state as this rank holds it; the same object serves saving and restoring in place.

    ``holder`` is (index, count): ``count`` ranks hold these very blocks, and one of them, chosen by name, writes them.
    """

    tensor: Tensor
    kind: Kind
    full_shape: Shape
    blocks: tuple[Block, ...]
    rule: Rule | None = None
    holder: tuple[int, int] = (0, 1)


def tensor_state(
    tensor: Tensor,
    kind: Kind = Kind.PARAMETER,
    *,
    rule: Rule | None = None,
    place: tuple[int, int] | None = None,
    holder: tuple[int, int] = (0, 1),
    full_shape: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> TensorState:
    """Describe a plain tensor or a DTensor of any placements but ``Partial``.

    Args:
        tensor: the state itself, on any device; its memory is read by a save and written by a restore.
        kind: see the top of this file.
        rule: of a per-replica tensor, what it becomes with another number of replicas.
        place: (replica, replicas) of a per-replica tensor, (rank, ranks) of an opaque one.
        holder: (index, count) among the ranks, outside the DTensor's own mesh, that hold equal copies: with two
            replicas kept equal by all-reduce, (replica, 2). Copies inside the mesh (``Replicate``) are counted here.
        full_shape: of a plain tensor that is one block of a larger one; by default it is the whole.
        start: where that block begins.
    """
    assert (rule is not None) == (kind is Kind.PER_REPLICA), f"a rule belongs to per_replica state, not to {kind}"
    assert (place is not None) == (kind in {Kind.PER_REPLICA, Kind.OPAQUE}), f"{kind} with place={place}"
    assert rule is not Rule.MEAN or tensor.is_floating_point(), f"no mean of {tensor.dtype}"
    local, whole = tensor.detach(), tuple(tensor.shape)
    blocks: tuple[Block, ...] = (_block(tensor.shape),)
    if isinstance(tensor, DTensor):
        assert full_shape is start is None, "a DTensor knows its own shape and start"
        local = tensor.to_local().detach()
        blocks = _dtensor_blocks(whole, tensor.device_mesh, tensor.placements)
        holder = _holder(holder, tensor.device_mesh, tensor.placements)
    elif full_shape is not None:
        assert start is not None, "a block of a larger tensor needs its start"
        whole, blocks = tuple(full_shape), (_block(tensor.shape, start),)
    assert kind is not Kind.REPLICATED or (len(blocks) == 1 and blocks[0].shape == whole), "replicated state is whole"
    if place is not None:
        index, count = place
        local, whole = local.unsqueeze(0), (count, *whole)
        blocks = tuple(Block((index, *b.start), (1, *b.shape), (0, *b.inner)) for b in blocks)
    return TensorState(local, kind, whole, blocks, rule, holder)


def tied(tensors: Mapping[str, TensorState]) -> dict[str, str]:
    """For each name the first name, in sorted order, that shares exactly its memory; most names map to themselves."""
    first: dict[tuple[object, ...], str] = {}
    owners = {}
    for name in sorted(tensors):
        t, blocks = tensors[name].tensor, tensors[name].blocks
        memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), blocks) if t.numel() else (name,)
        owners[name] = first.setdefault(memory, name)
    return owners


def _block(shape: Sequence[int], start: Sequence[int] | None = None) -> Block:
    zeros = (0,) * len(shape)
    return Block(zeros if start is None else tuple(start), tuple(shape), zeros)


def _dtensor_blocks(shape: Shape, mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[Block, ...]:
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


def _holder(outer: tuple[int, int], mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, int]:
    index, count = outer
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not part of the tensor's mesh"
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            index, count = index * mesh.size(axis) + coordinate[axis], count * mesh.size(axis)
    return index, count
