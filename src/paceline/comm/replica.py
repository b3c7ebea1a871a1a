"""What a sync sees of a replica: its own shards of parameters and gradients, and one way to finish a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.distributed.tensor import DTensor

from paceline.comm.boxes import Part

if TYPE_CHECKING:
    from paceline.optim.base import OptimizerConfig

Vote = Callable[[bool], bool]
"""Turns this replica's wish to step into the decision of all replicas that must decide alike."""


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor this rank holds: a DTensor's local part, or the tensor itself. Shares memory."""
    if isinstance(tensor, DTensor):
        local: torch.Tensor = tensor.to_local()
        return local
    return tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of one parameter, and of its gradient."""

    name: str
    parameter: torch.nn.Parameter
    part: Part | None = None
    """The boxes of the full parameter that ``local`` holds; None for one that is held whole."""

    @property
    def is_plain(self) -> bool:
        """Whether ``parameter`` is what is held here itself, and no DTensor."""
        return not isinstance(self.parameter, DTensor)

    @property
    def local(self) -> torch.Tensor:
        """The part of the parameter held here, plain."""
        return local_part(self.parameter.detach())

    @property
    def gradient(self) -> torch.Tensor | None:
        """The part of the gradient held here, plain, in the parameter's own placement; None if there is none."""
        gradient = self.parameter.grad
        placements = self.parameter.placements if isinstance(self.parameter, DTensor) else None
        if isinstance(gradient, DTensor) and gradient.placements != placements:
            # Under sequence parallelism a norm's gradient arrives as a pending sum: its local part alone is wrong.
            gradient = self.parameter.grad = gradient.redistribute(placements=placements)
        return None if gradient is None else local_part(gradient)

    def summed_in(self, reduction: torch.dtype | None) -> torch.dtype:
        """What gradients like this one are summed in: ``reduction``, or by default fp32 or more."""
        return reduction or torch.promote_types(self.local.dtype, torch.float32)

    def set_gradient(self, local: torch.Tensor | None) -> None:
        """Replace the local part of the gradient; None says that no replica has one."""
        own = self.gradient
        if local is None:
            self.parameter.grad = None
        elif own is not None:
            own.copy_(local.view_as(own))
        elif isinstance(self.parameter, DTensor):
            like = self.parameter
            self.parameter.grad = DTensor.from_local(
                local.reshape(self.local.shape).to(self.local.dtype, copy=True),
                like.device_mesh,
                like.placements,
                shape=like.shape,
                stride=like.stride(),
            )
        else:
            self.parameter.grad = local.reshape(self.parameter.shape).to(self.local.dtype, copy=True)


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a step ended inside the replica."""

    stepped: bool
    gradient_norm: float
    """Global L2 norm of the gradient before clipping, over every axis of the replica; NaN if a value is not finite."""
    overflowed: bool = False
    """The step was left out, and the next ones will be taken at a lower loss scale: as it should be in fp16."""
    stop: bool = False
    """All replicas stop after this step: of a sync whose replicas talk only when the step is done."""


class Replica(Protocol):
    """The smallest set of ranks that together hold one copy of the training state, as one rank of it sees it."""

    @property
    def shards(self) -> Sequence[Shard]:
        """Trainable parameters held by this rank, in an order that is the same in every replica."""
        ...

    @property
    def reduction(self) -> torch.dtype | None:
        """What gradients are summed in; None for fp32 or more, as they come."""
        ...

    @property
    def rate(self) -> float:
        """The optimizer's rate in this step, the same in all replicas: ``optimizer.lr`` times the schedule's factor."""
        ...

    @property
    def gradient_scale(self) -> float:
        """By what gradients are multiplied until the step is finished: the loss scale."""
        ...

    def outgoing(self, gradients: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Of what the mean is to be taken where sums are not exact: gradients, or what the optimizer would rather have.

        ``gradients``: of this replica's own mean loss, without the loss scale, by the names of the shards. Who sums
        exactly leaves this out.
        """
        ...

    def on_gradient_ready(self, fn: Callable[[Shard], None]) -> None:
        """Call ``fn`` once per shard in the coming step, when its gradient is final in the replica.

        By the end of the last backward pass every shard has been told, also one that has no gradient; so what ``fn``
        starts comes, on every rank of every replica, before anything that follows the backward pass. One listener at a
        time.
        """

    def finish(self, vote: Vote) -> Finish:
        """Check that gradients are finite, take the norm, clip, and step if ``vote`` says so; clear the gradients."""
        ...

    def refresh(self) -> None:
        """Bring the computing copy up to date, after a sync has changed parameters itself (``Shard.local``)."""

    def norms(self, values: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """L2 norms of full tensors of which ``values`` are this rank's parts, by the names of shards.

        All ranks that hold parts of them call it together, with the same names in the same order, and get the same.
        """
        ...


class VisitedReplica(Replica, Protocol):
    """A replica at which clients learn one after the other."""

    def forget(self) -> None:
        """Let the optimizer begin anew: the next client has not moved yet."""

    def moments(self) -> dict[str, torch.Tensor]:
        """Copies of what the optimizer keeps on this rank, as ``PARAMETER/what``."""
        ...

    def recall(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Let the optimizer go on from such copies, and from nothing where there are none."""

    def square_sums(self, tensors: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """Sum of squares of each of some sets of tensors like the shards, by name, over the replica: (sets,) fp64, CPU.

        What several ranks hold alike counts once.
        """
        ...


@runtime_checkable
class Remote(Replica, Protocol):
    """A replica whose steps may be taken elsewhere: by servers that hold its parameters and the optimizer's state."""

    rank: int
    """Of this rank in the replica."""
    learns_by: "OptimizerConfig"

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the replica."""
        ...

    def owns(self, name: str) -> bool:
        """Whether this rank counts what it holds of a parameter: of ranks with equal values exactly one does."""
        ...

    def sum_of(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of the replica, which all call it: fp64, on the CPU."""
        ...

    def kept(self, name: str) -> Mapping[str, torch.Tensor]:
        """What the optimizer keeps of a parameter, by its keys."""
        ...

    def keep(self, name: str, key: str, value: torch.Tensor) -> None:
        """Set what the optimizer keeps of a parameter; it is shaped as this rank's part of it, or one number."""

    def finish(self, vote: Vote, step: Callable[[], None] | None = None) -> Finish:
        """See ``Replica``. ``step`` is called in place of the optimizer's own, and sets the parameters."""
        ...
