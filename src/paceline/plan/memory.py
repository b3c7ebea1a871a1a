"""Bytes one rank holds: states exactly, activations as an estimate that is called one."""

from dataclasses import dataclass

from paceline.plan.batch import BatchPlan
from paceline.plan.model import ModelSizes


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank by what they hold."""

    master_weights: int
    compute_weights: int
    """The bf16 copy the model computes with; 0 in fp32, where the masters are the model."""
    gradients: int
    optimizer: int
    sync: int
    activations_estimate: int
    logits_estimate: int

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.master_weights + self.compute_weights + self.gradients + self.optimizer + self.sync

    @property
    def total_estimate(self) -> int:
        """States, activations and logits."""
        return self.states + self.activations_estimate + self.logits_estimate


def rank_memory(
    model: ModelSizes, batch: BatchPlan, *, precision: str, recompute: str, state_per_parameter: int, sync_bytes: int
) -> RankMemory:
    """Memory of a rank that holds a whole replica.

    Activations: 34 bytes a token and unit of width in a block at 2 bytes a value, 2 with full recompute (Korthikanti et
    al., arXiv 2205.05198, table 2). Logits: their own dtype, and as much again for the gradient.
    """
    value_bytes = 2 if precision == "bf16" else 4
    tokens = batch.micro * batch.sequence_tokens
    per_unit = 2 if recompute == "full" else 34
    return RankMemory(
        master_weights=4 * model.parameters,
        compute_weights=2 * model.parameters if precision == "bf16" else 0,
        gradients=4 * model.trainable,
        optimizer=4 * state_per_parameter * model.trainable,
        sync=sync_bytes,
        activations_estimate=tokens * model.width * model.layers * per_unit * value_bytes // 2,
        logits_estimate=2 * tokens * model.vocabulary * value_bytes,
    )
