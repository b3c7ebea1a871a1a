"""More than one pass over a step's batch: what optimizers may ask for besides the gradient of a step.

Each is a pass of all ranks and replicas like the step's own: targets are counted, gradients are summed within the
replica and exchanged by the sync. Only the end differs: what comes out is kept, and no step is taken. So of a sync that
exchanges after steps, these passes make none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paceline.errors import NonFiniteError
from paceline.objectives.base import Batch
from paceline.objectives.drawn import Draw
from paceline.optim.base import Estimating
from paceline.schedule.accumulate import Accumulate
from paceline.schedule.base import Schedule
from paceline.sync.base import Stepping
from paceline.train.replica import ModuleReplica

Run = Callable[[float], float]
"""From what gradients are multiplied by to the summed loss of this rank."""


def backward(
    replica: ModuleReplica, sync: Stepping, batches: Sequence[Batch], run: Run, *, step: int
) -> tuple[float, int, int]:
    """Forward and backward on this rank's micro-batches; the sum of the loss over the replica is still to be made.

    Returns this rank's summed loss, the replica's targets, and those of the group that the sync names: by these the
    gradients are divided.
    """
    (own_targets,), _ = replica.total([sum(batch.count for batch in batches)])
    group_targets = sync.begin(step, replica, int(own_targets))
    loss_sum = run(replica.loss_scale.value / max(1, group_targets))
    replica.end_backward()
    return loss_sum, int(own_targets), group_targets


class Again:
    """The batch of one step, to be asked about at the parameters as they are. See ``optim.base.Passes``."""

    loss = math.nan

    def __init__(
        self, replica: ModuleReplica, sync: Stepping, schedule: Schedule, batches: Sequence[Batch], *, step: int
    ) -> None:
        self._replica, self._sync, self._schedule = replica, sync, schedule
        self._batches, self._step = batches, step

    def gradient(self) -> float:
        """The mean loss over the replicas that the sync takes together; its gradients are the parameters'."""
        loss_sum, own_targets, _ = self._pass(self._batches, self.run(self._batches))
        (own_loss,), _ = self._replica.total([loss_sum])
        (total, targets), _ = self._show([own_loss, own_targets])
        return float(total / max(1.0, targets))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss times a vector."""
        schedule = self._schedule
        assert isinstance(schedule, Accumulate), "a stage has no loss of its own to differentiate twice"
        names = [shard.name for shard in self._replica.shards]
        along = dict(zip(names, vectors, strict=True))
        batches = [replace(batch, twice=True) for batch in self._batches]
        self._pass(batches, lambda scale: schedule.product(batches, along, step=self._step, scale=scale))
        self._show()
        made = [shard.gradient for shard in self._replica.shards]
        return [torch.zeros_like(v) if hv is None else hv.clone() for v, hv in zip(vectors, made, strict=True)]

    def estimate(self) -> None:
        """Give an optimizer that wants them now the gradients for labels that the model draws.

        Where these overflow at a loss scale that may fall, as it will in the step itself, it goes without them.
        """
        optimizer, step = self._replica.optimizer, self._step
        if not isinstance(optimizer, Estimating) or not optimizer.estimates_at(step):
            return
        draw = Draw(seed=self._replica.seed, step=step)
        batches = [replace(batch, draw=draw) for batch in self._batches]
        _, _, group_targets = self._pass(batches, self.run(batches))
        _, norm = self._show()
        if math.isfinite(norm):
            optimizer.estimate(group_targets)
        elif not self._replica.loss_scale.is_dynamic:
            raise NonFiniteError(f"the gradient norm of drawn labels is {norm} at step {step}")
        self._replica.clear_gradients()

    def run(self, batches: Sequence[Batch]) -> Run:
        """The schedule's pass over some batches."""
        return lambda scale: self._schedule.run(batches, step=self._step, scale=scale, expect=self._replica.expect)

    @torch.enable_grad()
    def _pass(self, batches: Sequence[Batch], run: Run) -> tuple[float, int, int]:
        """This rank's summed loss, the replica's targets, and those of the group. Gradients are still its own."""
        self._replica.clear_gradients()
        return backward(self._replica, self._sync, batches, run, step=self._step)

    def _show(self, values: Sequence[float] = ()) -> tuple[list[float], float]:
        """Exchange the gradients and lend them to the optimizer; some values summed along with them, and their norm."""
        told = torch.tensor(values, dtype=torch.float64) if values else None
        sums, _ = self._sync.reduce(self._replica, told)
        return sums.tolist(), self._replica.lend_unscaled()
