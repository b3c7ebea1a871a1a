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
        self._groups, self._count = list(groups), count

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
        """L2 norm of the gradients over the replica.

        Not finite if a gradient is not on any rank, also where it is a copy that is not counted.
        """
        return float(self._measured().sum().sqrt())

    def norms(self) -> list[float]:
        """The same of each group."""
        norms: list[float] = self._measured().sqrt().tolist()
        return norms

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        self.scale_groups([factor] * self._count)

    def scale_groups(self, factors: Sequence[float]) -> None:
        """Multiply the gradients of each group by its factor."""
        for factor in set(factors) - {1.0}:
            if members := [gradient for group, _, gradient in self.gradients() if factors[group] == factor]:
                torch._foreach_mul_(members, factor)
        if self._squares is not None:
            self._squares = self._squares * torch.tensor(factors, dtype=torch.float64).square()

    def _measured(self) -> Tensor:
        """Squared norms of the groups (G,), each value counted by the one rank that does: fp64, on the CPU."""
        if self._squares is None:
            squares = torch.zeros(self._count, dtype=torch.float64, device=self.device)
            if found := self.gradients():
                wide = torch.promote_types(found[0][2].dtype, torch.float32)
                norms = torch._foreach_norm([gradient for _, _, gradient in found], 2, wide)
                counted = torch.tensor([self.counts(shard.name) for _, shard, _ in found], device=self.device)
                own = torch.stack(norms).double().to(self.device).square() * counted  # not finite is NaN, also times 0
                squares.index_add_(0, torch.tensor([group for group, _, _ in found], device=self.device), own)
            self._squares = self.mesh.world.all_reduce(squares, where="gradient norm").cpu()
        return self._squares


class Adjustment:
    """What changes gradients before the optimizer's step, or parameters after it. Ranks call the same ones in order."""

    def start(self, update: Update) -> None:
        """Once, before the first step."""

    def before(self, update: Update) -> None:
        """When it is certain that the step will be taken; the gradients are those of the mean loss, without a scale."""

    def after(self, update: Update) -> None:
        """When the optimizer has changed the parameters (``Shard.local``)."""

    def state(self) -> Mapping[str, Tensor]:
        """What has to be kept between steps, by the names of parameters: tensors like them, placed as they are."""
        return {}
