"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an average of the gradient.

w <- w - lr (sign(b1 m + (1 - b1) g) + decay w)        m <- b2 m + (1 - b2) g
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.optim.elementwise import Elementwise, Scalars
from paceline.parallel.full import FullTensors


class Lion(GroupedConfig):
    """The sign of momentum: steps of one length for all values. Rates are a third of AdamW's, decays three times."""

    lr: Positive = 1.0e-4
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """The share of the average in the step, and the decay of the average, per step."""
    weight_decay: NonNegative = 0.3
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "values"
    source: ClassVar[str] = "Chen et al. 2023, arXiv 2302.06675"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The average."""
        return values_bytes(shapes, 1, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        return _Lion(self, parameters)


class _Lion(Elementwise):
    states = ("average",)

    def __init__(self, options: Lion, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._betas = options.betas

    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        (averages,), (beta1, beta2) = states, self._betas
        directions = list(torch._foreach_lerp(averages, gradients, 1 - beta1))
        torch._foreach_sign_(directions)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])
        torch._foreach_lerp_(averages, gradients, 1 - beta2)
