"""From a whole model to one rank's part of it, ready to learn: the passes of a layout, one after the other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from paceline.comm.mesh import Axis, Mesh
from paceline.config import LayoutConfig
from paceline.errors import PlanError
from paceline.objectives.base import Batch, Objective, ObjectiveContext, ObjectiveOptions
from paceline.optim.base import OptimizerConfig
from paceline.parallel.balance import balanced, check_routers
from paceline.parallel.blocks import blocks
from paceline.parallel.compiled import compile_blocks
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
from paceline.schedule.accumulate import Accumulate
from paceline.schedule.base import Schedule
from paceline.schedule.pipeline import Pipelined
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


def build(
    model: nn.Module,
    goal: Goal,
    *,
    layout: LayoutConfig,
    mesh: Mesh,
    optimizer: OptimizerConfig,
    adjust: Callable[[Sequence[str]], Sequence[Adjustment]] = lambda _: (),
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    compiled: bool = False,
) -> Built:
    """Cut ``model``, which is whole, on the CPU and holds its values, as a layout says; ``dtype``: it computes in it.

    ``adjust`` makes what adjusts updates from the names of the whole model's blocks.
    All ranks of a replica call this together. Raises ``PlanError`` for what this model or these passes cannot do.
    """
    places = find_places(model, goal.sample)
    dropout = _dropout(places, layout, mesh, seed=seed, compiled=compiled)
    cuts_parameters = [axis for axis in (mesh.shard, mesh.context, mesh.tensor) if axis.size > 1]
    if cuts_parameters and not optimizer.is_elementwise:
        axis = cuts_parameters[0]
        raise PlanError(
            f"layout.{axis.name}={axis.size} cuts matrices that {type(optimizer).__name__} needs whole, which is not "
            "built. Use optimizer=adamw, or replicas and pipeline"
        )
    whole, numbered = _state_names(model), tuple(blocks(model))
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
    if layout.recompute != "none":
        recompute(model, layout.recompute, dropout)
    if compiled:
        compile_blocks(model)
    experts = tuple(dict.fromkeys(name.rpartition(".")[0] for name in dealt))
    states: States = (
        Masters(model, dtype)
        if mesh.states_mesh is None
        else ShardedStates(model, mesh, dtype, zero=layout.zero, offload=layout.offload, experts=experts)
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
        ),
        schedule=Accumulate(model, objective, seed=seed, device=device, dropout=dropout)
        if stages is None
        else Pipelined(stages, mesh, objective, seed=seed, device=device, dropout=dropout),
        split=context.split if context is not None else lambda batch: batch,
        drawing=dropout.drawing if dropout is not None else lambda *_: nullcontext(),
        by_chance=places.unknown,
    )


def _state_names(model: nn.Module) -> frozenset[str]:
    """Of parameters, each by its first name, and of the buffers that are state."""
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return frozenset(name for name, _ in model.named_parameters()) | buffers


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
