"""What each rank of a case does: train with the product's own loop, and write down what it holds."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.replica import Finish, Replica, Shard, Vote
from paceline.comm.world import World, enter
from paceline.config import Config
from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.plan.layout import Grid
from paceline.plan.precision import PRECISIONS, Precision
from paceline.train.assemble import Parts, put_together
from paceline.train.memory import peak_bytes, reset_peak, used_bytes
from paceline.train.replica import ModuleReplica
from paceline.train.state import placed
from paceline.train.trainer import Loop
from paceline.verify.compare import Boxes
from paceline.verify.double import in_double
from paceline.verify.routing import Routes, Routing, narrowest
from paceline.verify.subject import Subject
from paceline.workers.pool import Member

UPDATES = (1, 3)
"""After these, and after the last step, parameters are compared; gradients at the first."""

Half = tuple[Config, int]
"""A run, and the step after which it ends before its time."""


def gradient_of(step: int) -> str:
    """What the gradients of a step are called among the boxes."""
    return "gradient" if step == 1 else f"gradient in step {step}"


def probe(
    member: Member, halves: list[Half], subject: Subject, precision: str, folder: str, given: str | None = None
) -> dict[str, Any]:
    """Run one rank of a case; its boxes go to ``folder``. Returns scalars, or why the case was refused.

    ``given``: where the optimizer is on trial too, the folder with the gradients of all steps that it is to get in
    place of those that were computed, which are kept; empty for the run that these are of.
    """
    config, _ = halves[0]
    coordinates = Coordinates.of(
        member.index,
        replicas=config.all_replicas,
        ranks=Grid.of(config.layout).ranks,
        local_rank=member.index,
        local_ranks=member.size,
    )
    device = claim(coordinates)
    if given is not None:
        torch.set_num_threads(1)  # decompositions round otherwise on two, and some optimizers make steps of roundings
    store = member.store if member.size > 1 else None
    reset_peak(device.torch_device)
    before_bytes = used_bytes(device.torch_device)
    told = _Told(PRECISIONS[precision], given)
    with ExitStack() as stack:
        grid = Grid.of(config.layout)
        world = stack.enter_context(
            enter(
                coordinates,
                device,
                store,
                grid,
                timeout_s=60.0,
                loopback=True,
                group_sizes=config.group_sizes,
            )
        )
        if precision == "fp64":
            stack.enter_context(in_double())
        elif member.size == 1:
            told.narrowest = stack.enter_context(narrowest())
        try:
            for half, until in halves:
                _train(half, until, world, subject, told)
        except PlanError as error:
            return {"refused": str(error)}
    told.write(Path(folder) / f"rank-{member.index:04d}.safetensors")
    memory_bytes = peak_bytes(device.torch_device) - before_bytes
    return {**told.values(), "memory_bytes": memory_bytes, "replica": coordinates.replica}


def _train(config: Config, until: int, world: World, subject: Subject, told: "_Told") -> None:
    """From the newest checkpoint, or from the start, to the end of step ``until``."""
    material = subject.material(torch.promote_types(getattr(torch, told.precision.compute), torch.float32))
    routing = Routing(material.model, material.objective)
    material = replace(material, objective=routing)
    parts = put_together(config, world, material, precision=told.precision, peak_flops_per_s=1.0)
    watched: Any = _Watching(parts.sync, told)
    with Loop(replace(parts, sync=watched)) as loop:
        told.follow(parts, routing)
        for event in loop.steps():
            told.losses.append(event.loss)
            told.norms.append(event.gradient_norm)
            told.seconds += event.step_s
            told.tokens += event.tokens
            if event.step in {*UPDATES, config.train.steps}:
                told.parameters(event.step)
            if loop.evaluation is not None and loop.evaluation.step == event.step:
                told.evaluations.append(loop.evaluation.loss)
            if event.step == until:
                break
        loop.finish_saving()


class _Told:
    """What a rank tells: losses, and boxes of full tensors that it held at some point."""

    def __init__(self, precision: Precision, given: str | None) -> None:
        self.precision = precision
        self._keeps_all = given is not None
        self._given = Boxes(Path(given)).full() if given else None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.evaluations: list[float] = []
        self.seconds = 0.0
        self.tokens = 0
        self.narrowest = [math.inf]
        self._sent_bytes = 0
        self._sent_before: int | None = None
        self._boxes: dict[str, Tensor] = {}
        self._places: dict[str, Any] = {}
        self._replica: ModuleReplica
        self._world: World
        self._routing: Routing
        self._routes: Routes = {}

    def follow(self, parts: Parts, routing: Routing) -> None:
        """Look at the replica of these parts from now on."""
        self._replica, self._world, self._routing = parts.built.replica, parts.world, routing
        self.blocks = len(blocks(parts.built.model))
        self.by_chance = parts.built.by_chance

    def at_begin(self) -> None:
        """A pass begins: the step's own, or another one that its optimizer asks for."""
        if self._sent_before is None:
            self._sent_before = self._sent_so_far()
        self._routing.is_on = not self.losses

    def at_finish(self) -> None:
        """Gradients are as they are before clipping; one that is missing is told as such."""
        what = gradient_of(len(self.losses) + 1)
        if not self.losses:
            self._routing.is_on = False
            self._routes = self._routing.routes if self._world.mesh.tensor.index == 0 else {}
        if not self.losses or self._keeps_all:
            for shard in self._replica.shards:
                if shard.gradient is not None:
                    self._keep(what, shard.name, shard.parameter.grad)
        if self._keeps_all:
            for shard in self._replica.shards:
                gradient = shard.gradient if self._given is None else self._part_of_given(what, shard)
                shard.set_gradient(None)  # so that the new one has the parameter's dtype, whatever this layout's had
                shard.set_gradient(gradient)

    def _part_of_given(self, what: str, shard: Shard) -> Tensor | None:
        given = self._given[self._world.coordinates.replica % len(self._given)] if self._given else {}
        full = given.get((what, shard.name))
        if full is None:
            return None
        local = torch.zeros_like(shard.local)
        for block in self._replica.full.part(shard.name).blocks:
            block.of(local).copy_(block.of_full(full))
        return local

    def at_end(self) -> None:
        """The step has ended, and replicas have exchanged what they exchange after it."""
        assert self._sent_before is not None
        self._sent_bytes += self._sent_so_far() - self._sent_before
        self._sent_before = None

    def parameters(self, step: int) -> None:
        """Keep the parameters after a step."""
        for shard in self._replica.shards:
            self._keep(f"parameter after {step}", shard.name, shard.parameter.detach())

    def write(self, path: Path) -> None:
        """All boxes, with the place of each."""
        save_file(self._boxes, path, metadata={"places": json.dumps(self._places)})

    def values(self) -> dict[str, Any]:
        """The scalars."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "evaluations": self.evaluations,
            "routes": self._routes,
            "narrowest": self.narrowest[0],
            "blocks": self.blocks,
            "by_chance": self.by_chance,
            "sent_bytes": self._sent_bytes / len(self.losses),
            "tokens_per_s": self.tokens / self.seconds,
        }

    def _sent_so_far(self) -> int:
        return sum(self._world.mesh.tally.bytes.values()) + sum(link.sent_bytes for link in self._world.links)

    def _keep(self, what: str, name: str, tensor: Tensor | None) -> None:
        assert tensor is not None
        state = placed(tensor, name, self._replica)
        for i, block in enumerate(state.blocks):
            key = f"{what}/{name}/{i}"
            self._boxes[key] = block.of(state.tensor).cpu().clone().contiguous()
            self._places[key] = [what, name, list(block.start), list(state.full_shape)]


class _Watching:
    """A sync that shows what the replica holds when a step is finished, and is otherwise the one it wraps."""

    def __init__(self, sync: Any, told: _Told) -> None:
        self._sync, self._told = sync, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sync, name)

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """See ``Sync``."""
        self._told.at_begin()
        targets: int = self._sync.begin(step, replica, count)
        return targets

    def update(self, replica: Replica) -> Finish:
        """See ``Sync``."""
        finish: Finish = self._sync.update(_Watched(replica, self._told))
        self._told.at_end()
        return finish


class _Watched:
    """A replica that shows its gradients before it finishes a step."""

    def __init__(self, replica: Replica, told: _Told) -> None:
        self._replica, self._told = replica, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replica, name)

    def finish(self, vote: Vote) -> Finish:
        """See ``Replica``."""
        self._told.at_finish()
        return self._replica.finish(vote)
