"""Stochastic gradient descent, with momentum if asked: the optimizer of proofs, for it hides no scale error."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from paceline.config import Fraction, NonNegative, Options, Positive
from paceline.optim.base import decay_groups


class SGD(Options):
    """Plain, momentum or Nesterov SGD, as torch defines them."""

    lr: Positive = 0.1
    """The peak rate; the schedule multiplies it by a factor."""
    momentum: Fraction = 0.0
    """Share of the last update that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum; needs momentum above 0."""
    weight_decay: NonNegative = 0.0
    """Added to the gradient, for matrices only."""

    is_elementwise: ClassVar[bool] = True

    def model_post_init(self, _: Any) -> None:
        """Refuse what torch refuses."""
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0")

    @property
    def state_per_parameter(self) -> int:
        """The momentum, if there is any."""
        return int(self.momentum > 0)

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""
        groups = decay_groups(parameters, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
