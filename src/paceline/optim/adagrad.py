"""Adagrad (Duchi, Hazan & Singer 2011, JMLR 12), in torch's fused form."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from paceline.config import NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.parallel.full import FullTensors


class Adagrad(GroupedConfig):
    """A rate for each value, which falls with the squares of all its gradients; decay is added to the gradient."""

    lr: Positive = 1.0e-2
    """The peak rate; the schedule multiplies it by a factor."""
    initial: NonNegative = 0.0
    """What the sum of squares starts from."""
    eps: Positive = 1e-10
    """Added to the root of the sum of squares."""

    sees: ClassVar[Sees] = "values"
    source: ClassVar[str] = "Duchi et al. 2011, JMLR 12"
    code: ClassVar[str] = "torch.optim.Adagrad, fused"

    def rests(self, weight_decay: float) -> bool:
        """Without decay."""
        return weight_decay == 0

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The sum of squares."""
        return values_bytes(shapes, 1, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        groups = parameter_groups(parameters, self)
        return torch.optim.Adagrad(
            groups, lr=self.lr, initial_accumulator_value=self.initial, eps=self.eps, fused=_is_on_cpu(parameters)
        )


def _is_on_cpu(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Torch has a fused kernel of it for CPUs only."""
    return all(parameter.device.type == "cpu" for parameter in parameters.values())
