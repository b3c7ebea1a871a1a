"""The calls by which a model drops out, caught where they are made, and told apart.

A dropout is known by its place: the module that calls it, which of the module's calls in a forward pass this is, and
which of the dropouts in that call. Blocks that are computed again, and stages that compute only some blocks, find the
same places.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from paceline.models.blockwise import attention
from paceline.models.chance import taken


class Place(NamedTuple):
    """Where a dropout is called in a forward pass."""

    module: str
    call: int
    """Which of the module's calls in the pass."""
    number: int
    """Which of the dropouts in the module's call, those of modules in it not counted."""


class Numbering:
    """Tells apart the dropouts of one forward pass."""

    def __init__(self, calls: Mapping[str, int] | None = None) -> None:
        self.calls = Counter(calls or {})
        """Of each module, begun so far."""
        self._running: list[list[Any]] = []
        """Module, call and dropouts so far of the modules that run, the innermost last."""

    @contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """While it lasts, dropouts are the module's own, but for those of modules in it."""
        self._running.append([module, self.calls[module], 0])
        self.calls[module] += 1
        try:
            yield
        finally:
            self._running.pop()

    def next(self) -> Place:
        """The place of a dropout that is called now; of no module if none runs."""
        if not self._running:
            return Place("", -1, 0)
        innermost = self._running[-1]
        innermost[2] += 1
        return Place(innermost[0], innermost[1], innermost[2] - 1)


class Entered:
    """A module's forward that says when it runs."""

    def __init__(self, forward: Callable[..., Any], name: str, numbering: Callable[[], Numbering | None]) -> None:
        self._forward, self._name, self._numbering = forward, name, numbering
        self.__signature__ = inspect.signature(forward)  # who asks for the arguments of forward sees the real ones

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        numbering = self._numbering()
        if numbering is None:
            return self._forward(*args, **kwargs)
        with numbering.inside(self._name):
            return self._forward(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Chance:
    """Of the elements of one tensor: keys (...) and columns (C,), as in ``models.chance``."""

    keys: Tensor
    columns: Tensor
    shape: torch.Size

    def taken(self, probability: float) -> Tensor:
        """Which elements are dropped, bool."""
        return taken(self.keys, self.columns, probability).view(self.shape)


class Chances(Protocol):
    """Who is asked at every dropout of a forward pass."""

    def next(self, tensor: Tensor, shape: torch.Size) -> Chance | None:
        """Of the elements of a tensor of ``shape`` on the device of ``tensor``; None to drop none."""
        ...


class Caught(TorchFunctionMode):
    """While it is in force, dropouts ask ``chances``. It reaches a forward pass, not what autograd calls later."""

    def __init__(self, chances: Chances) -> None:
        super().__init__()
        self._chances = chances

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        caught = _CAUGHT.get(func)
        if caught is None:
            return self.other(func, args, kwargs or {})
        return caught(self._chances, *args, **(kwargs or {}))

    def other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call anything else."""
        return func(*args, **kwargs)


def _dropout(chances: Chances, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    chance = chances.next(input, input.shape) if training and p > 0.0 else None
    if chance is None:
        return input
    output = input.masked_fill(chance.taken(p), 0.0) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)
    return input.copy_(output) if inplace else output


def _torch_attention(
    chances: Chances,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's kernels draw their own masks; ours takes them from outside. Queries that see nothing give 0 in ours."""
    chance = chances.next(query, _scores_shape(query, key)) if dropout_p > 0.0 else None
    if chance is None:
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        attn_mask = attn_mask.expand(-1, -1, query.shape[2], key.shape[2])
    output_BQNV = attention(
        query,
        key,
        value,
        bias=attn_mask,
        causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout_p,
        chance_BNQ=chance.keys,
    )
    return output_BQNV.transpose(1, 2)


def _own_attention(
    chances: Chances, query: Tensor, key: Tensor, value: Tensor, *, dropout: float, **options: Any
) -> Tensor:
    chance = chances.next(query, _scores_shape(query, key)) if dropout > 0.0 else None
    if chance is None:
        return attention(query, key, value, **options)
    return attention(query, key, value, dropout=dropout, chance_BNQ=chance.keys, **options)


def _scores_shape(query: Tensor, key: Tensor) -> torch.Size:
    return torch.Size([*query.shape[:-1], key.shape[-2]])


_CAUGHT: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _torch_attention,
    attention: _own_attention,
}


def enter(model: nn.Module, names: Mapping[str, str], numbering: Callable[[], Numbering | None]) -> list[nn.Module]:
    """Let the modules of these names say when they run, by the names they stand for; returns the modules."""
    entered: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in names and id(module) not in entered:
            module.forward = Entered(module.forward, names[name], numbering)
            entered[id(module)] = module
    return list(entered.values())
