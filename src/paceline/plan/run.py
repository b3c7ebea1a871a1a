"""What a config comes to before anything is built: the grid of a replica's ranks, and the batch dealt out to them."""

from typing import Any

from paceline.config import BatchConfig, Config
from paceline.errors import PlanError
from paceline.plan.adjustments import check_adjustments
from paceline.plan.batch import Batches, BatchPlan, plan_batch, sequences_of
from paceline.plan.federated import check_federated
from paceline.plan.layout import Grid, check_offload
from paceline.plan.optimizer import check_optimizer
from paceline.plan.policy import check_policies
from paceline.plan.precision import check_precision
from paceline.plan.rate import check_rate
from paceline.plan.stages import check_schedule, schedule_of


def plan_run(config: Config) -> tuple[Grid, BatchPlan]:
    """The grid and the batch; ``PlanError`` for what does not go together, whatever the model."""
    layout = config.layout
    check_precision(config)
    check_federated(config)
    grid = Grid.of(layout)
    batch = plan_batches(config).full
    check_rate(config)
    check_policies(config)
    cut = [axis for axis in ("tensor", "pipeline", "context", "expert") if getattr(layout, axis) > 1]
    if config.train.compile and cut:
        raise PlanError(
            f"train.compile=true with layout.{cut[0]}={getattr(layout, cut[0])} is not built: blocks that exchange "
            "tensors are not compiled yet. Use train.compile=false, or shard and replicas"
        )
    check_offload(layout, config.all_replicas)
    check_optimizer(config)
    check_adjustments(config)
    for sync in config.syncs:
        sync.check(config)
    if layout.tensor_patterns and layout.tensor == 1:
        raise PlanError("layout.tensor_patterns says how tensor ranks cut matrices. Set layout.tensor, or leave it out")
    if layout.sequence and layout.tensor == 1:
        raise PlanError(
            "layout.sequence=true cuts what lies between tensor ranks. Set layout.tensor, or sequence=false"
        )
    return grid, batch


def plan_batches(config: Config, micro: int | None = None) -> Batches:
    """The batch of every step; ``PlanError`` if that of some step cannot be dealt out. ``micro``: what ``auto`` is.

    While the batch grows, a step is cut as that of a run whose batch is so large would be, but for a ``micro`` above a
    rank's share: then the share is one micro-batch.
    """
    if micro is not None:
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"micro": micro})})
    full, warmup = _plan(config, config.batch), config.batch.warmup
    if warmup is None:
        return Batches(full=full)
    plans: dict[int, BatchPlan] = {}
    growing = []
    for step in range(1, warmup.steps + 1):
        sequences = sequences_of(config.batch, step)
        if sequences not in plans:
            share = -(-sequences // full.data_parallel)
            own: Any = min(config.batch.micro, share) if isinstance(config.batch.micro, int) else config.batch.micro
            smaller = config.batch.model_copy(update={"sequences": sequences, "micro": own, "warmup": None})
            try:
                plans[sequences] = _plan(config, smaller)
            except PlanError as error:
                raise PlanError(f"batch.warmup gives step {step} a batch of {sequences}: {error}") from None
        growing.append(plans[sequences])
    return Batches(full=full, growing=tuple(growing))


def _plan(config: Config, batch: BatchConfig) -> BatchPlan:
    data_parallel = (1 if config.in_rounds else config.all_replicas) * Grid.of(config.layout).shard
    plan = plan_batch(_with_micro(batch, config, data_parallel), data_parallel)
    check_schedule(config.layout, plan, compiled=config.train.compile)
    return plan


def _with_micro(batch: BatchConfig, config: Config, data_parallel: int) -> BatchConfig:
    """A pipeline's micro-batches are as large as they can be with two for every rank of it, unless the config says."""
    stages = config.layout.pipeline
    if batch.micro == "auto" and stages > 1:
        raise PlanError(
            f"batch.micro=auto with layout.pipeline={stages} is not built: the schedule of a pipeline asks for a "
            "number of micro-batches of its own. Leave batch.micro out, or give a number"
        )
    if batch.micro is not None or stages == 1 or batch.sequences < data_parallel:
        return batch
    share = -(-batch.sequences // data_parallel)
    schedule = schedule_of(config.layout.schedule, stages)
    fits = [
        micro for micro in range(1, share + 1) if schedule.allows(count := -(-share // micro)) and count >= 2 * stages
    ]
    even_first = max(fits, default=1, key=lambda micro: (share % micro == 0, micro))
    return batch.model_copy(update={"micro": even_first})
