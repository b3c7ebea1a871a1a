"""What replicas that learn alone do in a step, whatever they exchange, when and with whom.

Each takes steps of its own, with its own gradient, optimizer and moments. Whether a step is taken each decides alone,
and one that is not (a gradient overflowed at its loss scale) has no targets. Means are made in fp32 at least, and
parameters of 16 bits rounded to by chance, by the same draw in all replicas.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from paceline.comm.boxes import whole
from paceline.comm.replica import Finish, Replica, Shard
from paceline.models.chance import stream_seed
from paceline.parallel.rounding import round_box
from paceline.sync.base import NOTHING, SyncContext, check_equal_start


class Alone(ABC):
    """A base of strategies: they say when replicas talk, and what is done after each step."""

    def __init__(self, context: SyncContext) -> None:
        self._link, self._steps, self._seed = context.link, context.steps, context.seed
        self._step = self._count = 0

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal."""
        check_equal_start(self._link, replica)
        self._device = replica.shards[0].local.device

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """This replica's own targets."""
        self._step, self._count = step, count
        return count

    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """Gradients are each replica's own, and so is what is reported."""
        return (NOTHING, False) if values is None else self.total(values, stop)

    def total(self, values: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """This replica's own values. All stop, if one was asked to, when replicas talk."""
        if self._link.size == 1:
            return values, stop
        return values, self._talks(self._step) and self._sum(float(stop)).item() > 0

    def update(self, replica: Replica) -> Finish:
        """Step, and what comes after it; unless the run is to end here: then weights stay as they are."""
        finish = replica.finish(vote=lambda wish: wish)
        if finish.stepped or finish.overflowed:
            self._stepped(replica, self._count * finish.stepped)
        return finish

    @abstractmethod
    def _talks(self, step: int) -> bool:
        """Whether all replicas talk in ``step``."""

    @abstractmethod
    def _stepped(self, replica: Replica, targets: int) -> None:
        """After a step: ``targets`` were learned from, none if it was not taken."""

    def _put(self, shard: Shard, exact: Tensor) -> None:
        """Set a parameter, as ``_round`` does."""
        self._round(shard, exact, shard.local, "exchange", self._step)

    def _round(self, shard: Shard, exact: Tensor, kept: Tensor, *draw: object) -> None:
        """Write to what is like a parameter; of 16 bits to either of the two values next to it, by a draw."""
        if kept.dtype.itemsize > 2:
            kept.copy_(exact)
            return
        part = shard.part or whole(kept.shape)
        key = stream_seed(self._seed, *draw, shard.name)
        for block in part.blocks:
            round_box(block.of(exact), block.of(kept), start=block.start, full_shape=part.full_shape, key=key)

    def _sum(self, *values: float) -> Tensor:
        """Over the replicas: fp64, on the CPU."""
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._link.all_reduce(total).wait()
        return total.cpu()


def exchanges(every: int, steps: int) -> int:
    """How often replicas talk in a number of steps, the last of which ends with an exchange."""
    return -(-steps // every)


def share_of(learned: float, targets: float, replicas: int) -> float:
    """A replica's share in a mean by targets; where none was learned from, all count the same."""
    return learned / targets if targets > 0 else 1.0 / replicas


def wide(tensor: Tensor) -> Tensor:
    """In fp32 at least; the tensor itself if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
