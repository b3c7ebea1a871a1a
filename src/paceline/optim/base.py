"""What every optimizer config offers, and which parameters decay."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from paceline.errors import PlanError


class OptimizerConfig(Protocol):
    """The frozen config class of an optimizer."""

    @property
    def lr(self) -> float:
        """The peak rate; the schedule multiplies it by a factor."""
        ...

    @property
    def state_per_parameter(self) -> int:
        """Tensors like the parameter that the optimizer keeps."""
        ...

    @property
    def is_elementwise(self) -> bool:
        """Whether every value is updated by itself, so that a part of a parameter is updated as in the whole."""
        ...

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; norms, biases and other vectors do not. Names stand in ``names``.

    ``PlanError`` if there is no parameter to train.
    """
    if not parameters:
        raise PlanError("the model has nothing to train: no parameter of it has requires_grad")
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        members = {name: p for name, p in parameters.items() if (p.ndim >= 2) is decays}
        if members:
            groups.append(
                {
                    "params": list(members.values()),
                    "names": list(members),
                    "weight_decay": weight_decay if decays else 0.0,
                }
            )
    return groups
