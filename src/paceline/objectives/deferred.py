"""Logits that are not computed before somebody looks at them.

While a model runs in ``deferring``, its output head hands on what it was given, in place of logits. The loss knows how
to work with that (``head_cross_entropy``), so all logits are never there at once. Nothing else needs to know: whatever
is done to the tensor, be it by the family's own code (a soft cap, a scale), computes the logits first.

Shapes: B rows, S positions, D width, V vocabulary (a rank's part of it).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


class DeferredLogits(Tensor):
    """What a head was given, hidden states (B, S, D), for logits (B, S, V). Made by ``of`` only."""

    _head: tuple[Tensor, Tensor | None]
    _whole: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Self:
        """For ``hidden @ weight.T + bias``; ``weight`` (V, D), ``bias`` (V,)."""
        deferred = hidden.as_subclass(cls)
        deferred._head, deferred._whole = (weight, bias), None
        return deferred

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias."""
        with torch._C.DisableTorchFunctionSubclass():
            return (self.as_subclass(Tensor), *self._head)

    def whole(self) -> Tensor:
        """The logits."""
        if self._whole is None:
            self._whole = F.linear(*self.parts())
        return self._whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked for with the logits, except where they are handed on and not looked at."""
        if func is Tensor.contiguous:
            return args[0]  # as logits just computed would
        if func in _HANDED_ON:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func == _BASE:
            return None  # logits are no view of anything
        if func == _SHAPE:
            hidden, weight, _ = args[0].parts()
            return torch.Size((*hidden.shape[:-1], len(weight)))
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


_HANDED_ON = (Tensor.requires_grad.__get__, Tensor.register_hook)  # type: ignore[attr-defined]
"""What FSDP2 does with a model's output. The gradient for which the hook waits is then that of the hidden states."""
_BASE, _SHAPE = Tensor._base.__get__, Tensor.shape.__get__  # type: ignore[attr-defined, union-attr]


@contextmanager
def deferring(model: nn.Module) -> Iterator[None]:
    """The output head of ``model``, if it names a linear layer as its own, gives ``DeferredLogits``."""
    name_head = getattr(model, "get_output_embeddings", None)
    head = name_head() if name_head is not None else None
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield
        return
    head.forward = MethodType(_deferred, head)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def _deferred(head: nn.Linear, hidden: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a model that is compiled whole has its logits fused with what follows
        return F.linear(hidden, head.weight, head.bias)
    return DeferredLogits.of(hidden, head.weight, head.bias)
