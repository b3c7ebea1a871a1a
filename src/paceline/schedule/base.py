"""What a schedule is: it runs a step's micro-batches through this rank's part of the model."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from paceline.objectives.base import Batch


class Schedule(Protocol):
    """All ranks of a replica call the same methods in the same order; along its pipeline they give the same batches."""

    def run(self, batches: Sequence[Batch], *, step: int, scale: float, expect: Callable[[bool], None]) -> float:
        """Add ``scale`` times the gradient of the summed loss to the gradients of this rank's parameters.

        Returns the summed loss as far as this rank computed it: 0.0 where it has only stages before the last.
        ``expect`` is told before the gradients change whether they are final after it.
        """
        ...

    def evaluate(self, batch: Batch) -> float:
        """The summed loss of a batch as far as this rank computed it, without gradients."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """From ids (B, S) to logits (B, S, V), without gradients, on every rank."""
        ...
