"""Sophia-G (Liu et al. 2023, arXiv 2305.14342, algorithm 3): momentum over curvature, no step longer than the rate.

    m <- b1 m + (1 - b1) g        h <- b2 h + (1 - b2) B q^2, every ``every`` steps
    w <- w - lr decay w, then w <- w - lr clip(m / max(gamma h, eps), 1)

q is the gradient of the mean loss over the B targets of the batch, with labels that the model draws from its own
distribution (Gauss-Newton-Bartlett, algorithm 2 there). Of the two estimates of the publication it is the one that
needs no second derivative: a pass like any other, under every layout, with any attention. What is drawn is a function
of seed and step (``objectives.drawn``).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Count, Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.optim.elementwise import Elementwise, Scalars
from paceline.parallel.full import FullTensors


class Sophia(GroupedConfig):
    """Momentum divided by an estimate of the curvature, value by value, and clipped (Sophia-G)."""

    lr: Positive = 3.0e-4
    """The peak rate, and the longest step of a value; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.96, 0.99)
    """Decay of the averages of the gradient, per step, and of the curvature, per estimate."""
    gamma: Positive = 0.05
    """By which the curvature is multiplied: the smaller, the more values are clipped."""
    every: Count = 10
    """Steps from one estimate of the curvature to the next; an estimate costs as much as a gradient."""
    eps: Positive = 1e-12
    """The least divisor."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "gradients"
    asks_again: ClassVar[bool] = True
    source: ClassVar[str] = "Liu et al. 2023, arXiv 2305.14342"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The averages of gradient and curvature."""
        return values_bytes(shapes, 2, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        return _Sophia(self, parameters)


class _Sophia(Elementwise):
    states = ("average", "curvature")

    def __init__(self, options: Sophia, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._options = options

    def estimates_at(self, step: int) -> bool:
        """In the first step, and every so many after it."""
        return (step - 1) % self._options.every == 0

    @torch.no_grad()
    def estimate(self, targets: int) -> None:
        """Bring the curvature up to date."""
        beta2 = self._options.betas[1]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    curvature = self.begun(group, parameter)["curvature"]
                    curvature.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=(1 - beta2) * targets)

    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        averages, curvatures = states
        torch._foreach_lerp_(averages, gradients, 1 - self._options.betas[0])
        divisors = list(torch._foreach_mul(curvatures, self._options.gamma))
        torch._foreach_clamp_min_(divisors, self._options.eps)
        steps = list(torch._foreach_div(averages, divisors))
        torch._foreach_clamp_min_(steps, -1.0)
        torch._foreach_clamp_max_(steps, 1.0)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])
