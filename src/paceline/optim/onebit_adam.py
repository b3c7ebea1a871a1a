"""1-bit Adam (Tang et al. 2021, arXiv 2102.02888, algorithm 1): Adam for gradients that are summed with losses.

    while sums are exact    AdamW:  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    after that              replica i of n sends  b1 m / n + (1 - b1) g_i  in place of its gradient;
                            m <- the sum, as the reducer makes it;  v stays
    w <- w - lr m' / (sqrt(v') + eps)        m', v': m and v over 1 - b^t, with the t of their updates

How many sums are exact, and how the others are encoded, the sync says: ``sync: {name: all_reduce, reducer: sign,
exact_steps: N}``. The publication has signs and 15 to 25 % of the steps. What the encoding leaves out its error
feedback keeps. Where v is zero nothing has ever been learned, and what an encoding leaves there would be divided by eps
alone: such weights stay. With exact sums alone it is AdamW.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.optim.elementwise import Elementwise, Scalars
from paceline.parallel.full import FullTensors


class OneBitAdam(GroupedConfig):
    """AdamW whose averages of squares stay when sums of gradients begin to be encoded."""

    lr: Positive = 3.0e-4
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its square, per step."""
    eps: Positive = 1e-8
    """Added to the root of the average square."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "values"
    exchanges: ClassVar[bool] = True
    source: ClassVar[str] = "Tang et al. 2021, arXiv 2102.02888"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The two averages."""
        return values_bytes(shapes, 2, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        return _OneBitAdam(self, parameters)


class _OneBitAdam(Elementwise):
    states = ("average", "square")
    scalars: ClassVar[Scalars] = {"step": 0.0, "squares": 0.0}

    def __init__(self, options: OneBitAdam, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._options = options
        self._is_exact = True

    def outgoing(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """See ``Exchanging``: the average as it would be with this gradient."""
        beta1, state = self._options.betas[0], self.state[parameter]
        sent = gradient * (1 - beta1)
        return sent.add_(state["average"], alpha=beta1) if state else sent

    def expect(self, is_exact: bool) -> None:
        """See ``Exchanging``."""
        self._is_exact = is_exact

    def advance(self, group: dict[str, Any], now: Scalars) -> Scalars:
        """Count the updates of both averages."""
        return {"step": now["step"] + 1, "squares": now["squares"] + self._is_exact}

    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        averages, squares = states
        (beta1, beta2), eps = self._options.betas, self._options.eps
        if self._is_exact:
            torch._foreach_lerp_(averages, gradients, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        else:
            torch._foreach_copy_(averages, gradients)
        directions = list(torch._foreach_mul(averages, torch._foreach_sign(squares)))  # 0 where nothing was learned
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, (1 - beta2 ** max(1.0, now["squares"])) ** 0.5)
        torch._foreach_add_(divisors, eps)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, directions, divisors, -group["lr"] / (1 - beta1 ** now["step"]))
