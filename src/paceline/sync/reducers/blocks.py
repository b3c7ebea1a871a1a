"""What reducers of fixed blocks share: the way from parts of tensors to whole blocks and back, and error feedback."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from paceline.comm.replica import Shard
from paceline.models.chance import fold, stream_seed
from paceline.parallel.dealt import Dealt
from paceline.sync.base import SyncContext, SyncState
from paceline.sync.reducers.base import Wait
from paceline.sync.reducers.residual import Residual


class BlockReducer(ABC):
    """A reducer that exchanges blocks of ``size`` values of full tensors with the members that hold the same ones."""

    def __init__(self, context: SyncContext, size: int, *, error_feedback: bool, decay: float = 1.0) -> None:
        self.link, self.size, self.error_feedback = context.link, size, error_feedback
        self._context = context
        self._residual = Residual(is_kept=error_feedback, members=context.link.size, decay=decay)
        self.dealt: Dealt
        self.device: torch.device
        self._like: dict[str, Tensor] = {}
        """Shapes of this rank's parts."""

    def start(self, shards: Sequence[Shard]) -> None:
        """Deal out the blocks inside the replica."""
        self.dealt = Dealt(self._context.full_tensors(shards), [shard.name for shard in shards], self.size)
        self.device = shards[0].local.device if shards else torch.device("cpu")
        self._like = {shard.name: torch.empty_like(shard.local, device="meta") for shard in shards}
        self._residual.start(shards)

    def weighted_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Mapping[str, Tensor]:
        """See ``Reducer``."""
        return self.start_sum(values, share, step)()

    def start_sum(self, values: Mapping[str, Tensor], share: float, step: int) -> Wait:
        """See ``Reducer``."""
        sent = self._residual.add(values, share)
        if self.link.size == 1:
            self._residual.keep({name: torch.zeros_like(tensor) for name, tensor in sent.items()})
            return lambda: sent
        blocks = self.dealt.gather(sent)
        # Who has no block has none in any replica.
        arrive = self.start_exchange(blocks, step) if len(blocks) else lambda: blocks

        def wait() -> Mapping[str, Tensor]:
            sums = arrive()
            if self.error_feedback:
                self._residual.keep(self.dealt.scatter(blocks, self._like))
            return self.dealt.scatter(sums, self._like)

        return wait

    def settle(self, unused: Collection[str] = ()) -> None:
        """See ``Reducer``."""
        self._residual.settle(unused)

    def state(self) -> Mapping[str, SyncState]:
        """The residual."""
        return self._residual.state()

    @abstractmethod
    def start_exchange(self, blocks: Tensor, step: int) -> Callable[[], Tensor]:
        """Start the sums of the blocks (N, size) of all members; what is returned waits for them.

        What is left out stays in ``blocks``.
        """

    def keys(self, step: int, who: int | str) -> Tensor:
        """For each of this rank's blocks what its draws follow from, whoever has it: int64 (N,)."""
        keys = [
            fold(
                stream_seed(self._context.seed, "reducer", step, run.name, who),
                torch.arange(run.first, run.first + run.count, device=self.device),
            )
            for run in self.dealt.runs
        ]
        return torch.cat(keys) if keys else torch.zeros(0, dtype=torch.int64, device=self.device)
