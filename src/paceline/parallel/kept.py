"""Selective recompute: what is dear in a block's first forward pass is kept, and the second one takes it from there.

Dear are products with weights, attention, and what was sent between ranks. The second pass computes the rest (norms,
activations, rotary embeddings), which costs little time and would take most of the memory. It asks for the kept results
in the order in which the first pass found them; the ranks of an axis run the same code, so none of them waits for a
message that another does not send again.

Products of activations with each other (the scores of an attention that is not one operator) are not kept: they grow
with the square of the sequence.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

from paceline.errors import PlanError

T = TypeVar("T")

KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "paceline::attention",
    "paceline::fused_attention",
)
"""Operators, by the names of torch. One that draws random numbers inside is computed again all the same: the numbers
that follow it would be others."""


def kept(compute: Callable[[], T]) -> T:
    """The result of ``compute``: tensors without a graph, and work that a second forward pass is not to do again."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, First | Second):
            return mode.call(compute)
    return compute()


def passes() -> tuple["First", "Second"]:
    """The contexts of a block's first forward pass and of those that follow."""
    results: list[_Result] = []
    return First(results), Second(results)


class _Result:
    """What an operation gave. It shares memory with what the model goes on with."""

    def __init__(self, what: str, value: Any) -> None:
        self._what = what
        self._value = tree_map_only(Tensor, _alias, value)  # or it would hold the graph that holds it
        self._versions: list[int] = []
        tree_map_only(Tensor, lambda tensor: self._versions.append(tensor._version), self._value)

    def value(self) -> Any:
        """As it was; ``PlanError`` if the model has written over it."""
        versions: list[int] = []
        tree_map_only(Tensor, lambda tensor: versions.append(tensor._version), self._value)
        if versions != self._versions:
            raise PlanError(
                f"layout.recompute=selective: this model writes over the result of {self._what}, which was to be kept. "
                "Use recompute=full"
            )
        return tree_map_only(Tensor, _alias, self._value)


def _alias(tensor: Tensor) -> Tensor:
    """The same memory and the same count of writes to it; below autograd, torch has to be told to share the latter."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class First(TorchDispatchMode):
    """The first forward pass: keeps."""

    def __init__(self, results: list[_Result]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results
        self._inside = False

    def call(self, compute: Callable[[], T]) -> T:
        """Keep the result of all that ``compute`` does, and nothing in between."""
        if self._inside:
            return compute()
        self._inside = True
        try:
            result = compute()
        finally:
            self._inside = False
        self._results.append(_Result("a collective", result))
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the results of dear operators."""
        result = func(*args, **(kwargs or {}))
        if not self._inside and _is_kept(func, args, kwargs or {}):
            self._results.append(_Result(func.name(), result))
        return result


class Second(TorchDispatchMode):
    """A later one: takes what was kept. May be run several times, as split backward passes do."""

    def __init__(self, results: list[_Result]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results

    def __enter__(self) -> Any:
        self._left = iter(self._results)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def call(self, compute: Callable[[], T]) -> T:
        """What ``compute`` gave, without calling it."""
        result: T = next(self._left).value()
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What a dear operator gave; anything else is computed."""
        if _is_kept(func, args, kwargs or {}):
            return next(self._left).value()
        return func(*args, **(kwargs or {}))


def _is_kept(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not isinstance(func, torch._ops.OpOverload) or func._overloadpacket._qualified_op_name not in KEPT:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return not (args[i] if i < len(args) else kwargs.get("dropout_p", 0.0))
    return "out" not in kwargs
