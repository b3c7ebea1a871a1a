"""What a run must remember to go on as if it had never stopped, by parameter name."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from paceline.checkpoint import Checkpoint, Kind, Rule, TensorState, tensor_state
from paceline.sync.base import Sync
from paceline.train.replica import ModuleReplica


def tensors(model: nn.Module, replica: ModuleReplica, sync: Sync, place: tuple[int, int]) -> dict[str, TensorState]:
    """Masters, frozen parameters, buffers that are state, the optimizer's tensors and the sync's; a restore fills them.

    ``place`` is (replica, replicas).
    """
    learned = {shard.name: shard.parameter for shard in replica.shards}
    state = {f"model/{name}": tensor_state(learned.get(name, p)) for name, p in model.named_parameters()}
    for name, buffer in _persistent_buffers(model):
        state[f"model/{name}"] = tensor_state(buffer, Kind.REPLICATED)
    for name, parameter in learned.items():
        for key, value in replica.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                kind = Kind.PARAMETER if value.shape == parameter.shape else Kind.REPLICATED
                state[f"optimizer/{name}/{key}"] = tensor_state(value, kind)
    for name, kept in sync.state().items():
        kind, rule = Kind(kept.kind), Rule(kept.rule) if kept.rule else None
        own = place if kind in {Kind.PER_REPLICA, Kind.OPAQUE} else None
        state[f"sync/{name}"] = tensor_state(kept.tensor, kind, rule=rule, place=own)
    return state


def restore(
    model: nn.Module,
    replica: ModuleReplica,
    sync: Sync,
    place: tuple[int, int],
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
            empty = torch.empty_like(like, dtype=dtype, requires_grad=False)
            replica.optimizer.state.setdefault(learned[name], {})[key] = empty
    checkpoint.restore(tensors(model, replica, sync, place), layout=layout)
    replica.refresh()


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that are state (running statistics, routing biases), not derived ones (rotary frequencies)."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
