"""Bytes one rank holds: states exactly, activations as an estimate that is called one."""

from dataclasses import dataclass

from paceline.plan.batch import BatchPlan
from paceline.plan.layout import Grid
from paceline.plan.model import ModelSizes
from paceline.plan.precision import Precision


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank by what they hold."""

    master_weights: int
    """What learns."""
    compute_weights: int
    """What the model computes with besides what learns: a copy in 16 bits, or weights gathered from all shards."""
    gradients: int
    optimizer: int
    copies: int
    """Averages of the weights, and what their changes are measured against or penalised for."""
    sync: int
    activations_estimate: int
    logits_estimate: int

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.master_weights + self.compute_weights + self.gradients + self.optimizer + self.copies + self.sync

    @property
    def total_estimate(self) -> int:
        """States, activations and logits."""
        return self.states + self.activations_estimate + self.logits_estimate


def rank_memory(
    model: ModelSizes,
    batch: BatchPlan,
    *,
    grid: Grid,
    zero: int,
    precision: Precision,
    recompute: str,
    optimizer_bytes: int,
    sync_bytes: int,
    logit_rows: int | None,
    copy_bytes: int = 0,
) -> RankMemory:
    """Memory of one rank of a replica, were all cuts even.

    ``optimizer_bytes``: what all ranks keep together. ``copy_bytes``: of a value that is trained, in copies besides the
    one that learns.

    States are exact up to what does not divide, and to the one block at a time that ZeRO 3 gathers. Experts count as
    chosen evenly. Activations: 34 bytes a token and unit of width in a block at 2 bytes a value, 2 with full recompute
    (Korthikanti et al., arXiv 2205.05198, table 2), with selective recompute also the outputs of matrices and
    attention, 10 times the width; the first of P stages keeps P micro-batches. Logits: their own dtype, and as much
    again for the gradient; where the loss takes ``logit_rows`` at a time, these and their fp32 copy, and the gradient
    of the head.
    """
    value_bytes = precision.compute_bytes
    gradient_bytes = precision.gradient_bytes(batch.micro_batches)
    tokens = batch.micro * batch.sequence_tokens // grid.context
    per_unit = {"none": 34, "selective": 22, "full": 2}[recompute]
    cut, sharded = grid.pipeline * grid.tensor, grid.shard * grid.context
    states = cut * sharded
    used = model.parameters - model.experts + model.experts // grid.expert
    block = used // max(1, model.layers) // grid.tensor
    separate = precision.has_masters or sharded > 1
    computed = (used // cut if sharded == 1 or zero < 3 else block) if separate else 0
    learned = model.trainable * used // max(1, model.parameters)
    if logit_rows is None:
        logits = 2 * tokens * model.vocabulary * value_bytes
    else:
        logits = model.vocabulary * (min(tokens, logit_rows) * (value_bytes + 4) + 4 * model.width)
    blocks = -(-model.layers // grid.pipeline) * min(grid.pipeline, batch.micro_batches)
    return RankMemory(
        master_weights=precision.stored_bytes * model.parameters // states,
        compute_weights=value_bytes * computed,
        gradients=gradient_bytes * learned // cut if zero == 1 else gradient_bytes * model.trainable // states,
        optimizer=optimizer_bytes // states,
        copies=copy_bytes * model.trainable // states,
        sync=sync_bytes,
        activations_estimate=tokens * model.width * blocks * per_unit * value_bytes // 2 // grid.tensor,
        logits_estimate=logits // grid.tensor,
    )
