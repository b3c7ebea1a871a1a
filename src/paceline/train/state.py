"""What a run must remember to go on as if it had never stopped, by parameter name."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from paceline.checkpoint import Checkpoint, Kind, Rule, TensorState, tensor_state
from paceline.comm.replica import local_part
from paceline.optim.base import StateKind
from paceline.parallel.boxes import Part
from paceline.sync.base import Sync
from paceline.train.replica import ModuleReplica

Place = tuple[int, int]


def tensors(
    model: nn.Module, replica: ModuleReplica, sync: Sync, place: Place, *, average: Mapping[str, Tensor]
) -> dict[str, TensorState]:
    """Masters, frozen parameters, buffers that are state, the optimizer's tensors, the sync's and the ``average`` of
    the parameters, by name; a restore fills them.

    ``place`` is (replica, replicas). Where the optimizer averages weights, the model's are the averages, and the
    parameters themselves are the optimizer's ``iterate``.
    """
    averages = replica.averages()
    kept = {name: local_part(parameter) for name, parameter in replica.frozen.items()} | replica.local | averages
    state = {f"model/{name}": _like(tensor, name, replica) for name, tensor in kept.items()}
    for name, buffer in _persistent_buffers(model):
        state[f"model/{name}"] = tensor_state(buffer, Kind.REPLICATED, holder=_stage_holder(replica))
    for name, parameter in replica.local.items():
        if name in averages:
            state[f"optimizer/{name}/iterate"] = _like(parameter, name, replica)
        for key, value in replica.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optimizer/{name}/{key}"] = _of_optimizer(value, name, key, replica)
    for name, mean in average.items():
        state[f"average/{name}"] = placed(mean, name, replica)
    for name, kept_local in replica.adjusted().items():
        state[f"adjustment/{name}"] = placed(kept_local, name, replica)
    for name, own in sync.state().items():
        kind, rule = Kind(own.kind), Rule(own.rule) if own.rule else None
        where = place if kind in {Kind.PER_REPLICA, Kind.OPAQUE} else None
        state[f"sync/{name}"] = tensor_state(own.tensor, kind, rule=rule, place=where)
    return state


def owned(tensors: Mapping[str, TensorState], replica: ModuleReplica) -> dict[str, TensorState]:
    """What the ranks of this stage save: all but what those of another stage hold as well, and save."""
    return {slot: state for slot, state in tensors.items() if _parameter_of(slot) not in replica.full.copies}


def restore(
    model: nn.Module,
    replica: ModuleReplica,
    sync: Sync,
    place: Place,
    checkpoint: Checkpoint,
    layout: Mapping[str, int],
    *,
    average: Mapping[str, Tensor],
) -> None:
    """Fill what ``tensors`` names from a checkpoint that holds exactly that, else ``CheckpointError``.

    An average that is empty is left out, whether the checkpoint has one or not. A new optimizer has no state to fill
    until its first step, so places are made for what the checkpoint holds.
    """
    replica.optimizer.state.clear()
    elsewhere = {
        slot
        for slot in checkpoint.names
        if _parameter_of(slot) in replica.elsewhere or (not average and slot.startswith("average/"))
    }
    for slot in checkpoint.names:
        name, _, key = slot.removeprefix("optimizer/").rpartition("/")
        if not slot.startswith("optimizer/") or name not in replica.local or key == "iterate":
            continue
        parameter, entry = replica.local[name], checkpoint.entry(slot)
        shape: tuple[int, ...] = entry.shape
        match _kind(key, shape, replica):
            case "owner" if not replica.keeps(name):
                elsewhere.add(slot)
                continue
            case "like":
                shape = tuple(parameter.shape)
            case "rows":
                shape = (*parameter.shape[:-1], entry.shape[-1])
        dtype: torch.dtype = getattr(torch, entry.dtype)
        # Scalars of ours are fp64 and read here; those of torch's fused kernels are fp32 and lie where these want them.
        device = "cpu" if not shape and dtype is torch.float64 else parameter.device
        empty = torch.zeros(shape, dtype=dtype, device=device)
        replica.optimizer.state.setdefault(parameter, {})[key] = empty
    checkpoint.restore(tensors(model, replica, sync, place, average=average), layout=layout, elsewhere=elsewhere)
    replica.refresh()


def placed(tensor: Tensor, name: str, replica: ModuleReplica) -> TensorState:
    """A tensor like a parameter that is trained, plain or a DTensor, by its place in the full one."""
    return _like(local_part(tensor), name, replica)


def _parameter_of(slot: str) -> str:
    """The parameter or buffer that an entry belongs to."""
    section, _, rest = slot.partition("/")
    return rest.rpartition("/")[0] if section == "optimizer" else rest


def _like(local: Tensor, name: str, replica: ModuleReplica) -> TensorState:
    return _cut(local, replica.full.part(name), replica.full.holder(name))


def _cut(local: Tensor, part: Part, holder: tuple[int, int]) -> TensorState:
    return TensorState(local.detach(), Kind.PARAMETER, part.full_shape, part.blocks, holder=holder)


def _of_optimizer(value: Tensor, name: str, key: str, replica: ModuleReplica) -> TensorState:
    full = replica.full
    match _kind(key, tuple(value.shape), replica):
        case "whole":
            return tensor_state(value, Kind.REPLICATED, holder=(full.index, full.ranks))
        case "owner":
            return tensor_state(value, Kind.REPLICATED)
        case "rows":
            return _cut(value, full.part_of_rows(name, value.shape[-1]), full.holder(name, dropped=1))
        case "like":
            return _like(value, name, replica)


def _kind(key: str, shape: tuple[int, ...], replica: ModuleReplica) -> StateKind:
    return replica.state_kinds.get(key, "like" if shape else "whole")


def _stage_holder(replica: ModuleReplica) -> tuple[int, int]:
    """This rank among all that hold the same blocks of the model."""
    return replica.mesh.stage.index, replica.mesh.stage.size


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are state (running statistics, routing biases), not derived ones (rotary frequencies)."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
