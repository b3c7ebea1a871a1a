"""AdaBelief (Zhuang et al. 2020, arXiv 2010.07468, algorithm 2): Adam, by the variance of the gradient.

m <- b1 m + (1 - b1) g        s <- b2 s + (1 - b2) (g - m)^2 + eps
w <- w - lr m' / (sqrt(s') + eps)        m', s': m and s over 1 - b^t
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.optim.elementwise import Elementwise, Scalars
from paceline.parallel.full import FullTensors


class AdaBelief(GroupedConfig):
    """Adam whose steps are long where the gradient is as expected; decoupled decay."""

    lr: Positive = 3.0e-4
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its squared surprise, per step."""
    eps: Positive = 1e-16
    """Added to the average of the squares at every step, and to its root."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "values"
    source: ClassVar[str] = "Zhuang et al. 2020, arXiv 2010.07468"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The two averages."""
        return values_bytes(shapes, 2, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        return _AdaBelief(self, parameters)


class _AdaBelief(Elementwise):
    states = ("average", "surprise")

    def __init__(self, options: AdaBelief, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._options = options

    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        averages, surprises = states
        (beta1, beta2), eps = self._options.betas, self._options.eps
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        apart = torch._foreach_sub(gradients, averages)
        torch._foreach_mul_(surprises, beta2)
        torch._foreach_addcmul_(surprises, apart, apart, 1 - beta2)
        torch._foreach_add_(surprises, eps)
        divisors = torch._foreach_sqrt(surprises)
        torch._foreach_div_(divisors, (1 - beta2 ** now["step"]) ** 0.5)
        torch._foreach_add_(divisors, eps)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, averages, divisors, -group["lr"] / (1 - beta1 ** now["step"]))
