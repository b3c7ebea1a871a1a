"""What an observer of a run is told. Hooks only look: what acts is a strategy or a policy."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One step that is done."""

    step: int
    """1-based."""
    loss: float
    """Mean loss per target (nats) over the replicas that share the step, before its update."""
    lr: float
    gradient_norm: float
    """Global L2 norm before clipping, without the loss scale; not finite in a step that was skipped."""
    tokens: int
    """Tokens of this step over all ranks."""
    tokens_seen: int
    sequences_seen: int
    tokens_per_s: float
    mfu: float
    """Share of the measured matrix-multiplication peak; operations by ``plan.model.FLOPS_FORMULA``."""
    step_s: float
    data_wait_s: float
    memory_bytes: int
    """Resident memory of this rank, or allocated on its GPU."""
    time: float
    """Seconds since the epoch."""
    skipped: bool = False
    """A gradient overflowed in fp16, and the weights stayed as they were. The step counts, and its batch is past."""
    skipped_steps: int = 0
    """Of the run so far."""
    loss_scale: float | None = None
    """By which the loss of this step was multiplied; None where it is not scaled."""

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON: without what belongs to a loss scale where there is none."""
        values = asdict(self)
        if self.skipped:
            values["gradient_norm"] = None
        if self.loss_scale is None:
            for key in ("skipped", "skipped_steps", "loss_scale"):
                del values[key]
        return values


Hook = Callable[[StepEvent], None]
