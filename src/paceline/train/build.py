"""From a whole model to one rank's part of it, ready to learn: the passes of a layout, one after the other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from paceline.comm.mesh import Axis, Mesh
from paceline.config import LayoutConfig, LossScaleConfig, strategy_name
from paceline.errors import PlanError
from paceline.models.attention import FUSED, MATMUL
from paceline.objectives.base import Batch, Objective, ObjectiveContext, ObjectiveOptions
from paceline.objectives.fused_cross_entropy import fuse_loss
from paceline.optim.base import OptimizerConfig, check_groups
from paceline.parallel.balance import balanced, check_routers
from paceline.parallel.blocks import blocks
from paceline.parallel.compiled import PRODUCTS, SELECTIVE, compile_blocks
from paceline.parallel.context import cut_context
from paceline.parallel.context_check import check_context
from paceline.parallel.dropout import Dropout
from paceline.parallel.dropout_places import Places, find_places
from paceline.parallel.expert import check_experts, cut_experts
from paceline.parallel.held import Held
from paceline.parallel.precision import Masters
from paceline.parallel.recompute import recompute
from paceline.parallel.shard import ShardedStates
from paceline.parallel.stages import cut_stages
from paceline.parallel.tensor import cut_tensor
from paceline.plan.optimizer import needs_fp32
from paceline.plan.precision import Precision
from paceline.schedule.accumulate import Accumulate
from paceline.schedule.base import Schedule
from paceline.schedule.pipeline import Pipelined
from paceline.train.loss_scale import LossScale
from paceline.train.replica import ModuleReplica, States
from paceline.train.update import Adjustment


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the model is to learn: the objective, what made it, and a small micro-batch to try things on."""

    objective: Objective
    options: ObjectiveOptions
    context: ObjectiveContext
    sample: Batch
    """Two rows or more; the same on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a step works with on one rank."""

    model: nn.Module
    replica: ModuleReplica
    schedule: Schedule
    split: Callable[[Batch], Batch]
    """This rank's part of a micro-batch."""
    drawing: Callable[[int, Batch], AbstractContextManager[None]]
    """What is in force while a step's micro-batch runs forward: it says what is dropped."""
    by_chance: str | None
    """What of the model is random other than by step, sequence and position; None if nothing."""
    learned: tuple[str, ...]
    """The parameters that learn, of the whole model: in one order on all ranks."""


def build(
    model: nn.Module,
    goal: Goal,
    *,
    layout: LayoutConfig,
    mesh: Mesh,
    optimizer: OptimizerConfig,
    precision: Precision,
    adjust: Callable[[Sequence[str]], Sequence[Adjustment]] = lambda _: (),
    reduction: torch.dtype | None = None,
    loss_scale: LossScaleConfig | None = None,
    device: torch.device,
    seed: int,
    compiled: bool = False,
) -> Built:
    """Cut ``model``, which is whole, on the CPU and holds its values, as a layout says.

    ``adjust`` makes what adjusts updates from the names of the whole model's blocks. ``reduction``: what gradients are
    summed in, None for fp32 or more. ``loss_scale``: of a precision that has one.
    All ranks of a replica call this together. Raises ``PlanError`` for what this model or these passes cannot do.
    """
    places = find_places(model, goal.sample)
    dropout = _dropout(places, layout, mesh, seed=seed, compiled=compiled)
    check_groups(optimizer, [name for name, parameter in model.named_parameters() if parameter.requires_grad])
    _check_precision(optimizer, model, precision)
    whole, numbered = _state_names(model), tuple(blocks(model))
    learned = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    held: dict[str, Held] = {}
    stages = context = None
    objective = balanced(model, goal.objective, goal.sample, mesh, sequence=layout.sequence, compiled=compiled)
    if mesh.context.size > 1:
        check_context(model, goal.options, goal.context, attention=layout.attention, size=mesh.context.size)
    if mesh.expert.size > 1:
        check_experts(model, goal.sample, mesh)
    if mesh.pipeline.size > 1:
        stages = cut_stages(model, mesh, schedule=layout.schedule, sample=goal.sample)
        model, held = stages.model, dict(stages.held)
    if mesh.tensor.size > 1:
        cut = cut_tensor(model, mesh, sequence=layout.sequence, patterns=layout.tensor_patterns)
        held = _merged(held, cut, mesh.tensor)
        check_routers(objective, model, held, mesh)
    if mesh.context.size > 1:
        context = cut_context(model, mesh, attention=layout.attention, dropout=dropout)
    dealt = cut_experts(model, mesh, held)
    held |= dealt
    if dropout is not None:
        dropout.install(model, held)
    model.train()
    if mesh.states_mesh is None:
        model.to(device)  # sharding moves a block at a time: the device need not hold all
    compiled_selective = compiled and layout.recompute == "selective"
    if layout.recompute != "none" and not compiled_selective:
        recompute(model, layout.recompute, dropout)
    if compiled:
        compile_blocks(model, keep=SELECTIVE if compiled_selective else PRODUCTS)
        fuse_loss(model, dtype=getattr(torch, precision.compute), device=device)
    experts = tuple(dict.fromkeys(name.rpartition(".")[0] for name in dealt))
    dtype, pure = getattr(torch, precision.compute), precision.is_pure
    states: States = (
        Masters(model, dtype, pure=pure)
        if mesh.states_mesh is None
        else ShardedStates(
            model,
            mesh,
            dtype,
            zero=layout.zero,
            pure=pure,
            reduction=reduction,
            offload=layout.offload,
            experts=experts,
        )
    )
    return Built(
        model=model,
        replica=ModuleReplica(
            states,
            optimizer,
            adjust(numbered),
            mesh=mesh,
            held=held,
            elsewhere=whole - _state_names(model),
            reports=stages is None or stages.has_loss,
            device=device,
            seed=seed,
            reduction=reduction,
            loss_scale=LossScale(loss_scale) if precision.is_scaled else None,
            rounding_seed=seed if pure else None,
        ),
        schedule=Accumulate(model, objective, seed=seed, device=device, dropout=dropout)
        if stages is None
        else Pipelined(stages, mesh, objective, seed=seed, device=device, dropout=dropout),
        split=context.split if context is not None else lambda batch: batch,
        drawing=dropout.drawing if dropout is not None else lambda *_: nullcontext(),
        by_chance=places.unknown,
        learned=learned,
    )


def _state_names(model: nn.Module) -> frozenset[str]:
    """Of parameters, each by its first name, and of the buffers that are state."""
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return frozenset(name for name, _ in model.named_parameters()) | buffers


def _check_precision(optimizer: OptimizerConfig, model: nn.Module, precision: Precision) -> None:
    """Raise ``PlanError`` where an optimizer that looks at the loss would not see it change, or could not derive it."""
    name = f"optimizer={strategy_name(optimizer)}"
    if optimizer.sees == "loss" and precision.compute_bytes == 2:
        raise PlanError(f"precision={precision.name}: {needs_fp32(name)}")
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if optimizer.differentiates_twice and attention in {MATMUL, FUSED}:
        raise PlanError(
            f"model.attention={attention} cannot be differentiated twice, which {name} does. Use model.attention=sdpa"
        )


def _dropout(places: Places, layout: LayoutConfig, mesh: Mesh, *, seed: int, compiled: bool) -> Dropout | None:
    """The dropouts of a model; None if it has none, or draws in a way that is not known.

    In that case ranks that compute parts of one sequence would have to draw parts of what one process draws.
    """
    axes = [axis for axis in (mesh.tensor, mesh.context, mesh.pipeline) if axis.size > 1]
    if places.unknown is not None and axes:
        raise PlanError(
            f"layout.{axes[0].name}={axes[0].size}: {places.unknown}, so that its ranks would not compute what one "
            "process does. Switch that off in the model's config, or use shard and replicas"
        )
    if places.unknown is not None or not places.dimensions:
        return None
    if compiled:
        raise PlanError(
            f"train.compile=true with dropout (in {min(places.calls) or 'the model'}) is not built. Set the "
            "model's dropouts to 0, or use train.compile=false"
        )
    return Dropout(places, seed=seed, tensor=mesh.tensor, sequence=layout.sequence)


def _merged(first: Mapping[str, Held], then: Mapping[str, Held], axis: Axis) -> dict[str, Held]:
    """What two passes say of the same parameters, the second of what the first left.

    Of what only the first speaks of, all ranks of the second's ``axis`` hold the same, and one counts it.
    """
    merged = {name: replace(own, is_owner=own.is_owner and axis.index == 0) for name, own in first.items()} | {**then}
    for name in first.keys() & then.keys():
        one, other = first[name], then[name]
        if one.summed_over is not None and other.summed_over is not None:
            raise PlanError(
                f"the gradient of {name} would be a sum over {one.summed_over.name} and over {other.summed_over.name}, "
                "which is not built. Use layout.sequence=false, or another pipeline"
            )
        summed_over = one.summed_over or other.summed_over
        merged[name] = replace(other, summed_over=summed_over, is_owner=one.is_owner and other.is_owner)
    return merged
