"""Stochastic gradient descent, with momentum if asked: the optimizer of proofs, for it hides no scale error."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from paceline.config import Fraction, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups, values_bytes
from paceline.parallel.full import FullTensors


class SGD(GroupedConfig):
    """Plain, momentum or Nesterov SGD, as torch defines them; decay is added to the gradient."""

    lr: Positive = 0.1
    """The peak rate; the schedule multiplies it by a factor."""
    momentum: Fraction = 0.0
    """Share of the last update that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum; needs momentum above 0."""

    sees: ClassVar[Sees] = "values"
    source: ClassVar[str] = "Polyak 1964; Sutskever et al. 2013"
    code: ClassVar[str] = "torch.optim.SGD"

    def model_post_init(self, _: Any) -> None:
        """Refuse what torch refuses."""
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0")

    def rests(self, weight_decay: float) -> bool:
        """Without momentum and decay."""
        return self.momentum == 0 and weight_decay == 0

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The momentum, if there is any."""
        return values_bytes(shapes, int(self.momentum > 0), value_bytes)

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters.

        Not in the fused form: torch 2.13's changes nothing in bf16 on CPUs, and with momentum fails for a parameter
        whose first gradient comes late.
        """
        groups = parameter_groups(parameters, self)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
