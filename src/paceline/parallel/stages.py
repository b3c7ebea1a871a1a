"""Cutting a model into the stages of a pipeline, whatever its family.

A stage runs the family's own forward pass (``slots``). What it needs of the stage before, which weights it uses, and
what its blocks cost is not read from the family's code but measured (``measured``). A weight outside of the blocks is
held by every stage whose result depends on it: a tied embedding by the first and the last, one that feeds every block
by all of them. Each then computes a part of its gradient, and the parts are added up.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from paceline.comm.mesh import Axis, Mesh
from paceline.errors import PlanError
from paceline.objectives.base import Batch
from paceline.parallel.blocks import blocks
from paceline.parallel.held import Held
from paceline.parallel.measured import Measured, Place
from paceline.parallel.slots import Absent, Slots, Span
from paceline.plan.stages import Schedule, schedule_of


@dataclass(eq=False, kw_only=True)
class Stages:
    """One rank's stages of a model."""

    model: nn.Module
    """What this rank holds, under the names of the whole model. Blocks and weights of other ranks are not in it. It
    runs in ``at`` only."""
    schedule: Schedule
    own: tuple[int, ...]
    """The stages that this rank runs, ascending."""
    blocks: dict[int, tuple[str, ...]]
    """Of each of ``own``, the names of the blocks it calls, in order."""
    held: dict[str, Held]
    """Of parameters whose gradient is a sum over several ranks of the pipeline."""
    elsewhere: frozenset[str]
    """Names of the parameters of which this rank holds nothing."""
    slots: Slots
    spans: dict[int, Span]
    around: dict[int, tuple[str, ...]]
    """Of each of ``own``, the names of the parameters outside of blocks that it computes with."""
    missing: list[Place]
    """Where the model's own code finds NaN in place of a parameter that is elsewhere."""

    @property
    def count(self) -> int:
        """Stages of the whole pipeline."""
        return len(self.schedule.ranks)

    @property
    def has_loss(self) -> bool:
        """Whether this rank runs the last stage."""
        return self.own[-1] == self.count - 1

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """The parameters that a stage computes with, as they stand in the model now (sharding exchanges them)."""
        found = [self.model.get_parameter(name) for name in self.around[stage]]
        for name in self.blocks[stage]:
            found += self.model.get_submodule(name).parameters()
        return list({id(parameter): parameter for parameter in found}.values())

    @contextmanager
    def at(self, stage: int, received: Sequence[Tensor]) -> Iterator[None]:
        """The model runs one stage, from the tensors ``received`` from the stage before.

        It is called with the inputs of the whole model. The last stage gives the whole model's output; any other raises
        ``slots.StageOutput`` with the tensors for the next.
        """
        like = next((tensor for tensor in received if tensor.is_floating_point()), None)
        if like is not None:
            for place in self.missing:
                place.show(like.dtype, like.device)
        with self.slots.walking(replace(self.spans[stage], received=tuple(received))):
            yield


def cut_stages(model: nn.Module, mesh: Mesh, *, schedule: str, sample: Batch) -> Stages:
    """Leave of a whole model, on the CPU and with its values, what this rank's stages need.

    ``sample`` is a small micro-batch as the objective makes it, of two rows or more. All ranks of the replica call this
    together, with the same model and sample. Raises ``PlanError`` for a model that cannot be cut so.
    """
    plan = schedule_of(schedule, mesh.pipeline.size)
    _refuse(model, plan.pipeline)
    slots = Slots(model)
    training = {module: module.training for module in model.modules()}
    try:
        measured = Measured(model.eval(), slots, plan, sample)
    finally:
        for module, mode in training.items():
            module.training = mode
    return _keep_own(model, slots, plan, measured, mesh)


def _refuse(model: nn.Module, size: int) -> None:
    config = getattr(model, "config", None)
    settings: dict[str, Any] = {}
    if config is not None and hasattr(config, "get_text_config"):
        settings = {**config.get_text_config().to_dict(), **config.to_dict()}
    for key, value in settings.items():
        if "layerdrop" in key and isinstance(value, float) and value > 0:
            raise PlanError(f"layout.pipeline={size}: {key}={value} skips blocks at random. Use {key}=0, or pipeline=1")


def _keep_own(model: nn.Module, slots: Slots, plan: Schedule, measured: Measured, mesh: Mesh) -> Stages:
    me, axis = mesh.pipeline.index, mesh.pipeline
    own = tuple(stage for stage, rank in enumerate(plan.ranks) if rank == me)
    ranks = {
        name: sorted({plan.ranks[stage] for stage in measured.stages_of(parameter)})
        for name, parameter in model.named_parameters()
    }
    lines = {line: _axis_of(line, axis) for line in dict.fromkeys(map(tuple, ranks.values())) if len(line) > 1}
    held = {
        name: Held(
            full_shape=tuple(model.get_parameter(name).shape), summed_over=lines[tuple(line)], is_owner=line[0] == me
        )
        for name, line in ranks.items()
        if me in line and len(line) > 1
    }
    around = {
        stage: tuple(p.full_name for p in measured.outside if stage in measured.stages_of(p.parameter)) for stage in own
    }
    called = {stage: measured.blocks_of(stage) for stage in own}
    missing = [p for p in measured.outside if me not in {plan.ranks[s] for s in measured.stages_of(p.parameter)}]
    kept = {name for names in called.values() for name in names}
    if plan.ranks[0] == me:
        kept |= blocks(model).keys() - set(measured.order)  # blocks that no pass calls are the first stage's
    _drop(model, kept, missing)
    _check_names(model, {name for name, line in ranks.items() if me in line}, plan.pipeline)
    return Stages(
        model=model,
        schedule=plan,
        own=own,
        blocks=called,
        held=held,
        elsewhere=frozenset(name for name, line in ranks.items() if me not in line),
        slots=slots,
        spans={stage: measured.spans[stage] for stage in own},
        around=around,
        missing=missing,
    )


def _axis_of(line: tuple[int, ...], pipeline: Axis) -> Axis | None:
    """The axis of some ranks of the pipeline; None for a rank that is not on it."""
    if pipeline.index not in line:
        return None
    if len(line) == pipeline.size:
        return pipeline
    members = dist.get_process_group_ranks(pipeline.group)
    group = dist.new_group([members[rank] for rank in line], use_local_synchronization=True)
    return Axis(name="shared", index=line.index(pipeline.index), size=len(line), group=group, tally=pipeline.tally)


def _drop(model: nn.Module, kept: set[str], missing: Sequence[Place]) -> None:
    for place in missing:
        place.empty()
        del place.parameter  # and its memory
    for name, block in blocks(model).items():
        if name not in kept:
            path, _, index = name.rpartition(".")
            home = model.get_submodule(path)
            assert isinstance(home, nn.ModuleList)
            home[int(index)] = Absent(_skeleton(block, model))


def _skeleton(block: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a block on the meta device. Blocks may share submodules, so the block itself stays as it is."""
    kept = [value for module in block.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    tensors = (*block.parameters(), *block.buffers(), *kept)
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    memo[id(getattr(model, "config", None))] = getattr(model, "config", None)
    return copy.deepcopy(block, memo)


def _check_names(model: nn.Module, expected: set[str], size: int) -> None:
    """A weight that blocks of several stages share would have another name on each."""
    if wrong := sorted(expected ^ {name for name, _ in model.named_parameters()}):
        raise PlanError(
            f"layout.pipeline={size}: {', '.join(wrong[:3])} of {type(model).__name__} is shared by blocks of several "
            "stages under different names. Use pipeline=1"
        )
