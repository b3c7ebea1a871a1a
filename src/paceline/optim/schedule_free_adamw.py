"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682): an average takes the schedule's place.

Gradients are taken at y, between the iterate z of AdamW and the average x of the iterates:

    y = (1 - b1) z + b1 x        z <- z - lr g / (sqrt(v') + eps)        x <- (1 - c) x + c z
    c = p / (sum of all p)       p = (greatest rate so far)^2

The parameters are y while the model learns. It is x that is good: evaluation, export and the weights of a checkpoint
are x, which follows from y and z. The checkpoint keeps y too, so that a run goes on bit for bit.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.optim.elementwise import Elementwise, Scalars
from paceline.parallel.full import FullTensors


class ScheduleFreeAdamW(GroupedConfig):
    """AdamW whose weights are averaged in place of a schedule: use ``schedule=constant``, with a warm-up."""

    lr: Positive = 1.0e-3
    """The rate after the warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Where gradients are taken between iterate and average, and the decay of the average square, per step."""
    eps: Positive = 1e-8
    """Added to the root of the average square."""
    weight_decay: NonNegative = 0.1
    """For matrices, at y; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "values"
    schedule: ClassVar[str | None] = "constant"
    averages: ClassVar[bool] = True
    source: ClassVar[str] = "Defazio et al. 2024, arXiv 2405.15682"

    def model_post_init(self, _: Any) -> None:
        """The average follows from y and z only if b1 is not 0."""
        if self.betas[0] == 0:
            raise ValueError("schedule_free_adamw needs betas[0] > 0")

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """z and v."""
        return values_bytes(shapes, 2, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        return _ScheduleFree(self, parameters)


class _ScheduleFree(Elementwise):
    states = ("z", "square")
    scalars: ClassVar[Scalars] = {"step": 0.0, "greatest_rate": 0.0, "weights": 0.0}

    def __init__(self, options: ScheduleFreeAdamW, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameter_groups(parameters, options), {"lr": options.lr})
        self._options = options

    def begin(self, group: dict[str, Any], key: str, parameter: Tensor) -> Tensor:
        return parameter.detach().clone() if key == "z" else torch.zeros_like(parameter)

    def advance(self, group: dict[str, Any], now: Scalars) -> Scalars:
        greatest = max(now["greatest_rate"], group["lr"])
        weights = now["weights"] + greatest**2
        share = greatest**2 / weights if weights else 0.0
        return {"step": now["step"] + 1, "greatest_rate": greatest, "weights": weights, "share": share}

    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        (iterates, squares), (beta1, beta2) = states, self._options.betas
        lr, share = group["lr"], now["share"]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        directions = torch._foreach_div(squares, 1 - beta2 ** now["step"])
        torch._foreach_sqrt_(directions)
        torch._foreach_add_(directions, self._options.eps)
        directions = torch._foreach_div(gradients, directions)
        torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        torch._foreach_lerp_(parameters, iterates, share)
        torch._foreach_add_(parameters, directions, alpha=lr * (beta1 * (1 - share) - 1))
        torch._foreach_sub_(iterates, directions, alpha=lr)

    @torch.no_grad()
    def averaged(self, parameter: Tensor) -> Tensor:
        """x, in memory of its own."""
        state = self.state[parameter]
        if not state:
            return parameter.detach().clone()
        return torch.lerp(parameter.detach(), state["z"], 1 - 1 / self._options.betas[0])
