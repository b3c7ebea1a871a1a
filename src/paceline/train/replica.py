"""One rank's view of its replica: parameters that learn, their gradients, and how a step is finished."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from paceline.comm.mesh import Axis, Mesh
from paceline.comm.replica import Finish, Shard, Vote
from paceline.optim.base import Averaging, Exchanging, OptimizerConfig, Owning, Passes, Searching
from paceline.parallel.full import FullTensors
from paceline.parallel.held import Held
from paceline.parallel.precision import OnGradient
from paceline.train.loss_scale import LossScale
from paceline.train.rounded import Rounded
from paceline.train.update import Adjustment, Update


class States(Protocol):
    """The parameters that learn, whole (``Masters``) or sharded (``ShardedStates``)."""

    parameters: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]
    """Those that do not learn, as this rank holds them."""

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
    ``device``: where ranks talk; that of the parameters, unless these are offloaded. ``reduction``: what gradients are
    summed in, see ``Replica``. ``rounding_seed``: the parameters learn in 16 bits, and updates are rounded by chance.
    ``seed``: of what else is drawn.
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
        reduction: torch.dtype | None = None,
        loss_scale: LossScale | None = None,
        rounding_seed: int | None = None,
        seed: int = 0,
    ) -> None:
        self.frozen = states.frozen
        self.mesh = mesh
        self.held = held or {}
        self.reduction = reduction
        self.loss_scale = loss_scale or LossScale()
        self.elsewhere = elsewhere
        self.seed = seed
        self._device = device or next((p.device for p in states.parameters.values()), torch.device("cpu"))
        self.full = FullTensors.of(states.frozen | states.parameters, self.held, mesh, device=self._device)
        self.shards = [Shard(name, p, self.full.part(name)) for name, p in states.parameters.items()]
        self.local = {shard.name: _plain(shard) for shard in self.shards}
        """What the optimizer sees: of a parameter that ranks share, this rank's values."""
        self._rounded: Rounded | None = None
        if rounding_seed is not None:
            self._rounded = Rounded(optimizer, self.local, self.full, rounding_seed)
        self.optimizer = self._rounded or optimizer.build(self.local, self.full)
        self.state_kinds = optimizer.state_kinds
        self.learns_by = optimizer
        self.rank = mesh.world.index
        self._reports = reports and mesh.tensor.index == 0
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rate = self._peak_rate = optimizer.lr
        """The optimizer's rate in this step; groups of parameters may have others, in proportion to it."""
        self._states = states
        self._adjustments = adjustments
        self._update = Update(self.shards, mesh, self.held, self._device)
        for adjustment in adjustments:
            adjustment.start(self._update)
        self._by_name = {shard.name: shard for shard in self.shards}
        self._summed = _by_axis(self.shards, self.held)
        self._late = {shard.name for _, shards in self._summed for shard in shards}
        self.passes: Passes | None = None
        """What the optimizer may ask of the step's batch, besides the gradients that it is given."""
        self._listener: Callable[[Shard], None] | None = None
        self._untold: set[str] = set()
        self._last = False
        self._vetoed = False
        states.on_gradient(self._gradient_added)

    @property
    def gradient_scale(self) -> float:
        """See ``Replica``."""
        return self.loss_scale.value

    def begin(self, step: int) -> None:
        """Say which step begins: how its update is rounded follows from it."""
        self._vetoed = False
        if isinstance(self.optimizer, Exchanging):
            self.optimizer.expect(is_exact=True)
        if self._rounded is not None:
            self._rounded.begin(step)

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

    @torch.no_grad()
    def outgoing(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``Replica``."""
        optimizer = self.optimizer
        if not isinstance(optimizer, Exchanging):
            return gradients
        optimizer.expect(is_exact=False)
        return {name: optimizer.outgoing(self.local[name], value) for name, value in gradients.items()}

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""
        self._last = last
        self._states.expect(last)

    @torch.no_grad()
    def end_backward(self) -> None:
        """Add up what ranks hold parts of, and tell the listener of the shards that the last backward did not."""
        for axis, shards in self._summed:
            _add_up(axis, shards, self._device, self.reduction)
        for shard in self.shards:
            self._tell(shard.name)
        self._last = False

    def set_rate_factor(self, factor: float) -> None:
        """Set each group's rate to its peak times ``factor``."""
        self.rate = self._peak_rate * factor
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor

    def veto(self) -> None:
        """Do not take the step that is under way, whatever its gradients are. All ranks of the replica call it."""
        self._vetoed = True

    @torch.no_grad()
    def finish(self, vote: Vote, step: Callable[[], None] | None = None) -> Finish:
        """Unscale, measure, adjust and step if the vote says so, clear the gradients.

        ``step``, if given, is called in place of the optimizer's.
        """
        update, scale = self._update, self.loss_scale.value
        groups = self.optimizer.param_groups
        update.begin({name: group["lr"] for group in groups for name in group.get("names", ())})
        norm = update.norm() / scale
        stepped = vote(not self._vetoed and math.isfinite(norm))
        if stepped:
            update.scale(1.0 / scale)
            for adjustment in self._adjustments:
                adjustment.before(update)
            self.lend_gradients()
            if step is not None:
                step()
            elif isinstance(self.optimizer, Searching):
                assert self.passes is not None
                self.optimizer.search(self.passes)
            else:
                self.optimizer.step()
            for adjustment in self._adjustments:
                adjustment.after(update)
            self._states.refresh()
        self.clear_gradients()
        overflowed = self.loss_scale.after(stepped)
        return Finish(stepped=stepped, gradient_norm=norm, overflowed=overflowed)

    def clear_gradients(self) -> None:
        """Forget all gradients, also those the optimizer was lent."""
        for shard in self.shards:
            shard.parameter.grad = self.local[shard.name].grad = None

    def adjusted(self) -> dict[str, Tensor]:
        """What adjustments keep between steps, by the names of parameters."""
        return {name: kept for adjustment in self._adjustments for name, kept in adjustment.state().items()}

    @torch.no_grad()
    def hold(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters, by the names of the shards; those not named stay."""
        if weights:
            for name, value in weights.items():
                self._by_name[name].local.copy_(value)
            self._states.refresh()

    def refresh(self) -> None:
        """Bring the computing copy up to date after the parameters were set from outside."""
        self._states.refresh()

    def keeps(self, name: str) -> bool:
        """Whether this rank keeps what the optimizer keeps of a whole matrix on one rank."""
        assert isinstance(self.optimizer, Owning)
        return self.optimizer.owner.get(name) == self.full.index

    def averages(self) -> dict[str, Tensor]:
        """This rank's values of what takes the parameters' place outside of training, by name; empty for most."""
        self._follow()
        if not isinstance(self.optimizer, Averaging):
            return {}
        return {name: self.optimizer.averaged(parameter) for name, parameter in self.local.items()}

    def lend_unscaled(self) -> float:
        """Unscale the gradients and show them to the optimizer as they are; their norm, as ``Update`` measures it."""
        self._update.changed()
        norm, scale = self._update.norm(), self.loss_scale.value
        self._update.scale(1.0 / scale)
        self.lend_gradients()
        return norm / scale

    def lend_gradients(self) -> None:
        """Show the optimizer this rank's values and gradients."""
        self._follow()
        for shard in self.shards:
            self.local[shard.name].grad = shard.gradient

    def _follow(self) -> None:
        """Let what the optimizer sees be where the values are: FSDP2 moves them when it begins."""
        for shard in self.shards:
            own = self.local[shard.name]
            if own is not shard.parameter:
                own.data = shard.local

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the replica."""
        return self.rank == 0

    def kept(self, name: str) -> Mapping[str, Tensor]:
        """What the optimizer keeps of a parameter, by its keys."""
        kept = self.optimizer.state.get(self.local[name], {})
        return {key: value for key, value in kept.items() if isinstance(value, Tensor)}

    def keep(self, name: str, key: str, value: Tensor) -> None:
        """Set what the optimizer keeps of a parameter; it is shaped as this rank's part of it, or one number."""
        self.optimizer.state[self.local[name]][key] = value

    def owns(self, name: str) -> bool:
        """Whether this rank counts what it holds of a parameter: of ranks with equal values exactly one does."""
        return self._update.counts(name)

    def forget(self) -> None:
        """Let the optimizer begin anew, as in the first step."""
        self.optimizer.state.clear()

    def moments(self) -> dict[str, Tensor]:
        """Copies of the optimizer's state on this rank, as ``PARAMETER/what``."""
        return {
            f"{name}/{key}": value.clone()
            for name, parameter in self.local.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def recall(self, moments: Mapping[str, Tensor]) -> None:
        """Let the optimizer go on from such copies, and from nothing where there are none."""
        self.forget()
        for slot, value in moments.items():
            name, _, key = slot.rpartition("/")
            self.optimizer.state.setdefault(self.local[name], {})[key] = value.clone()

    def square_sums(self, tensors: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """Sums of squares over the replica (sets,), of tensors like the shards, by name."""
        return self.sum_of(
            torch.stack(
                [
                    sum(
                        (t.double().square().sum().to(self._device) for name, t in one.items() if self.owns(name)),
                        start=torch.zeros((), dtype=torch.float64, device=self._device),
                    )
                    for one in tensors
                ]
            )
        )

    def sum_of(self, values: Tensor) -> Tensor:
        """Sum over all ranks of the replica: fp64, on the CPU."""
        return self.mesh.world.all_reduce(values.double().to(self._device), where="sums").cpu()

    def norms(self, values: Mapping[str, Tensor]) -> Mapping[str, float]:
        """See ``Replica``."""
        return self.full.norms(values)

    def _gradient_added(self, name: str) -> None:
        if self._last and name not in self._late:
            self._tell(name)

    def _tell(self, name: str) -> None:
        if self._listener is not None and name in self._untold:
            self._untold.remove(name)
            self._listener(self._by_name[name])


@contextmanager
def holding(replica: ModuleReplica, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts the model computes with other weights, by the names of shards; those not named stay."""
    own = {shard.name: shard.local.clone() for shard in replica.shards if shard.name in weights}
    try:
        replica.hold(weights)
        yield
    finally:
        replica.hold(own)


def _plain(shard: Shard) -> nn.Parameter:
    """The parameter itself, or this rank's values of a DTensor: in the same memory."""
    if shard.is_plain:
        return shard.parameter
    plain = nn.Parameter(shard.local)
    plain.grad_dtype = shard.parameter.grad_dtype
    return plain


def _by_axis(shards: Iterable[Shard], held: Mapping[str, Held]) -> list[tuple[Axis, list[Shard]]]:
    """Shards whose gradients are added up, by the axis; in the same order on all ranks of an axis."""
    groups: dict[int, tuple[Axis, list[Shard]]] = {}
    for shard in shards:
        own = held.get(shard.name)
        if own is not None and own.summed_over is not None and own.summed_over.size > 1:
            groups.setdefault(id(own.summed_over), (own.summed_over, []))[1].append(shard)
    return list(groups.values())


def _add_up(axis: Axis, shards: list[Shard], device: torch.device, reduction: torch.dtype | None) -> None:
    """One exchange for all: gradients one after the other, then a mark for each that this rank has."""
    gradients = [shard.gradient for shard in shards]
    dtype = shards[0].summed_in(reduction)
    parts = [
        shard.local.new_zeros(shard.local.numel(), dtype=dtype) if gradient is None else gradient.flatten().to(dtype)
        for shard, gradient in zip(shards, gradients, strict=True)
    ]
    marks = parts[0].new_tensor([float(gradient is not None) for gradient in gradients])
    together = axis.all_reduce(torch.cat([*parts, marks]).to(device), where="parts of gradients").to(marks.device)
    *sums, present = together.split([*(part.numel() for part in parts), len(parts)])
    for shard, total, mark in zip(shards, sums, present.tolist(), strict=True):
        shard.set_gradient(total if mark > 0 else None)
