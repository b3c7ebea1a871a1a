"""The arithmetic of a layout."""

from paceline.config import LayoutConfig
from paceline.errors import PlanError

AXES = ("shard", "tensor", "pipeline", "context", "expert")


def ranks_per_replica(layout: LayoutConfig) -> int:
    """Ranks that hold one copy of the training state; ``PlanError`` for an axis that cannot be cut yet."""
    asked = [f"layout.{axis}={size}" for axis in AXES if (size := getattr(layout, axis)) > 1]
    if asked:
        raise PlanError(
            f"{', '.join(asked)}: this version runs a whole replica on one rank. Use 1, and share work by replicas=N."
        )
    return 1
