"""Activation recompute: keep the input of each block, and compute the rest again in the backward pass."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from paceline.errors import PlanError
from paceline.parallel.blocks import blocks


def recompute_full(model: nn.Module) -> int:
    """Wrap the forward of every block; returns how many. ``PlanError`` if the model has no blocks.

    The random state is restored for the second forward, so dropout draws the same masks.
    """
    found = blocks(model)
    if not found:
        raise PlanError(
            f"layout.recompute=full needs a model with a list of blocks; {type(model).__name__} has no nn.ModuleList. "
            "Use layout.recompute=none."
        )
    for block in found.values():
        block.forward = _Recomputed(block.forward)
    return len(found)


class _Recomputed:
    """A forward whose activations are not kept."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
