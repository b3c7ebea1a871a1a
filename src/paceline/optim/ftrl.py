"""FTRL-proximal (McMahan et al. 2013, "Ad Click Prediction", KDD, algorithm 1): weights that L1 makes exactly zero.

    n <- n + g^2        z <- z + g - (1/eta - 1/eta_before) w        1/eta = (beta + sqrt(n)) / lr
    w <- 0 where |z| <= l1, else -(z - sign(z) l1) / (1/eta + l2)

The published form starts from w = 0. Here z starts at -w beta / lr, as if the first weights were a step that was
taken: they are kept, but for what l1 and l2 take. And 1/eta is taken at the rate of its own step, so that a schedule
may change the rate: without l1 and l2 a step is -eta g, as it should be. A step at rate 0 is none.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softshrink

from paceline.config import NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.optim.elementwise import Elementwise, Scalars
from paceline.parallel.full import FullTensors


class FTRL(GroupedConfig):
    """Follow the regularised leader: Adagrad's rates, and weights that are exactly zero where they earn nothing."""

    lr: Positive = 1.0e-2
    """alpha: the peak rate; the schedule multiplies it by a factor."""
    beta: NonNegative = 1.0
    """Added to the root of the sum of squares."""
    l1: NonNegative = 0.0
    """lambda 1, for matrices: values whose z is no greater are zero."""
    weight_decay: NonNegative = 0.0
    """lambda 2, for matrices: added to 1/eta."""

    sees: ClassVar[Sees] = "values"
    remakes: ClassVar[bool] = True
    source: ClassVar[str] = "McMahan et al. 2013, KDD"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """z and n."""
        return values_bytes(shapes, 2, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        return _FTRL(self, parameters)


class _FTRL(Elementwise):
    states = ("z", "n")
    scalars: ClassVar[Scalars] = {"step": 0.0, "rate": 0.0}
    divides_by_rate = True

    def __init__(self, options: FTRL, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._beta, self._l1 = options.beta, options.l1

    def begin(self, group: dict[str, Any], key: str, parameter: Tensor) -> Tensor:
        if key == "n":
            return torch.zeros_like(parameter)
        leader: Tensor = parameter.detach() * (-self._beta / group["lr"])
        return leader

    def advance(self, group: dict[str, Any], now: Scalars) -> Scalars:
        rate = group["lr"]
        return {"step": now["step"] + 1, "rate": rate, "before": now["rate"] or rate}

    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        leaders, squares = states
        change = self._inverse_rates(squares, now["before"])
        torch._foreach_addcmul_(squares, gradients, gradients)
        inverse = self._inverse_rates(squares, now["rate"])
        torch._foreach_sub_(change, inverse)
        torch._foreach_addcmul_(leaders, change, parameters)
        torch._foreach_add_(leaders, gradients)
        torch._foreach_add_(inverse, group["weight_decay"])
        l1 = self._l1 if group["is_matrix"] else 0.0
        for parameter, leader, divisor in zip(parameters, leaders, inverse, strict=True):
            new = -softshrink(leader, l1) / divisor
            # 0 / 0: a value that never had a gradient, without anything that would draw it to 0, stays as it is.
            parameter.copy_(torch.where(divisor > 0, new, parameter))

    def _inverse_rates(self, squares: list[Tensor], rate: float) -> list[Tensor]:
        inverse = list(torch._foreach_sqrt(squares))
        torch._foreach_add_(inverse, self._beta)
        torch._foreach_div_(inverse, rate)
        return inverse
