"""From a whole model to one rank's part of it, ready to learn: the passes of a layout, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from paceline.comm.mesh import Mesh
from paceline.config import LayoutConfig
from paceline.errors import PlanError
from paceline.objectives.base import Batch, Objective
from paceline.optim.base import OptimizerConfig
from paceline.parallel.compiled import compile_blocks
from paceline.parallel.held import Held
from paceline.parallel.precision import Masters
from paceline.parallel.recompute import recompute_full
from paceline.parallel.shard import ShardedStates
from paceline.schedule.accumulate import Accumulate
from paceline.schedule.base import Schedule
from paceline.train.replica import ModuleReplica, States


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
    objective: Objective,
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
    """Cut ``model``, which is whole and holds its values, as a layout says; ``dtype`` is that of its computation.

    Raises ``PlanError`` for what this model or these passes cannot do together.
    """
    if asked := [axis.name for axis in (mesh.tensor, mesh.context, mesh.pipeline) if axis.size > 1]:
        raise PlanError(f"layout.{asked[0]}: this version cannot cut along it yet. Use shard and replicas")
    whole = frozenset(name for name, _ in model.named_parameters())
    held: dict[str, Held] = {}
    model.to(device).train()
    if layout.recompute == "full":
        recompute_full(model)
    if compiled:
        compile_blocks(model)
    states: States = (
        Masters(model, dtype)
        if mesh.states_mesh is None
        else ShardedStates(model, mesh.states_mesh, dtype, zero=layout.zero)
    )
    own = frozenset(name for name, _ in model.named_parameters())
    return Built(
        model=model,
        replica=ModuleReplica(states, optimizer, clip_norm, mesh=mesh, held=held, elsewhere=whole - own),
        schedule=Accumulate(model, objective, seed=seed, device=device),
        split=lambda batch: batch,
    )
