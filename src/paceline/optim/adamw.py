"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), in torch's fused form."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from paceline.config import Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.parallel.full import FullTensors


class AdamW(GroupedConfig):
    """Adam with decoupled weight decay."""

    lr: Positive = 3.0e-4
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its square, per step."""
    eps: Positive = 1e-8
    """Added to the root of the average square."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "values"
    source: ClassVar[str] = "Loshchilov & Hutter 2019, arXiv 1711.05101"
    code: ClassVar[str] = "torch.optim.AdamW, fused"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The two averages."""
        return values_bytes(shapes, 2, value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters."""
        groups = parameter_groups(parameters, self)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
