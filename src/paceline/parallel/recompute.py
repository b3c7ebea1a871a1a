"""Activation recompute: keep the input of each block, and compute the rest again in the backward pass; all of it, or
all but what is dear (``kept``).
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.dropout import Dropout
from paceline.parallel.kept import passes

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Of a block's first forward pass, and of those that follow."""


def recompute(model: nn.Module, how: Literal["selective", "full"], dropout: Dropout | None = None) -> int:
    """Wrap the forward of every block; returns how many. ``PlanError`` if the model has no blocks.

    ``dropout`` is put in force again for the second forward, by which time another micro-batch may be current; of
    anything else that is random, the random state is restored.
    """
    found = blocks(model)
    if not found:
        raise PlanError(
            f"layout.recompute={how} needs a model with a list of blocks; {type(model).__name__} has no nn.ModuleList. "
            "Use layout.recompute=none."
        )
    for block in found.values():
        block.forward = _Recomputed(block.forward, how, dropout)
    return len(found)


class _Recomputed:
    """A forward whose activations are not kept."""

    def __init__(self, forward: Callable[..., Any], how: str, dropout: Dropout | None) -> None:
        options: dict[str, Any] = {"context_fn": passes} if how == "selective" else {}
        if dropout is not None:
            options["context_fn"] = functools.partial(_with_dropout, dropout, options.get("context_fn", _nothing))
        self._checkpoint = functools.partial(checkpoint, forward, use_reentrant=False, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint(*args, **kwargs)


def _nothing() -> Contexts:
    return nullcontext(), nullcontext()


def _with_dropout(dropout: Dropout, contexts: Callable[[], Contexts]) -> Contexts:
    (first, second), (drop_first, drop_second) = contexts(), dropout.again()
    return _Both(first, drop_first), _Both(second, drop_second)


class _Both(AbstractContextManager[None]):
    """Two contexts, one in the other, which may be entered several times: split backward passes compute twice."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
        self._outer.__exit__(kind, error, trace)
