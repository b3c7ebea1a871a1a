"""One round of a federated run: the clients that train at this replica, one after the other, and what comes of them."""

import math
from collections.abc import Callable, Iterable, Sequence

from paceline.data.client_loader import ClientLoader
from paceline.data.loader import MicroBatches
from paceline.data.rows import Row
from paceline.errors import NonFiniteError
from paceline.objectives.base import Batch
from paceline.schedule.base import Schedule
from paceline.sync.base import Stepping
from paceline.sync.federation import Closed, FederatedSync
from paceline.train.replica import ModuleReplica
from paceline.train.step import StepResult, train_step

BatchOf = Callable[[Sequence[Row], int], Batch]
"""From the rows of a micro-batch, and the number of the local step, to what the model is given."""


def train_round(
    replica: ModuleReplica,
    sync: FederatedSync,
    schedule: Schedule,
    loader: ClientLoader,
    batch_of: BatchOf,
    *,
    step: int,
    stop: bool,
) -> StepResult:
    """Run round ``step``; ``NonFiniteError``, before the server's weights change, if it went bad."""
    sync.open(step, loader.rounds.at(step), replica)
    for visit, steps in loader.visits(step):
        sync.enter(visit, replica)
        local_steps(replica, sync, schedule, steps, batch_of, words=f"round {step}, client {visit.client}")
        sync.leave(replica)
    _, stop = replica.total((), stop=stop)
    return closed_round(sync.close(step, loader.rounds.at(step), replica, stop), step)


def local_steps(
    replica: ModuleReplica,
    sync: Stepping,
    schedule: Schedule,
    steps: Iterable[MicroBatches],
    batch_of: BatchOf,
    *,
    words: str,
) -> None:
    """A client's local steps; ``words`` say whose they are.

    They are numbered from 1: what is drawn in them follows from that number and the sample's.
    """
    for number, rows in enumerate(steps, 1):
        batches = [batch_of(micro, number) for micro in rows]
        try:
            train_step(replica, sync, schedule, batches, step=number, stop=False)
        except NonFiniteError as error:
            raise NonFiniteError(f"{words}: {error}") from None


def closed_round(closed: Closed, step: int) -> StepResult:
    """What came of a round; ``NonFiniteError`` if nothing did."""
    if not math.isfinite(closed.update_norm):
        raise NonFiniteError(f"the clients' joint update is not finite in round {step}")
    return StepResult(
        loss=closed.loss,
        targets=closed.targets,
        gradient_norm=closed.update_norm,
        skipped=False,
        stop=closed.stop,
    )
