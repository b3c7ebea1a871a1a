"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), in torch's fused form."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from paceline.config import Fraction, NonNegative, Options, Positive
from paceline.optim.base import decay_groups


class AdamW(Options):
    """Adam with decoupled weight decay."""

    lr: Positive = 3.0e-4
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its square, per step."""
    eps: Positive = 1e-8
    """Added to the root of the average square."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay."""

    state_per_parameter: ClassVar[int] = 2
    is_elementwise: ClassVar[bool] = True

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""
        groups = decay_groups(parameters, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
