"""The parameters of ``problem`` in a module, whole or cut over ranks by hand, and trained on the gradients of there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from meshes import replica as replica_mesh
from optim import problem
from paceline.checkpoint import Checkpointer, LocalExchange, StoreExchange, load
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.optim.base import Estimating, Searching
from paceline.parallel.held import Cut, Held, cut_runs, take
from paceline.parallel.precision import Masters
from paceline.parallel.shard import ShardedStates
from paceline.plan.layout import Grid
from paceline.sync.all_reduce import AllReduce
from paceline.sync.base import SyncContext
from paceline.train import state
from paceline.train.replica import ModuleReplica

CUTS = {
    "model.embed_tokens.weight": (0, [20]),
    "model.layers.0.up.weight": (0, [2, 2]),  # two fused parts, each cut by itself
    "model.layers.0.down.weight": (1, [4]),
    "model.layers.0.wide.weight": (1, [300]),  # in the middle of a block of 256
    "model.layers.1.experts": (1, [4]),
    "model.layers.1.up.bias": (0, [5]),  # the last rank has padding
}
"""Dimension and fused parts that ``tensor`` cuts; the norm is on all ranks."""


def module(shapes=problem.SHAPES):
    """A tree of modules with these parameters."""
    root = nn.Module()
    for name, parameter in problem.parameters(shapes=shapes).items():
        *path, key = name.split(".")
        home = root
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.ModuleList() if part == "layers" else nn.Module())
            home = home._modules[part]
        home.register_parameter(key, parameter)
    return root


def cut(model, axis):
    """Leave each rank of ``axis`` its part, as a tensor pass would."""
    held = {}
    for name, (dim, parts) in CUTS.items():
        full = model.get_parameter(name)
        runs = cut_runs(parts, axis.size, axis.index)
        local = take(full.detach(), dim, runs, sum(-(-part // axis.size) for part in parts))
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, nn.Parameter(local))
        held[name] = Held(full_shape=tuple(full.shape), cuts=(Cut(dim, runs),))
    return held


class Trained:
    """A replica of the module, whose steps are fed with gradients by hand."""

    def __init__(self, options, mesh):
        self.model = module()
        held = cut(self.model, mesh.tensor) if mesh.tensor.size > 1 else {}
        states = (
            Masters(self.model, torch.float64)
            if mesh.states_mesh is None
            else ShardedStates(self.model, mesh, torch.float64, zero=3)
        )
        self.replica = ModuleReplica(states, options, mesh=mesh, held=held)
        self.sync = AllReduce().build(SyncContext(link=LocalLink(), steps=1))

    def steps(self, begin, end, without=()):
        """From step ``begin``, 0-based, to before ``end``."""
        replica = self.replica
        for step in range(begin, end):
            replica.set_rate_factor(problem.rate(step))
            if isinstance(replica.optimizer, Searching):
                replica.passes = problem.Bowl(replica.local, step)
            if isinstance(replica.optimizer, Estimating) and replica.optimizer.estimates_at(step + 1):
                self._give(problem.gradients(500 + step))
                replica.lend_gradients()
                replica.optimizer.estimate(problem.TARGETS)
                replica.clear_gradients()
            if not isinstance(replica.optimizer, Searching):
                self._give(problem.gradients(step), {name for at, name in without if at == step})
            replica.finish(vote=lambda wish: wish)

    def _give(self, gradients, without=()):
        for shard in self.replica.shards:
            if shard.name not in without:
                local = torch.zeros_like(shard.local)
                for block in self.replica.full.part(shard.name).blocks:
                    block.of(local).copy_(block.of_full(gradients[shard.name]))
                shard.set_gradient(local)

    def save(self, folder, step, exchange=None):
        """All ranks together."""
        stage = self.replica.mesh.stage
        writer = Checkpointer(
            Path(folder), rank=stage.index, ranks=stage.size, exchange=exchange or LocalExchange(), layout={}
        )
        tensors = state.tensors(self.model, self.replica, self.sync, state.Variant(0, 1), average={})
        writer.save(step, state.owned(tensors, self.replica), {})
        writer.wait()

    def restore(self, folder, step):
        with load(Path(folder), step) as checkpoint:
            state.restore(self.model, self.replica, self.sync, state.Variant(0, 1), checkpoint, {}, average={})

    def boxes(self):
        """What this rank holds: name, start in the full tensor, values."""
        return [
            (name, block.start, block.of(local.detach()).clone())
            for name, local in self.replica.local.items()
            for block in self.replica.full.part(name).blocks
        ]

    def state_bytes(self):
        """Of the optimizer, scalars apart, on this rank."""
        return sum(
            tensor.nbytes for kept in self.replica.optimizer.state.values() for tensor in kept.values() if tensor.ndim
        )


@contextmanager
def mesh_of(member, sizes) -> Iterator[Mesh]:
    with replica_mesh(member, Grid(**sizes)) as mesh:
        yield mesh


def exchange_of(member, name):
    return StoreExchange(member.store, name) if member.size > 1 else LocalExchange()
