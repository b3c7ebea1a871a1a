"""What a run must remember to go on as if it had never stopped, by parameter name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from paceline.checkpoint import Checkpoint, Kind, Rule, TensorState, per_replica, tensor_state
from paceline.comm.boxes import Part
from paceline.comm.replica import local_part
from paceline.optim.base import StateKind
from paceline.sync.base import Remembering, Sync, SyncState
from paceline.train.replica import ModuleReplica

LOSS_SCALE = "loss_scale"
CLIENT = "client_"
"""Before the number in the names of what is kept of a client's optimizer."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Which of how many different copies of the training state a replica holds. Syncs that keep replicas equal have
    one; one replica of each variant saves it. Those that besides keep something of their own all save that."""

    index: int
    count: int
    twin: int = 0
    """This replica among those that save, of the same variant."""
    twins: int = 1

    @property
    def own(self) -> tuple[int, int]:
        """(index, count) among all replicas that save."""
        return self.index * self.twins + self.twin, self.count * self.twins


def tensors(
    model: nn.Module, replica: ModuleReplica, sync: Sync, variant: Variant, *, average: Mapping[str, Tensor]
) -> dict[str, TensorState]:
    """Masters, frozen parameters, buffers that are state, the optimizer's tensors, the loss scale, the sync's tensors
    and the ``average`` of the parameters, by name; a restore fills them.

    Where replicas differ, each has its own of what is learned and of what changes with it. Where the optimizer averages
    weights, the model's are the averages, and the parameters themselves are the optimizer's ``iterate``.
    """
    averages = replica.averages()
    own = {f"model/{name}": _like(tensor, name, replica) for name, tensor in (replica.local | averages).items()}
    for name, buffer in _persistent_buffers(model):
        own[f"model/{name}"] = tensor_state(buffer, Kind.REPLICATED, holder=_stage_holder(replica))
    for name, parameter in replica.local.items():
        if name in averages:
            own[f"optimizer/{name}/iterate"] = _like(parameter, name, replica)
        for key, value in replica.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                own[f"optimizer/{name}/{key}"] = _of_optimizer(value, name, key, replica)
    for number, kept_moments in (sync.remembered if isinstance(sync, Remembering) else {}).items():
        for slot, value in kept_moments.items():
            name, _, key = slot.rpartition("/")
            own[f"{CLIENT}{number}/{slot}"] = _of_optimizer(value, name, key, replica)
    for name, mean in average.items():
        own[f"average/{name}"] = placed(mean, name, replica)
    for name, kept_local in replica.adjusted().items():
        own[f"adjustment/{name}"] = placed(kept_local, name, replica)
    if replica.loss_scale.is_dynamic:
        own[LOSS_SCALE] = _of_all_ranks(replica.loss_scale.state(), replica)
    if variant.count > 1:
        dealt = _dealt_out(own, replica)
        own = {slot: _of_replica(state, variant, slot in dealt) for slot, state in own.items()}
    if variant.twins > 1:
        own = {slot: _shared(state, (variant.twin, variant.twins)) for slot, state in own.items()}
    frozen = {f"model/{name}": _like(local_part(p), name, replica) for name, p in replica.frozen.items()}
    kept = {
        f"sync/{key}": _kept(key, state, replica, variant)
        for key, state in sync.state().items()
        if state.owner != "elsewhere"
    }
    return own | {slot: _shared(state, variant.own) for slot, state in frozen.items()} | kept


def _dealt_out(own: Mapping[str, TensorState], replica: ModuleReplica) -> set[str]:
    """Of what each replica has, that of which a mean would mean nothing: codes, with their scales; what stands in the
    basis of one replica's matrices; the loss scale."""
    slots = {slot for slot in own if slot.startswith("optimizer/")}
    if "owner" not in replica.state_kinds.values():
        coded = {_parameter_of(slot) for slot in slots if not own[slot].tensor.is_floating_point()}
        slots = {slot for slot in slots if _parameter_of(slot) in coded}
    return slots | {LOSS_SCALE}


def _of_replica(state: TensorState, variant: Variant, is_dealt: bool) -> TensorState:
    """What each of several replicas has: with another number of them the mean, or dealt out to them."""
    own = per_replica(state, (variant.index, variant.count))
    return replace(own, rule=Rule.CLONE) if is_dealt else own


def _kept(key: str, kept: SyncState, replica: ModuleReplica, variant: Variant) -> TensorState:
    """A tensor of a sync: like a parameter; the same on all ranks that hold parts of one; or on all of the replica."""
    like, name = kept.like, key.rpartition("/")[0]
    if kept.owner is not None:
        state = tensor_state(kept.tensor, Kind.REPLICATED)
    elif like is not None:
        state = _like(kept.tensor, like, replica)
    elif name in replica.local:
        full = replica.full
        state = tensor_state(kept.tensor, Kind.REPLICATED, holder=(full.index, full.ranks))
    else:
        state = _of_all_ranks(kept.tensor, replica)
    if kept.rule is None:
        return _shared(state, variant.own)
    return replace(per_replica(state, variant.own), rule=Rule(kept.rule))


def _of_all_ranks(tensor: Tensor, replica: ModuleReplica) -> TensorState:
    world = replica.mesh.world
    return tensor_state(tensor, Kind.REPLICATED, holder=(world.index, world.size))


def _shared(state: TensorState, place: tuple[int, int]) -> TensorState:
    """What several replicas that save, (index, count), hold alike: one of them writes it."""
    (index, count), (inner, holders) = place, state.holder
    return replace(state, holder=(index * holders + inner, count * holders))


def owned(tensors: Mapping[str, TensorState], replica: ModuleReplica) -> dict[str, TensorState]:
    """What the ranks of this stage save: all but what those of another stage hold as well, and save."""
    return {slot: state for slot, state in tensors.items() if _parameter_of(slot) not in replica.full.copies}


def restore(
    model: nn.Module,
    replica: ModuleReplica,
    sync: Sync,
    variant: Variant,
    checkpoint: Checkpoint,
    layout: Mapping[str, int],
    *,
    average: Mapping[str, Tensor],
) -> None:
    """Fill what ``tensors`` names from a checkpoint that holds exactly that, else ``CheckpointError``.

    An average that is empty is left out, whether the checkpoint has one or not, and so is a loss scale that one of both
    does not have. A new optimizer has no state to fill until its first step, so places are made for what the checkpoint
    holds.
    """
    replica.optimizer.state.clear()
    remembered: dict[int, dict[str, Tensor]] = {}
    if isinstance(sync, Remembering):
        remembered = sync.remembered
        remembered.clear()
    elsewhere = {
        slot
        for slot in checkpoint.names
        if _parameter_of(slot) in replica.elsewhere or (not average and slot.startswith("average/"))
    }
    for slot in checkpoint.names:
        section, _, rest = slot.partition("/")
        name, _, key = rest.rpartition("/")
        is_clients = section.startswith(CLIENT)
        if not (section == "optimizer" or is_clients) or name not in replica.local or key == "iterate":
            continue
        parameter, entry = replica.local[name], checkpoint.entry(slot)
        is_own = entry.kind is Kind.PER_REPLICA
        if is_own and entry.shape[0] == variant.count > 1 and variant.index not in entry.holders:
            elsewhere.add(slot)  # this replica had not begun
            continue
        shape: tuple[int, ...] = entry.shape[1:] if is_own else entry.shape
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
        if is_clients:
            remembered.setdefault(int(section.removeprefix(CLIENT)), {})[rest] = empty
        else:
            replica.optimizer.state.setdefault(parameter, {})[key] = empty
    elsewhere |= {f"sync/{key}" for key, kept in sync.state().items() if kept.owner == "elsewhere"}
    here = tensors(model, replica, sync, variant, average=average)
    if LOSS_SCALE not in checkpoint.names:
        here.pop(LOSS_SCALE, None)
    elif LOSS_SCALE not in here:
        elsewhere.add(LOSS_SCALE)
    checkpoint.restore(here, layout=layout, elsewhere=elsewhere)
    if LOSS_SCALE in here:
        replica.loss_scale.load(here[LOSS_SCALE].tensor)
    replica.refresh()


def placed(tensor: Tensor, name: str, replica: ModuleReplica) -> TensorState:
    """A tensor like a parameter that is trained, plain or a DTensor, by its place in the full one."""
    return _like(local_part(tensor), name, replica)


def _parameter_of(slot: str) -> str:
    """The parameter or buffer that an entry belongs to."""
    section, _, rest = slot.partition("/")
    return rest if section in {"model", "average", "adjustment"} else rest.rpartition("/")[0]


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
