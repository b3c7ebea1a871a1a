"""What reducers of whole tensors share: the way from parts to owners in the replica and back, and error feedback."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from paceline.comm.replica import Shard
from paceline.parallel.full import FullTensors
from paceline.sync.base import SyncContext, SyncState
from paceline.sync.reducers.base import Wait
from paceline.sync.reducers.residual import Residual

Arrive = Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Waits for the sums of whole tensors, and gives them, and what is left out of each."""


class WholeReducer(ABC):
    """A reducer for which each tensor that it ``takes`` is whole on one rank of the replica; others stay in parts."""

    def __init__(self, context: SyncContext, *, error_feedback: bool, decay: float = 1.0) -> None:
        self.context, self.link, self.error_feedback = context, context.link, error_feedback
        self.residual = Residual(is_kept=error_feedback, members=context.link.size, decay=decay)
        self.full: FullTensors
        self.owner: dict[str, int] = {}
        """The rank of the replica that has a tensor whole."""

    def start(self, shards: Sequence[Shard]) -> None:
        """Choose who has which tensor."""
        self.full = self.context.full_tensors(shards)
        names = [shard.name for shard in shards if self.takes(self.full.shape(shard.name))]
        self.owner = dict.fromkeys(names, 0) if self.full.ranks == 1 else self.full.owners(names, math.prod)
        self.residual.start(shards)

    def weighted_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Mapping[str, Tensor]:
        """See ``Reducer``."""
        return self.start_sum(values, share, step)()

    def start_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Wait:
        """See ``Reducer``."""
        sent = self.residual.add(values, share)
        if self.link.size == 1:
            self.residual.keep({name: torch.zeros_like(tensor) for name, tensor in sent.items()})
            return lambda: sent
        cut = {name: tensor for name, tensor in sent.items() if name in self.owner}
        plain = {name: tensor for name, tensor in sent.items() if name not in self.owner}
        whole = self.full.gather(cut, self.owner)
        arrive = self.start_exchange(whole, plain, step)

        def wait() -> Mapping[str, Tensor]:
            sums, rest = arrive()
            if self.error_feedback:
                none = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
                self.residual.keep(self.full.scatter(rest, cut, self.owner) | none)
            return self.full.scatter(sums, cut, self.owner) | plain

        return wait

    def settle(self, unused: Collection[str] = ()) -> None:
        """See ``Reducer``."""
        self.residual.settle(unused)

    def state(self) -> Mapping[str, SyncState]:
        """The residual."""
        return self.residual.state()

    def is_here(self, name: str) -> bool:
        """Whether this rank has the tensor whole."""
        return self.owner[name] == self.full.index

    @abstractmethod
    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this full shape is encoded."""

    @abstractmethod
    def start_exchange(self, whole: Mapping[str, Tensor], plain: dict[str, Tensor], step: int) -> Arrive:
        """Start the sums of this rank's whole tensors; ``plain`` becomes sums in its place."""


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns: the last dimension is the columns. A vector is one row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1
