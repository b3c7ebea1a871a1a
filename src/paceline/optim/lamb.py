"""LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2): Adam's direction, as long as the tensor it moves.

    r = m' / (sqrt(v') + eps) + decay w        w <- w - lr |w| / |r| r        m', v': m and v over 1 - b^t

The norms are of whole tensors; the ratio is 1 where one of them is 0.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.optim.elementwise import Elementwise, Scalars
from paceline.parallel.full import FullTensors


class LAMB(GroupedConfig):
    """Adam with a rate for each tensor, in proportion to its norm; for large batches."""

    lr: Positive = 1.0e-3
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square, per step."""
    eps: Positive = 1e-6
    """Added to the root of the average square."""
    weight_decay: NonNegative = 0.01
    """For matrices, inside the ratio; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "tensors"
    source: ClassVar[str] = "You et al. 2020, arXiv 1904.00962"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The two averages."""
        return values_bytes(shapes, 2, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters; norms are summed over the ranks that hold parts."""
        return _LAMB(self, parameters, full)


class _LAMB(Elementwise):
    """The directions are elementwise, and take the place of the gradients; then each tensor moves as a whole."""

    states = ("average", "square")

    def __init__(self, options: LAMB, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._options, self._full = options, full

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        moved = [
            (name, parameter, parameter.grad, group["lr"])
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        if not moved:
            return
        norms = torch._foreach_norm(
            [tensor for _, parameter, direction, _ in moved for tensor in (parameter, direction)]
        )
        squares = torch.stack(norms).double().square_().view(-1, 2)
        counted = torch.tensor([self._full.counts(name) for name, *_ in moved], device=squares.device)
        (squares,) = self._full.total([squares * counted.unsqueeze(1)])
        for (_, parameter, direction, lr), (weight, length) in zip(moved, squares.sqrt().tolist(), strict=True):
            ratio = weight / length if weight and length else 1.0
            parameter.add_(direction, alpha=-lr * ratio)

    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        (averages, squares), (beta1, beta2) = states, self._options.betas
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, (1 - beta2 ** now["step"]) ** 0.5)
        torch._foreach_add_(divisors, self._options.eps)
        directions = torch._foreach_div(averages, divisors)
        torch._foreach_div_(directions, 1 - beta1 ** now["step"])
        torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        torch._foreach_copy_(gradients, directions)
