"""How much the weights moved in a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from paceline.train.replica import ModuleReplica


class Changes:
    """The largest relative change of a parameter tensor over a step, of whole tensors, the same on all ranks.

    ``names``: all parameters that the replica trains, in one order on all of its ranks. Keeps one copy of this rank's
    part of the parameters.
    """

    def __init__(self, replica: ModuleReplica, names: Sequence[str]) -> None:
        self._replica = replica
        self._owned = [shard for shard in replica.shards if replica.owns(shard.name)]
        self._places = [names.index(shard.name) for shard in self._owned]
        self._count = len(names)
        self._before = [torch.empty_like(shard.local) for shard in self._owned]
        self.largest = 0.0
        """|after - before| / |before|, the largest of all tensors that were not zero; of the last step."""

    @contextmanager
    @torch.no_grad()
    def measured(self) -> Iterator[None]:
        """Measure what changes inside."""
        if self._owned:
            torch._foreach_copy_(self._before, [shard.local for shard in self._owned])
        yield
        before = _squares(self._before)
        if self._owned:
            torch._foreach_sub_(self._before, [shard.local for shard in self._owned])
        whole = self._replica.sum_of(self._spread(_squares(self._before), before))
        changes, sizes = whole.sqrt().chunk(2)
        self.largest = float((changes / sizes.where(sizes > 0, torch.inf)).max())

    def _spread(self, *values: Tensor) -> Tensor:
        """Each of the values, one for each tensor that is owned here, at the places of all tensors."""
        spread = torch.zeros(len(values), self._count, dtype=torch.float64)
        for row, own in zip(spread, values, strict=True):
            row[self._places] = own
        return spread.flatten()


def _squares(tensors: list[Tensor]) -> Tensor:
    """The squared norm of each tensor, taken in fp32 at least: fp64, on the CPU."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, wide)).double().square().cpu()
