"""The axes over which one replica's computation is cut, and the collectives along them.

The ranks of a replica are the points of a grid: pipeline x shard x context x tensor, the last one fastest. An axis is
the line of ranks through this one along which only one coordinate changes. Shard and context together are the axis
``states``, which ``expert`` and ``expert_states`` see as a grid of their own, ``expert`` fastest; all but the pipeline
together are the axis ``stage``. Every collective a layout pass starts is a method of an axis and is tallied there;
FSDP2 and the pipeline schedules, which start their own, get the axis's group.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paceline.plan.layout import AXES, Grid

Key = tuple[str, str, str]
"""Kind, axis, and where in the model."""


@dataclass
class Tally:
    """What one rank has started: calls and payload bytes of its own input, by kind, axis and place in the model."""

    calls: Counter[Key] = field(default_factory=Counter)
    bytes: Counter[Key] = field(default_factory=Counter)

    def add(self, kind: str, axis: str, where: str, n_bytes: int) -> None:
        """Count one call."""
        self.calls[kind, axis, where] += 1
        self.bytes[kind, axis, where] += n_bytes

    def clear(self) -> None:
        """Start anew."""
        self.calls.clear()
        self.bytes.clear()


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """One line of ranks. Tensors are plain and on the rank's device; all members call the same methods in one order."""

    name: str
    index: int = 0
    """This rank's coordinate."""
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None for an axis of one rank, along which nothing is sent."""
    tally: Tally = field(default_factory=Tally)

    def all_reduce(self, tensor: Tensor, *, where: str = "") -> Tensor:
        """Sum over the axis, in place."""
        if self.size > 1:
            self.tally.add("all_reduce", self.name, where, tensor.nbytes)
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum(self, tensor: Tensor, *, where: str = "") -> Tensor:
        """The greatest of each value over the axis, in place."""
        if self.size > 1:
            self.tally.add("all_reduce", self.name, where, tensor.nbytes)
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int, *, where: str = "") -> Tensor:
        """Equal pieces of all ranks, put together along ``dim`` in the order of their coordinates."""
        if self.size == 1:
            return tensor
        self.tally.add("all_gather", self.name, where, tensor.nbytes)
        pieces = tensor.new_empty(self.size * tensor.numel())
        dist.all_gather_single(pieces, tensor.flatten(), group=self.group)
        return torch.cat(pieces.view(self.size, *tensor.shape).unbind(0), dim)

    def reduce_scatter(self, tensor: Tensor, dim: int, *, where: str = "") -> Tensor:
        """This rank's piece, along ``dim``, of the sum over the axis; the size of ``dim`` divides by the axis's."""
        if self.size == 1:
            return tensor
        self.tally.add("reduce_scatter", self.name, where, tensor.nbytes)
        pieces = torch.stack(tensor.chunk(self.size, dim))
        own = torch.empty_like(pieces[0])
        dist.reduce_scatter_single(own.flatten(), pieces.flatten(), group=self.group)
        return own

    def all_to_all(self, tensor: Tensor, cut: int, join: int, *, where: str = "") -> Tensor:
        """Send piece r along dimension ``cut`` to rank r; put what comes together along ``join``, by coordinate."""
        if self.size == 1:
            return tensor
        self.tally.add("all_to_all", self.name, where, tensor.nbytes)
        pieces = torch.stack(tensor.chunk(self.size, cut))
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=self.group)
        return torch.cat(received.unbind(0), join)

    def exchange_rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], *, where: str = "") -> Tensor:
        """Send the first ``sent[0]`` rows to rank 0, the next to rank 1, ...; what comes in, in the order of ranks.

        ``received`` says how many come from each, and may be 0 for all.
        """
        if self.size == 1:
            return rows
        self.tally.add("all_to_all", self.name, where, rows.nbytes)
        own = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(own, rows.contiguous(), list(received), list(sent), group=self.group)
        return own

    def rotate(self, tensor: Tensor, *, where: str = "") -> Callable[[], Tensor]:
        """Start sending ``tensor`` to the next rank of the ring; the result waits for that of the one before."""
        if self.size == 1:
            return lambda: tensor
        self.tally.add("rotate", self.name, where, tensor.nbytes)
        received = torch.empty_like(tensor)
        following, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor.contiguous(), group=self.group, group_peer=following),
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=before),
            ]
        )

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait

    def broadcast(self, tensor: Tensor, root: int, *, where: str = "") -> Tensor:
        """The tensor of the rank at coordinate ``root``, in place."""
        if self.size > 1:
            self.tally.add("broadcast", self.name, where, tensor.nbytes)
            dist.broadcast(tensor, group=self.group, group_src=root)
        return tensor

    def piece(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's piece of a tensor that all ranks hold whole; a view."""
        return tensor.chunk(self.size, dim)[self.index] if self.size > 1 else tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """A replica's axes as one of its ranks sees them."""

    pipeline: Axis
    shard: Axis
    context: Axis
    tensor: Axis
    states: Axis
    """Shard and context together: the ranks over which ZeRO shards states, and over which gradients are summed."""
    world: Axis
    """All ranks of the replica."""
    states_mesh: DeviceMesh | None
    """For FSDP2; None where ``states`` is one rank."""
    tally: Tally
    stage: Axis = field(default_factory=lambda: Axis(name="stage"))
    """The ranks at one place of the pipeline, which together hold its parameters: shard, context and tensor."""
    expert: Axis = field(default_factory=lambda: Axis(name="expert"))
    """Neighbours on ``states`` that hold different experts, which all of them together hold once."""
    expert_states: Axis = field(default_factory=lambda: Axis(name="expert_states"))
    """The ranks on ``states`` that share the states of the same experts."""
    expert_states_mesh: DeviceMesh | None = None
    """For FSDP2; None where experts are not dealt out."""

    @classmethod
    def alone(cls) -> Self:
        """Of a replica of one rank."""
        tally = Tally()
        axes = {
            name: Axis(name=name, tally=tally)
            for name in (*AXES, "states", "world", "stage", "expert", "expert_states")
        }
        return cls(**axes, states_mesh=None, expert_states_mesh=None, tally=tally)

    @classmethod
    def make(cls, grid: Grid, rank: int, device_type: str) -> Self:
        """Join the groups of a grid whose ranks are those of the default process group; all ranks call it together."""
        if grid.ranks == 1:
            return cls.alone()
        tally, place, names = Tally(), grid.place(rank), AXES
        full = init_device_mesh(device_type, tuple(getattr(grid, name) for name in names), mesh_dim_names=names)
        states = full["shard", "context"]._flatten("states")

        def axis(name: str, index: int, size: int, group: dist.ProcessGroup) -> Axis:
            return Axis(name=name, index=index, size=size, group=group if size > 1 else None, tally=tally)

        axes = {name: axis(name, getattr(place, name), getattr(grid, name), full.get_group(name)) for name in names}
        index = place.shard * grid.context + place.context
        assert dist.group.WORLD is not None
        axes["states"] = axis("states", index, states.size(), states.get_group())
        axes["world"] = axis("world", rank, grid.ranks, dist.group.WORLD)
        stage = (
            dist.group.WORLD if grid.pipeline == 1 else full["shard", "context", "tensor"]._flatten("stage").get_group()
        )
        axes["stage"] = axis("stage", rank % (states.size() * grid.tensor), states.size() * grid.tensor, stage)
        shared = None
        if grid.expert > 1:
            both = states._unflatten(0, (grid.states // grid.expert, grid.expert), ("expert_states", "expert"))
            own, shared = both["expert"], both["expert_states"]
            axes["expert"] = axis("expert", place.expert, own.size(), own.get_group())
            axes["expert_states"] = axis("expert_states", index // grid.expert, shared.size(), shared.get_group())
        return cls(
            **axes,
            states_mesh=states if states.size() > 1 else None,
            expert_states_mesh=shared,
            tally=tally,
        )
