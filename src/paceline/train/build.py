"""From a whole model to one rank's part of it, ready to learn: the passes of a layout, one after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from paceline.comm.mesh import Mesh
from paceline.config import LayoutConfig
from paceline.errors import PlanError
from paceline.objectives.base import Batch, Objective, ObjectiveContext, ObjectiveOptions
from paceline.optim.base import OptimizerConfig
from paceline.parallel.balance import balanced, check_routers
from paceline.parallel.compiled import compile_blocks
from paceline.parallel.context import cut_context
from paceline.parallel.context_check import check_context
from paceline.parallel.dropout import dropouts
from paceline.parallel.expert import check_experts, cut_experts
from paceline.parallel.held import Held
from paceline.parallel.precision import Masters
from paceline.parallel.recompute import recompute_full
from paceline.parallel.shard import ShardedStates
from paceline.parallel.stages import cut_stages
from paceline.parallel.tensor import cut_tensor
from paceline.schedule.accumulate import Accumulate
from paceline.schedule.base import Schedule
from paceline.schedule.pipeline import Pipelined
from paceline.train.replica import ModuleReplica, States


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


def build(
    model: nn.Module,
    goal: Goal,
    *,
    layout: LayoutConfig,
    mesh: Mesh,
    optimizer: OptimizerConfig,
    clip_norm: float | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    compiled: bool = False,
) -> Built:
    """Cut ``model``, which is whole, on the CPU and holds its values, as a layout says; ``dtype``: it computes in it.

    All ranks of a replica call this together. Raises ``PlanError`` for what this model or these passes cannot do.
    """
    _refuse_dropout(model, mesh)
    cuts_parameters = [axis for axis in (mesh.shard, mesh.context, mesh.tensor) if axis.size > 1]
    if cuts_parameters and not optimizer.is_elementwise:
        axis = cuts_parameters[0]
        raise PlanError(
            f"layout.{axis.name}={axis.size} cuts matrices that {type(optimizer).__name__} needs whole, which is not "
            "built. Use optimizer=adamw, or replicas and pipeline"
        )
    whole = frozenset(name for name, _ in model.named_parameters())
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
        held = _merged(held, cut_tensor(model, mesh, sequence=layout.sequence))
        check_routers(objective, model, held, mesh)
    if mesh.context.size > 1:
        context = cut_context(model, mesh, attention=layout.attention)
    dealt = cut_experts(model, mesh, held)
    held |= dealt
    model.to(device).train()
    if layout.recompute == "full":
        recompute_full(model)
    if compiled:
        compile_blocks(model)
    experts = tuple(dict.fromkeys(name.rpartition(".")[0] for name in dealt))
    states: States = (
        Masters(model, dtype)
        if mesh.states_mesh is None
        else ShardedStates(model, mesh, dtype, zero=layout.zero, experts=experts)
    )
    own = frozenset(name for name, _ in model.named_parameters())
    return Built(
        model=model,
        replica=ModuleReplica(
            states,
            optimizer,
            clip_norm,
            mesh=mesh,
            held=held,
            elsewhere=whole - own,
            reports=stages is None or stages.has_loss,
        ),
        schedule=Accumulate(model, objective, seed=seed, device=device)
        if stages is None
        else Pipelined(stages, mesh, objective, seed=seed, device=device),
        split=context.split if context is not None else lambda batch: batch,
    )


def _refuse_dropout(model: nn.Module, mesh: Mesh) -> None:
    """Ranks that compute parts of one sequence would have to draw parts of one mask."""
    axes = [axis for axis in (mesh.tensor, mesh.context, mesh.pipeline) if axis.size > 1]
    if axes and (found := dropouts(model)):
        name, probability = next(iter(found.items()))
        raise PlanError(
            f"layout.{axes[0].name}={axes[0].size} with dropout ({name}={probability}) is not built: its masks would "
            "differ from those of one process. Set the model's dropouts to 0, or use shard and replicas"
        )


def _merged(first: Mapping[str, Held], then: Mapping[str, Held]) -> dict[str, Held]:
    """What two passes say of the same parameters, the second of what the first left."""
    merged = {**first, **then}
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
