"""One step: count, forward and backward, exchange, finish."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.errors import NonFiniteError
from paceline.objectives.base import Batch
from paceline.schedule.base import Schedule
from paceline.sync.base import Fetching, Stepping
from paceline.train.again import Again, backward
from paceline.train.replica import ModuleReplica


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, over the replicas whose sums the sync takes together (``Sync.reduce``)."""

    loss: float
    """Mean over the targets, before the update."""
    targets: int
    gradient_norm: float
    """Before clipping, without the loss scale."""
    skipped: bool
    """A gradient overflowed at the loss scale, which is lower now: nothing was learned."""
    stop: bool
    """Some rank was asked to stop, and all of them have agreed to, after this step."""


def train_step(
    replica: ModuleReplica, sync: Stepping, schedule: Schedule, batches: Sequence[Batch], *, step: int, stop: bool
) -> StepResult:
    """Run one step on this rank's micro-batches; ``NonFiniteError``, before the weights change, if it went bad.

    The loss is a sum; it is divided once, before the backward pass, by the targets of the group that the sync names.
    """
    replica.begin(step)
    if isinstance(sync, Fetching):
        sync.fetch(replica, torch.unique(torch.cat([batch.tokens for batch in batches])))
    again = replica.passes = Again(replica, sync, schedule, batches, step=step)
    again.estimate()
    loss_sum, own_targets, _ = backward(replica, sync, batches, again.run(batches), step=step)
    (own_loss,), stop = replica.total([loss_sum], stop=stop)
    sums, stop = sync.reduce(replica, torch.tensor([own_loss, own_targets], dtype=torch.float64), stop)
    total_loss, targets = sums.tolist()
    again.loss = loss = total_loss / max(1, targets)
    if not math.isfinite(loss):
        replica.veto()
    finish = sync.update(replica)
    if not (finish.stepped or finish.overflowed):
        raise NonFiniteError(_what_went_bad(loss, finish.gradient_norm, step))
    skipped, norm = not finish.stepped, finish.gradient_norm
    stop = stop or finish.stop
    return StepResult(loss=loss, targets=int(targets), gradient_norm=norm, skipped=skipped, stop=stop)


def _what_went_bad(loss: float, gradient_norm: float, step: int) -> str:
    if not math.isfinite(loss):
        return f"loss is {loss} at step {step}"
    return f"the gradient norm is {gradient_norm} at step {step} (the loss was {loss:.6g})"
