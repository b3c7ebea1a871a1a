"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235), by the formulas of ``torch.optim.Adafactor``.

Of the squares of a matrix's gradient only the means of rows and of columns are kept; their product takes the place of
Adam's second moment. With t the step, b = t^-decay_power, and RMS the root of the mean square of a whole tensor:

    R <- (1 - b) R + b mean(G^2 of a row)        C <- (1 - b) C + b mean(G^2 of a column)
    V = R C / mean(R)        U = G / sqrt(V)        U <- U / max(1, RMS(U) / clip)
    w <- (1 - lr decay) w - max(eps2, RMS(w)) min(lr, 1 / sqrt(t)) U

A vector keeps all its squares in place of R and C. A stack of matrices (experts) has rows and columns of each.
Rows and columns are whole on every rank: they are few. Each step adds up two small vectors over the ranks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, StateKind, parameter_groups
from paceline.parallel.full import FullTensors


class Adafactor(GroupedConfig):
    """Adam's scale from means of rows and columns, nearly without state; steps in proportion to the tensor's size."""

    lr: Positive = 1.0e-2
    """The peak of the relative rate; the schedule multiplies it by a factor. It is 1 / sqrt(step) at most."""
    decay_power: Positive = 0.8
    """The share of new squares in the averages is step to the power of minus this."""
    eps: tuple[Positive, Positive] = (1e-15, 1e-3)
    """The least root of an average square, and the least size of a tensor."""
    clip: Positive = 1.0
    """The greatest root mean square of an update, before the rate."""

    sees: ClassVar[Sees] = "tensors"
    state_kinds: ClassVar[Mapping[str, StateKind]] = {"rows": "whole", "columns": "whole"}
    source: ClassVar[str] = "Shazeer & Stern 2018, arXiv 1804.04235"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """A value for each row and column of matrices, one for each value of vectors."""
        kept = 0
        for shape in shapes.values():
            stack = math.prod(shape[:-2])
            kept += math.prod(shape) if len(shape) < 2 else stack * (shape[-2] + shape[-1])
        return kept * value_bytes

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters; sums are over the ranks that hold parts."""
        return _Adafactor(self, parameters, full)


@dataclass
class _Moved:
    """A parameter of the coming update."""

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    numel: int
    """Of the full tensor."""
    step: int
    update: Tensor


class _Adafactor(torch.optim.Optimizer):
    def __init__(self, options: Adafactor, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._options, self._full = options, full

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        moved = [
            self._begun(name, parameter, parameter.grad, group)
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        if not moved:
            return
        sizes = self._add_squares(moved)
        for each in moved:
            each.update = self._scaled(each)
        lengths = self._mean_squares(moved, [each.update for each in moved])
        eps, clip = self._options.eps[1], self._options.clip
        for each, size, length in zip(moved, sizes, lengths, strict=True):
            lr = each.group["lr"]
            rate = max(eps, size) * min(lr, each.step**-0.5) / max(1.0, length / clip)
            each.parameter.mul_(1 - lr * each.group["weight_decay"]).add_(each.update, alpha=-rate)

    def _begun(self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> _Moved:
        state, shape = self.state[parameter], self._full.shape(name)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            if len(shape) < 2:
                state["squares"] = torch.zeros_like(parameter)
            else:
                state["rows"] = parameter.new_zeros(shape[:-1])
                state["columns"] = parameter.new_zeros((*shape[:-2], shape[-1]))
        state["step"] += 1
        numel, step = math.prod(shape), int(state["step"])
        return _Moved(name, parameter, gradient, state, group, numel, step, update=gradient)

    def _add_squares(self, moved: list[_Moved]) -> list[float]:
        """Bring the averages up to date; returns RMS(w) of each parameter."""
        sums = []
        for each in moved:
            squares = each.gradient.square()
            if squares.ndim < 2:
                each.state["squares"].lerp_(squares, self._share(each))
            else:
                sums += [self._full.sums(each.name, squares, dim).double() for dim in (-1, -2)]
        norms = self._own_squares(moved, [each.parameter for each in moved])
        norms, *sums = self._full.total([norms, *sums])
        rest = iter(sums)
        for each in moved:
            if each.gradient.ndim >= 2:
                height, width = self._full.shape(each.name)[-2:]
                for key, size in (("rows", width), ("columns", height)):
                    kept = each.state[key]
                    kept.lerp_((next(rest) / size).to(kept.dtype), self._share(each))
        return _roots(norms, moved)

    def _scaled(self, each: _Moved) -> Tensor:
        """U, of this rank's values."""
        least = self._options.eps[0]
        if each.gradient.ndim < 2:
            variance = each.state["squares"].clone()
        else:
            rows, columns = each.state["rows"], each.state["columns"]
            rows = rows / rows.mean(-1, keepdim=True).clamp_(min=least)
            variance = self._full.part_of_sums(each.name, rows, each.gradient, -1) * self._full.part_of_sums(
                each.name, columns, each.gradient, -2
            )
        return variance.clamp_(min=least * least).rsqrt_().mul_(each.gradient)

    def _share(self, each: _Moved) -> float:
        return float(each.step**-self._options.decay_power)

    def _own_squares(self, moved: list[_Moved], tensors: list[Tensor]) -> Tensor:
        """The sum of squares of each tensor, as far as this rank's values count."""
        counted = torch.tensor([self._full.counts(each.name) for each in moved], device=tensors[0].device)
        return torch.stack(torch._foreach_norm(tensors)).double().square_() * counted

    def _mean_squares(self, moved: list[_Moved], tensors: list[Tensor]) -> list[float]:
        (squares,) = self._full.total([self._own_squares(moved, tensors)])
        return _roots(squares, moved)


def _roots(squares: Tensor, moved: list[_Moved]) -> list[float]:
    return [(square / each.numel) ** 0.5 for square, each in zip(squares.tolist(), moved, strict=True)]
