"""Newton's method by conjugate gradients (Nocedal & Wright 2006, algorithm 7.1), for small models.

    (H + damping) d = -g, as far as ``iterations`` products of H and a vector bring it
    w <- w + t d, t = lr, lr / 2, lr / 4, ... until the loss falls by a ten thousandth of what its slope says

H is never made: its product with a vector is the derivative of the gradient along the vector, by a second backward pass
(Pearlmutter 1994; Martens 2010). Where H bends down along a direction, the search for d ends there. A batch on which no
t makes the loss fall leaves the weights as they are. Nothing is kept from step to step.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Count, NonNegative, Positive
from paceline.errors import PlanError
from paceline.optim.base import OptimizerConfig, Passes, Sees, Shapes
from paceline.parallel.full import FullTensors

SUFFICIENT = 1e-4
"""The share of the fall that the slope says (c1 in algorithm 3.1 there)."""

Vectors = list[Tensor]


class NewtonCG(OptimizerConfig):
    """Newton steps from products with the Hessian, with a line search; small models, replicas only."""

    lr: Positive = 1.0
    """The first length that is tried; the schedule multiplies it by a factor."""
    iterations: Count = 10
    """The most products with the Hessian in one step."""
    damping: NonNegative = 1e-3
    """Added to the diagonal of the Hessian."""
    halvings: Count = 10
    """How often a length may be halved."""

    sees: ClassVar[Sees] = "loss"
    differentiates_twice: ClassVar[bool] = True
    source: ClassVar[str] = "Nocedal & Wright 2006, algorithm 7.1; Martens 2010, ICML"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """None."""
        return 0

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""
        if not parameters:
            raise PlanError("the model has nothing to train: no parameter of it has requires_grad")
        return _NewtonCG(self, parameters)


class _NewtonCG(torch.optim.Optimizer):
    def __init__(self, options: NewtonCG, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(list(parameters.values()), {"lr": options.lr})
        self._options = options

    @torch.no_grad()
    def search(self, passes: Passes) -> None:
        """One step: the direction, then the length."""
        (group,) = self.param_groups
        parameters: list[Tensor] = group["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        direction = self._direction(passes, gradients)
        slope = dot(gradients, direction)
        before, start = [parameter.clone() for parameter in parameters], passes.loss
        length = group["lr"]
        for _ in range(self._options.halvings + 1):
            torch._foreach_copy_(parameters, torch._foreach_add(before, direction, alpha=length))
            if passes.gradient() <= start + SUFFICIENT * length * slope:
                return
            length /= 2
        torch._foreach_copy_(parameters, before)

    def _direction(self, passes: Passes, gradients: Vectors) -> Vectors:
        """Conjugate gradients from 0, as exact as the gradient's own size asks."""
        square = dot(gradients, gradients)
        direction = [torch.zeros_like(gradient) for gradient in gradients]
        residual, along = [gradient.clone() for gradient in gradients], [-gradient for gradient in gradients]
        enough = min(0.25, square**0.5) * square  # the square of min(1/2, the root of |g|) |g|
        for iteration in range(self._options.iterations):
            image = passes.product(along)
            torch._foreach_add_(image, along, alpha=self._options.damping)
            bend = dot(along, image)
            if bend <= 0:
                return along if iteration == 0 else direction
            torch._foreach_add_(direction, along, alpha=square / bend)
            torch._foreach_add_(residual, image, alpha=square / bend)
            square, before = dot(residual, residual), square
            if square <= enough:
                break
            torch._foreach_mul_(along, square / before)
            torch._foreach_sub_(along, residual)
        return direction


def dot(one: Vectors, other: Vectors) -> float:
    """The product of two vectors, each a list of parts."""
    return float(sum(torch.sum(a.double() * b.double()) for a, b in zip(one, other, strict=True)))
