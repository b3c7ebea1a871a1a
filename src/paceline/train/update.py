"""The update of a step, as one rank of a replica sees it: gradients that can be measured, and what adjusts them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paceline.comm.mesh import Mesh
from paceline.comm.replica import Shard
from paceline.parallel.held import Held


class Update:
    """This rank's shards and their gradients; all ranks of the replica call the same methods in the same order.

    Gradients are measured once a step, by one exchange, however many groups they are in. ``device``: where ranks talk.
    """

    def __init__(self, shards: Sequence[Shard], mesh: Mesh, held: Mapping[str, Held], device: torch.device) -> None:
        self.shards, self.mesh, self.held, self.device = shards, mesh, held, device
        self.rates: Mapping[str, float] = {}
        """Of the step under way, by the names of parameters."""
        self.group([0] * len(shards), 1)
        self._squares: Tensor | None = None

    def counts(self, name: str) -> bool:
        """Whether this rank counts its values of a parameter: of ranks with equal values exactly one does."""
        held = self.held.get(name)
        return self.mesh.tensor.index == 0 if held is None else held.is_owner

    def group(self, groups: Sequence[int], count: int) -> None:
        """Say which of ``count`` groups each shard is in; the groups are the same on all ranks."""
        self._groups = list(groups)
        self._counting = torch.zeros(count, len(self.shards), dtype=torch.float64)
        for place, (group, shard) in enumerate(zip(groups, self.shards, strict=True)):
            self._counting[group, place] = float(self.counts(shard.name))

    def begin(self, rates: Mapping[str, float]) -> None:
        """The gradients are those of another step."""
        self.rates, self._squares = rates, None

    def changed(self) -> None:
        """The gradients are no longer those that were measured."""
        self._squares = None

    def gradients(self) -> list[tuple[int, Shard, Tensor]]:
        """Group, shard and gradient of all shards that have one."""
        pairs = zip(self._groups, self.shards, strict=True)
        return [(group, shard, gradient) for group, shard in pairs if (gradient := shard.gradient) is not None]

    def norm(self) -> float:
        """L2 norm of the gradients over the replica; not finite where a gradient is not."""
        return float(self._measured().sum().sqrt())

    def norms(self) -> list[float]:
        """The same of each group."""
        norms: list[float] = self._measured().sqrt().tolist()
        return norms

    def scale(self, factors: Sequence[float]) -> None:
        """Multiply the gradients of each group by its factor."""
        measured = self._measured()
        for factor in set(factors) - {1.0}:
            if members := [gradient for group, _, gradient in self.gradients() if factors[group] == factor]:
                torch._foreach_mul_(members, factor)
        self._squares = measured * torch.tensor(factors, dtype=torch.float64).square()

    def _measured(self) -> Tensor:
        """Squared norms of the groups (G,), each value counted by the one rank that does: fp64, on the CPU."""
        if self._squares is None:
            has = [place for place, shard in enumerate(self.shards) if shard.gradient is not None]
            own = [gradient for _, _, gradient in self.gradients()]
            squares = torch.stack(torch._foreach_norm(own)).double().square() if own else torch.zeros(0).double()
            sums = self._counting[:, has].to(self.device) @ squares.to(self.device)
            self._squares = self.mesh.world.all_reduce(sums, where="gradient norm").cpu()
        return self._squares


class Adjustment:
    """What changes gradients before the optimizer's step, or parameters after it. Ranks call the same ones in order."""

    def start(self, update: Update) -> None:
        """Once, before the first step."""

    def before(self, update: Update) -> None:
        """When it is certain that the step will be taken."""

    def after(self, update: Update) -> None:
        """When the optimizer has changed the parameters (``Shard.local``)."""

    def state(self) -> Mapping[str, Tensor]:
        """What has to be kept between steps, by the names of parameters: tensors like them, placed as they are."""
        return {}
