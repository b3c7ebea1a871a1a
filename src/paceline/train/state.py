"""What a run must remember to go on as if it had never stopped, by parameter name."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from paceline.checkpoint import Checkpoint, Kind, Rule, TensorState, per_replica, tensor_state
from paceline.parallel.held import place_in_full
from paceline.sync.base import Sync, SyncState
from paceline.train.replica import ModuleReplica

Variant = tuple[int, int]
"""(index, count): which of how many different copies of the training state a replica holds. Syncs that keep replicas
equal have one; one replica of each variant saves it."""


def tensors(model: nn.Module, replica: ModuleReplica, sync: Sync, variant: Variant) -> dict[str, TensorState]:
    """Masters, frozen parameters, buffers that are state, the optimizer's tensors and the sync's; a restore fills them.

    Where replicas differ, each has its own of what is learned and of what changes with it.
    """
    learned = {shard.name: shard.parameter for shard in replica.shards}
    own = {f"model/{name}": part_of(parameter, name, replica) for name, parameter in learned.items()}
    for name, buffer in _persistent_buffers(model):
        own[f"model/{name}"] = tensor_state(buffer, Kind.REPLICATED, holder=_stage_holder(replica))
    for name, parameter in learned.items():
        for key, value in replica.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                own[f"optimizer/{name}/{key}"] = (
                    part_of(value, name, replica)
                    if value.shape == parameter.shape
                    else tensor_state(value, Kind.REPLICATED, holder=_scalar_holder(name, replica))
                )
    if variant[1] > 1:
        own = {slot: per_replica(state, variant) for slot, state in own.items()}
    frozen = {f"model/{name}": part_of(p, name, replica) for name, p in model.named_parameters() if name not in learned}
    kept = {f"sync/{key}": _kept(state, replica, variant) for key, state in sync.state().items()}
    return own | {slot: _shared(state, variant) for slot, state in frozen.items()} | kept


def _kept(kept: SyncState, replica: ModuleReplica, variant: Variant) -> TensorState:
    """A tensor of a sync: like a parameter, or the same on all ranks of the replica."""
    if kept.like is None:
        world = replica.mesh.world
        state = tensor_state(kept.tensor, Kind.REPLICATED, holder=(world.index, world.size))
    else:
        parameter = next(shard.parameter for shard in replica.shards if shard.name == kept.like)
        state = part_of(parameter, kept.like, replica)
        state = replace(state, tensor=kept.tensor.view(state.tensor.shape))
    if kept.rule is None:
        return _shared(state, variant)
    return replace(per_replica(state, variant), rule=Rule(kept.rule))


def _shared(state: TensorState, variant: Variant) -> TensorState:
    """What all that save hold alike: one of them writes it."""
    (index, count), (inner, holders) = variant, state.holder
    return replace(state, holder=(index * holders + inner, count * holders))


def owned(tensors: Mapping[str, TensorState], replica: ModuleReplica) -> dict[str, TensorState]:
    """What this rank saves: all but the copies of which another rank is the owner."""
    copies = {name for name, held in replica.held.items() if not held.is_owner}
    return {slot: state for slot, state in tensors.items() if _parameter_of(slot) not in copies}


def restore(
    model: nn.Module,
    replica: ModuleReplica,
    sync: Sync,
    variant: Variant,
    checkpoint: Checkpoint,
    layout: Mapping[str, int],
) -> None:
    """Fill what ``tensors`` names from a checkpoint that holds exactly that, else ``CheckpointError``.

    A new optimizer has no state to fill until its first step, so places are made for what the checkpoint holds.
    """
    learned = {shard.name: shard for shard in replica.shards}
    replica.optimizer.state.clear()
    for slot in checkpoint.names:
        name, _, key = slot.removeprefix("optimizer/").rpartition("/")
        if slot.startswith("optimizer/") and name in learned:
            entry, parameter = checkpoint.entry(slot), learned[name].parameter
            shape = entry.shape[1:] if entry.kind is Kind.PER_REPLICA else entry.shape
            is_like = shape == place_in_full(parameter, replica.held.get(name)).full_shape
            like = parameter if is_like else torch.empty(shape, device=parameter.device)
            empty = torch.zeros_like(like, dtype=getattr(torch, entry.dtype), requires_grad=False)
            replica.optimizer.state.setdefault(parameter, {})[key] = empty
    elsewhere = {slot for slot in checkpoint.names if _parameter_of(slot) in replica.elsewhere}
    checkpoint.restore(tensors(model, replica, sync, variant), layout=layout, elsewhere=elsewhere)
    replica.refresh()


def _parameter_of(slot: str) -> str:
    """The parameter or buffer that an entry belongs to."""
    section, _, rest = slot.partition("/")
    return rest if section == "model" else rest.rpartition("/")[0]


def part_of(tensor: Tensor, name: str, replica: ModuleReplica) -> TensorState:
    """A parameter, or a tensor like it, by its place in the full one."""
    held, tensor_axis = replica.held.get(name), replica.mesh.tensor
    if held is None:
        return tensor_state(tensor, holder=(tensor_axis.index, tensor_axis.size))
    place = place_in_full(tensor, held)
    return replace(tensor_state(tensor), full_shape=place.full_shape, blocks=place.blocks)


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
