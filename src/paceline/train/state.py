"""What a run must remember to go on as if it had never stopped, by parameter name."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from paceline.checkpoint import Checkpoint, Kind, TensorState, tensor_state
from paceline.train.replica import ModuleReplica


def tensors(model: nn.Module, replica: ModuleReplica) -> dict[str, TensorState]:
    """Masters, frozen parameters, buffers that are state, and the optimizer's tensors; a restore fills them."""
    learned = {shard.name: shard.parameter for shard in replica.shards}
    state = {f"model/{name}": tensor_state(learned.get(name, p)) for name, p in model.named_parameters()}
    for name, buffer in _persistent_buffers(model):
        state[f"model/{name}"] = tensor_state(buffer, Kind.REPLICATED)
    for name, parameter in learned.items():
        for key, value in replica.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                kind = Kind.PARAMETER if value.shape == parameter.shape else Kind.REPLICATED
                state[f"optimizer/{name}/{key}"] = tensor_state(value, kind)
    return state


def restore(model: nn.Module, replica: ModuleReplica, checkpoint: Checkpoint, layout: Mapping[str, int]) -> None:
    """Fill model, masters and optimizer from a checkpoint that holds exactly their state, else ``CheckpointError``.

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
            place = torch.empty_like(like, dtype=dtype, requires_grad=False)
            replica.optimizer.state.setdefault(learned[name], {})[key] = place
    checkpoint.restore(tensors(model, replica), layout=layout)
    replica.refresh()


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that are state (running statistics, routing biases), not derived ones (rotary frequencies)."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
