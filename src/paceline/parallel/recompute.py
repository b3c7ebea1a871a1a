"""Activation recompute: keep the input of each block, and compute the rest again in the backward pass."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.dropout import Dropout


def recompute_full(model: nn.Module, dropout: Dropout | None = None) -> int:
    """Wrap the forward of every block; returns how many. ``PlanError`` if the model has no blocks.

    ``dropout`` is put in force again for the second forward, by which time another micro-batch may be current; of
    anything else that is random, the random state is restored.
    """
    found = blocks(model)
    if not found:
        raise PlanError(
            f"layout.recompute=full needs a model with a list of blocks; {type(model).__name__} has no nn.ModuleList. "
            "Use layout.recompute=none."
        )
    for block in found.values():
        block.forward = _Recomputed(block.forward, dropout)
    return len(found)


class _Recomputed:
    """A forward whose activations are not kept."""

    def __init__(self, forward: Callable[..., Any], dropout: Dropout | None) -> None:
        self._forward = forward
        self._contexts: dict[str, Any] = {} if dropout is None else {"context_fn": dropout.again}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, **self._contexts, **kwargs)
