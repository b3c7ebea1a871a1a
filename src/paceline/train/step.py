"""One step: count, forward and backward, exchange, finish."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.errors import NonFiniteError
from paceline.objectives.base import Batch
from paceline.schedule.base import Schedule
from paceline.sync.base import Sync
from paceline.train.replica import ModuleReplica


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, over the replicas whose sums the sync takes together (``Sync.total``)."""

    loss: float
    """Mean over the targets, before the update."""
    targets: int
    gradient_norm: float
    stop: bool
    """Some rank was asked to stop, and all of them have agreed to, after this step."""


def train_step(
    replica: ModuleReplica, sync: Sync, schedule: Schedule, batches: Sequence[Batch], *, step: int, stop: bool
) -> StepResult:
    """Run one step on this rank's micro-batches; ``NonFiniteError``, before the weights change, if it went bad.

    The loss is a sum; it is divided once, before the backward pass, by the targets of the group that the sync names.
    """
    (own_targets,), _ = replica.total([sum(batch.count for batch in batches)])
    group_targets = sync.begin(step, replica, int(own_targets))
    loss_sum = schedule.run(batches, step=step, scale=1.0 / max(1, group_targets), expect=replica.expect)
    replica.end_backward()
    (own_loss,), stop = replica.total([loss_sum], stop=stop)
    sums, stop = sync.total(torch.tensor([own_loss, own_targets], dtype=torch.float64), stop)
    total_loss, targets = sums.tolist()
    loss = total_loss / max(1, targets)
    if not math.isfinite(loss):
        raise NonFiniteError(f"loss is {loss} at step {step}")
    sync.reduce(replica)
    finish = sync.update(replica)
    if not finish.stepped:
        raise NonFiniteError(f"the gradient norm is {finish.gradient_norm} at step {step} (the loss was {loss:.6g})")
    return StepResult(loss=loss, targets=int(targets), gradient_norm=finish.gradient_norm, stop=stop)
