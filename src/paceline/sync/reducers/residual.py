"""Error feedback (Stich et al. 2018, arXiv 1809.07599; Karimireddy et al. 2019, arXiv 1901.09847).

    p <- share * value + decay * residual;   C(p) is sent;   residual <- p - C(p);   decay is 1 for most

The residual is in units of the sum, so that it is worth the same whatever the share of its replica is later. All that
is ever put in is what has come out so far plus the residuals of all replicas. What the encoding of the sum leaves out,
too, is kept by the replica that owned the piece. A residual is held times the number of replicas: so the mean, from
which another number of them goes on, is what was left out in all.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from paceline.comm.replica import Shard
from paceline.sync.base import SyncState


class Residual:
    """What of each parameter is still to be sent, of one replica; nothing without error feedback."""

    def __init__(self, *, is_kept: bool, members: int, decay: float = 1.0) -> None:
        self.is_kept, self._members, self._decay = is_kept, members, decay
        self._kept: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def start(self, shards: Sequence[Shard]) -> None:
        """Nothing is left over yet."""
        if self.is_kept:
            self._kept = {
                s.name: torch.zeros_like(s.local, dtype=torch.promote_types(s.local.dtype, torch.float32))
                for s in shards
            }

    def add(self, values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """What is to be sent now, in new memory."""
        self._before = {}
        if not self.is_kept:
            return {name: value * share for name, value in values.items()}
        kept = self._kept
        part = self._decay / self._members
        return {name: (value * share).add_(kept[name], alpha=part) for name, value in values.items()}

    def keep(self, residual: Mapping[str, Tensor]) -> None:
        """What was left out; what was there before is kept until ``settle``."""
        if self.is_kept:
            self._before = self._kept
            self._kept = {name: residual[name] * self._members for name in self._before}

    def settle(self, unused: Collection[str] = ()) -> None:
        """See ``Reducer.settle``."""
        if self._before:
            self._kept |= {name: self._before[name] for name in unused}
        self._before = {}

    def state(self) -> Mapping[str, SyncState]:
        """By parameter; replicas have different ones."""
        return {f"{name}/residual": SyncState(tensor, like=name, rule="mean") for name, tensor in self._kept.items()}
