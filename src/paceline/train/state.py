"""What a run must remember to go on as if it had never stopped, by parameter name."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from paceline.checkpoint import Block, Checkpoint, Kind, Rule, TensorState, tensor_state
from paceline.parallel.held import Cut
from paceline.sync.base import Sync
from paceline.train.replica import ModuleReplica

Place = tuple[int, int]


def tensors(model: nn.Module, replica: ModuleReplica, sync: Sync, place: Place) -> dict[str, TensorState]:
    """Masters, frozen parameters, buffers that are state, the optimizer's tensors and the sync's; a restore fills them.

    ``place`` is (replica, replicas).
    """
    learned = {shard.name: shard.parameter for shard in replica.shards}
    state = {f"model/{name}": part_of(learned.get(name, p), name, replica) for name, p in model.named_parameters()}
    for name, buffer in _persistent_buffers(model):
        state[f"model/{name}"] = tensor_state(buffer, Kind.REPLICATED, holder=_stage_holder(replica))
    for name, parameter in learned.items():
        for key, value in replica.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optimizer/{name}/{key}"] = (
                    part_of(value, name, replica)
                    if value.shape == parameter.shape
                    else tensor_state(value, Kind.REPLICATED, holder=_scalar_holder(name, replica))
                )
    for name, kept_local in replica.adjusted().items():
        state[f"adjustment/{name}"] = part_of(kept_local, name, replica)
    for name, kept in sync.state().items():
        kind, rule = Kind(kept.kind), Rule(kept.rule) if kept.rule else None
        own = place if kind in {Kind.PER_REPLICA, Kind.OPAQUE} else None
        state[f"sync/{name}"] = tensor_state(kept.tensor, kind, rule=rule, place=own)
    return state


def owned(tensors: Mapping[str, TensorState], replica: ModuleReplica) -> dict[str, TensorState]:
    """What this rank saves: all but the copies of which another rank is the owner."""
    copies = {name for name, held in replica.held.items() if not held.is_owner}
    return {slot: state for slot, state in tensors.items() if _parameter_of(slot) not in copies}


def restore(
    model: nn.Module,
    replica: ModuleReplica,
    sync: Sync,
    place: Place,
    checkpoint: Checkpoint,
    layout: Mapping[str, int],
) -> None:
    """Fill what ``tensors`` names from a checkpoint that holds exactly that, else ``CheckpointError``.

    A new optimizer has no state to fill until its first step, so places are made for what the checkpoint holds.
    """
    learned = {shard.name: shard.parameter for shard in replica.shards}
    replica.optimizer.state.clear()
    for slot in checkpoint.names:
        name, _, key = slot.removeprefix("optimizer/").rpartition("/")
        if slot.startswith("optimizer/") and name in learned:
            entry = checkpoint.entry(slot)
            device, dtype = learned[name].device, getattr(torch, entry.dtype)
            like = learned[name] if entry.kind == Kind.PARAMETER else torch.empty(entry.shape, device=device)
            empty = torch.zeros_like(like, dtype=dtype, requires_grad=False)
            replica.optimizer.state.setdefault(learned[name], {})[key] = empty
    elsewhere = {slot for slot in checkpoint.names if _parameter_of(slot) in replica.elsewhere}
    checkpoint.restore(tensors(model, replica, sync, place), layout=layout, elsewhere=elsewhere)
    replica.refresh()


def _parameter_of(slot: str) -> str:
    """The parameter or buffer that an entry belongs to."""
    section, _, rest = slot.partition("/")
    return rest.rpartition("/")[0] if section == "optimizer" else rest


def part_of(tensor: Tensor, name: str, replica: ModuleReplica) -> TensorState:
    """A parameter, or a tensor like it, by its place in the full one."""
    held, tensor_axis = replica.held.get(name), replica.mesh.tensor
    if held is None:
        return tensor_state(tensor, holder=(tensor_axis.index, tensor_axis.size))
    state = tensor_state(tensor)
    blocks = state.blocks
    for cut in held.cuts:
        blocks = tuple(_in_full(blocks, cut))
    return replace(state, full_shape=held.full_shape, blocks=blocks)


def _in_full(blocks: tuple[Block, ...], cut: Cut) -> Iterator[Block]:
    """Blocks of a tensor that is cut along a dimension, as blocks of the tensor before the cut; padding is in none."""
    dim = cut.dim
    for block in blocks:
        for run in cut.runs:
            first = max(block.start[dim], run.inner)
            last = min(block.start[dim] + block.shape[dim], run.inner + run.size)
            if first < last:
                yield Block(
                    _with(block.start, dim, run.start + first - run.inner),
                    _with(block.shape, dim, last - first),
                    _with(block.inner, dim, block.inner[dim] + first - block.start[dim]),
                )


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _stage_holder(replica: ModuleReplica) -> tuple[int, int]:
    """This rank among all that hold the same blocks of the model."""
    states, tensor = replica.mesh.states, replica.mesh.tensor
    return states.index * tensor.size + tensor.index, states.size * tensor.size


def _scalar_holder(name: str, replica: ModuleReplica) -> tuple[int, int]:
    held = replica.held.get(name)
    if held is not None and not held.cuts:  # of copies only the owner saves
        return replica.mesh.states.index, replica.mesh.states.size
    return _stage_holder(replica)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are state (running statistics, routing biases), not derived ones (rotary frequencies)."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
