"""What a piece of training state is: its kind, and which boxes of the full tensor this rank holds.

Kinds, and what happens when a checkpoint is loaded under another layout or another number of replicas:

    parameter     one logical tensor, cut as the parameter is cut: loads under any cut
    replicated    one logical tensor, whole on every rank that has it: loads anywhere
    per_replica   one logical tensor for each replica, kept with a leading axis of replicas: with another number of
                  replicas its rule decides (mean: the mean over the replicas saved; clone: replica r takes that of
                  replica r modulo the number saved; fresh: what the caller has stays), for those that have one: an
                  optimizer's state begins with the first step that is taken. What was saved once for all is
                  every replica's own; where replicas hold the same, they take what the rule makes of several
    opaque        one tensor for each rank, kept with a leading axis of ranks: refused under any other layout
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from paceline.comm.boxes import Block, Shape, block, dtensor_blocks


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
    blocks: tuple[Block, ...] = (block(tensor.shape),)
    if isinstance(tensor, DTensor):
        assert full_shape is start is None, "a DTensor knows its own shape and start"
        local = tensor.to_local().detach()
        blocks = dtensor_blocks(whole, tensor.device_mesh, tensor.placements)
        holder = _holder(holder, tensor.device_mesh, tensor.placements)
    elif full_shape is not None:
        assert start is not None, "a block of a larger tensor needs its start"
        whole, blocks = tuple(full_shape), (block(tensor.shape, start),)
    assert kind is not Kind.REPLICATED or (len(blocks) == 1 and blocks[0].shape == whole), "replicated state is whole"
    state = TensorState(local, kind, whole, blocks, rule, holder)
    return state if place is None else _one_of(state, place)


def per_replica(state: TensorState, place: tuple[int, int]) -> TensorState:
    """The same state where each of several replicas has its own; ``place`` is (replica, replicas).

    With another number of replicas floating-point state is averaged, and the rest dealt out.
    """
    rule = Rule.MEAN if state.tensor.is_floating_point() else Rule.CLONE
    return replace(_one_of(state, place), kind=Kind.PER_REPLICA, rule=rule)


def _one_of(state: TensorState, place: tuple[int, int]) -> TensorState:
    index, count = place
    blocks = tuple(Block((index, *b.start), (1, *b.shape), (0, *b.inner)) for b in state.blocks)
    return replace(state, tensor=state.tensor.unsqueeze(0), full_shape=(count, *state.full_shape), blocks=blocks)


def tied(tensors: Mapping[str, TensorState]) -> dict[str, str]:
    """For each name the first name, in sorted order, that shares exactly its memory; most names map to themselves."""
    first: dict[tuple[object, ...], str] = {}
    owners = {}
    for name in sorted(tensors):
        t, blocks = tensors[name].tensor, tensors[name].blocks
        memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), blocks) if t.numel() else (name,)
        owners[name] = first.setdefault(memory, name)
    return owners


def _holder(outer: tuple[int, int], mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, int]:
    index, count = outer
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not part of the tensor's mesh"
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            index, count = index * mesh.size(axis) + coordinate[axis], count * mesh.size(axis)
    return index, count
