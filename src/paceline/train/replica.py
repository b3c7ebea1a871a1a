"""One rank's view of its replica: parameters that learn, their gradients, and how a step is finished."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from paceline.comm.mesh import Axis, Mesh
from paceline.comm.replica import Finish, Shard, Vote
from paceline.optim.base import OptimizerConfig
from paceline.parallel.held import Held
from paceline.parallel.precision import OnGradient
from paceline.train.update import Adjustment, Update


class States(Protocol):
    """The parameters that learn, whole (``Masters``) or sharded (``ShardedStates``)."""

    parameters: dict[str, nn.Parameter]

    def on_gradient(self, fn: OnGradient) -> None:
        """Call ``fn`` with the name of a parameter whenever a backward pass has added to its gradient."""

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""

    def refresh(self) -> None:
        """Bring the computing copy up to date, after parameters have changed."""


class ModuleReplica:
    """A replica whose module, or this rank's part of it, is at hand.

    ``held`` says of which parameters this rank holds a part, or computes a part of the gradient; ``elsewhere`` names
    those, and the buffers, of which it holds nothing. ``reports``: this rank's sums over targets are the loss, not 0.
    ``device``: where ranks talk; that of the parameters, unless these are offloaded.
    """

    def __init__(
        self,
        states: States,
        optimizer: OptimizerConfig,
        adjustments: Sequence[Adjustment] = (),
        *,
        mesh: Mesh,
        held: Mapping[str, Held] | None = None,
        elsewhere: frozenset[str] = frozenset(),
        reports: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.shards = [Shard(name, parameter) for name, parameter in states.parameters.items()]
        self.optimizer = optimizer.build(states.parameters)
        self.mesh = mesh
        self.held = held or {}
        self.elsewhere = elsewhere
        self._device = device or self.shards[0].local.device
        self._reports = reports and mesh.tensor.index == 0
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._states = states
        self._adjustments = adjustments
        self._update = Update(self.shards, mesh, self.held, self._device)
        for adjustment in adjustments:
            adjustment.start(self._update)
        self._by_name = {shard.name: shard for shard in self.shards}
        self._summed = _by_axis(self.shards, self.held)
        self._late = {shard.name for _, shards in self._summed for shard in shards}
        self._listener: Callable[[Shard], None] | None = None
        self._untold: set[str] = set()
        self._last = False
        states.on_gradient(self._gradient_added)

    def total(self, values: Iterable[float], *, stop: bool = False) -> tuple[list[float], bool]:
        """Sum over the replica of what each rank computed of its own targets, and whether any rank was asked to stop.

        Ranks that compute the same (``tensor``), or not to the end (all stages but the last), count once or not at all.
        """
        own = [value if self._reports else 0.0 for value in values]
        sums = torch.tensor([*own, float(stop)], dtype=torch.float64, device=self._device)
        *totals, stops = self.mesh.world.all_reduce(sums, where="totals").tolist()
        return totals, stops > 0

    def on_gradient_ready(self, fn: Callable[[Shard], None]) -> None:
        """Call ``fn`` once per shard, in the last backward pass of the coming step or at its end."""
        self._listener = fn
        self._untold = set(self._by_name)

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""
        self._last = last
        self._states.expect(last)

    @torch.no_grad()
    def end_backward(self) -> None:
        """Add up what ranks hold parts of, and tell the listener of the shards that the last backward did not."""
        for axis, shards in self._summed:
            _add_up(axis, shards, self._device)
        for shard in self.shards:
            self._tell(shard.name)
        self._last = False

    def set_rate_factor(self, factor: float) -> None:
        """Set each group's rate to its peak times ``factor``."""
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor

    @torch.no_grad()
    def finish(self, vote: Vote) -> Finish:
        """Measure, and if the vote says so adjust and step; clear the gradients."""
        rates = ((name, group["lr"]) for group in self.optimizer.param_groups for name in group["names"])
        self._update.begin(dict(rates))
        norm = self._update.norm()
        stepped = vote(math.isfinite(norm))
        if stepped:
            for adjustment in self._adjustments:
                adjustment.before(self._update)
            self.optimizer.step()
            for adjustment in self._adjustments:
                adjustment.after(self._update)
            self._states.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        return Finish(stepped=stepped, gradient_norm=norm)

    def adjusted(self) -> dict[str, Tensor]:
        """What adjustments keep between steps, by the names of parameters."""
        return {name: kept for adjustment in self._adjustments for name, kept in adjustment.state().items()}

    def refresh(self) -> None:
        """Bring the computing copy up to date after the parameters were set from outside."""
        self._states.refresh()

    def _gradient_added(self, name: str) -> None:
        if self._last and name not in self._late:
            self._tell(name)

    def _tell(self, name: str) -> None:
        if self._listener is not None and name in self._untold:
            self._untold.remove(name)
            self._listener(self._by_name[name])


def _by_axis(shards: Iterable[Shard], held: Mapping[str, Held]) -> list[tuple[Axis, list[Shard]]]:
    """Shards whose gradients are added up, by the axis; in the same order on all ranks of an axis."""
    groups: dict[int, tuple[Axis, list[Shard]]] = {}
    for shard in shards:
        own = held.get(shard.name)
        if own is not None and own.summed_over is not None and own.summed_over.size > 1:
            groups.setdefault(id(own.summed_over), (own.summed_over, []))[1].append(shard)
    return list(groups.values())


def _add_up(axis: Axis, shards: list[Shard], device: torch.device) -> None:
    """One exchange for all: gradients one after the other, then a mark for each that this rank has."""
    gradients = [shard.gradient for shard in shards]
    parts = [
        shard.local.new_zeros(shard.local.numel()) if gradient is None else gradient.flatten()
        for shard, gradient in zip(shards, gradients, strict=True)
    ]
    marks = parts[0].new_tensor([float(gradient is not None) for gradient in gradients])
    together = axis.all_reduce(torch.cat([*parts, marks]).to(device), where="parts of gradients").to(marks.device)
    *sums, present = together.split([*(part.numel() for part in parts), len(parts)])
    for shard, total, mark in zip(shards, sums, present.tolist(), strict=True):
        shard.set_gradient(total if mark > 0 else None)
