"""Activation recompute: keep the input of each block, and compute the rest again in the backward pass; all of it, or
all but what is dear (``kept``).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.kept import passes


def recompute(model: nn.Module, how: Literal["selective", "full"]) -> int:
    """Wrap the forward of every block; returns how many. ``PlanError`` if the model has no blocks.

    The random state is restored for the second forward, so dropout draws the same masks.
    """
    found = blocks(model)
    if not found:
        raise PlanError(
            f"layout.recompute={how} needs a model with a list of blocks; {type(model).__name__} has no nn.ModuleList. "
            "Use layout.recompute=none."
        )
    for block in found.values():
        block.forward = _Recomputed(block.forward, how)
    return len(found)


class _Recomputed:
    """A forward whose activations are not kept."""

    def __init__(self, forward: Callable[..., Any], how: str) -> None:
        options: dict[str, Any] = {"context_fn": passes} if how == "selective" else {}
        self._checkpoint = functools.partial(checkpoint, forward, use_reentrant=False, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint(*args, **kwargs)
