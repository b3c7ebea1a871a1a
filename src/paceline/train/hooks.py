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
    """Global L2 norm before clipping."""
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

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


Hook = Callable[[StepEvent], None]
