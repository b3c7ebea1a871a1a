"""What a config comes to before anything is built: the grid of a replica's ranks, and the batch dealt out to them."""

from paceline.config import BatchConfig, Config
from paceline.errors import PlanError
from paceline.plan.batch import BatchPlan, plan_batch
from paceline.plan.layout import Grid, check_offload
from paceline.plan.stages import check_schedule, schedule_of


def plan_run(config: Config) -> tuple[Grid, BatchPlan]:
    """The grid and the batch; ``PlanError`` for what does not go together, whatever the model."""
    layout = config.layout
    grid = Grid.of(layout)
    data_parallel = config.all_replicas * grid.shard
    batch = plan_batch(_with_micro(config.batch, config, data_parallel), data_parallel)
    check_schedule(layout, batch, compiled=config.train.compile)
    cut = [axis for axis in ("tensor", "pipeline", "context", "expert") if getattr(layout, axis) > 1]
    if config.train.compile and cut:
        raise PlanError(
            f"train.compile=true with layout.{cut[0]}={getattr(layout, cut[0])} is not built: blocks that exchange "
            "tensors are not compiled yet. Use train.compile=false, or shard and replicas"
        )
    check_offload(layout, config.all_replicas)
    if config.train.compile and layout.recompute == "selective":
        raise PlanError(
            "train.compile=true with layout.recompute=selective is not built: compiled blocks choose for themselves "
            "what they keep. Use recompute=none or full"
        )
    if layout.tensor_patterns and layout.tensor == 1:
        raise PlanError("layout.tensor_patterns says how tensor ranks cut matrices. Set layout.tensor, or leave it out")
    if layout.sequence and layout.tensor == 1:
        raise PlanError(
            "layout.sequence=true cuts what lies between tensor ranks. Set layout.tensor, or sequence=false"
        )
    return grid, batch


def _with_micro(batch: BatchConfig, config: Config, data_parallel: int) -> BatchConfig:
    """A pipeline's micro-batches are as large as they can be with two for every rank of it, unless the config says."""
    stages = config.layout.pipeline
    if batch.micro is not None or stages == 1 or batch.sequences < data_parallel:
        return batch
    share = -(-batch.sequences // data_parallel)
    schedule = schedule_of(config.layout.schedule, stages)
    fits = [
        micro for micro in range(1, share + 1) if schedule.allows(count := -(-share // micro)) and count >= 2 * stages
    ]
    even_first = max(fits, default=1, key=lambda micro: (share % micro == 0, micro))
    return batch.model_copy(update={"micro": even_first})
