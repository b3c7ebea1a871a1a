"""Base of the optimizers that work with whole matrices; what is no matrix is AdamW's.

A matrix is brought together on the rank that owns it, which computes the direction and gives every rank its part:
under any layout each is computed once, and each rank computes about as much. A stack of matrices (experts) is one
tensor of which each matrix is treated by itself.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from paceline.comm.boxes import Shape
from paceline.optim.base import GroupedConfig
from paceline.optim.with_adamw import WithAdamW
from paceline.parallel.full import FullTensors

Directions = dict[str, Tensor]


class MatrixOptimizer(WithAdamW):
    """Directions of whole matrices."""

    def __init__(
        self,
        options: GroupedConfig,
        groups: list[dict[str, Any]],
        full: FullTensors,
        *,
        is_own: Callable[[str, Shape], bool],
        cost: Callable[[Shape], float],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """``is_own``: which parameters are not AdamW's; ``cost``: of the direction of one; the rest is AdamW's."""
        super().__init__(options, groups, lambda name: is_own(name, full.shape(name)), betas=betas, eps=eps)
        self.full = full
        self.owner = full.owners([name for group in self.own_groups for name in group["names"]], cost)

    def prepare(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is brought together, of this rank's values; the gradients, unless a method says otherwise."""
        return gradients

    @abstractmethod
    def directions(self, matrices: Mapping[str, Tensor], states: Mapping[str, dict[str, Tensor]]) -> Directions:
        """The direction of each full tensor of which this rank is the owner; ``states`` are kept with it."""

    @abstractmethod
    def move(self, group: dict[str, Any], name: str, parameter: Tensor, direction: Tensor) -> None:
        """Change this rank's values of a parameter."""

    def own_step(self) -> None:
        """See ``WithAdamW``."""
        moved = {
            name: (group, parameter)
            for group in self.own_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter.grad is not None
        }
        if not moved:
            return
        parameters = {name: parameter for name, (_, parameter) in moved.items()}
        for parameter in parameters.values():
            self.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float64)).add_(1)
        parts = self.prepare(parameters, {name: p.grad for name, p in parameters.items() if p.grad is not None})
        matrices = self.full.gather(parts, self.owner)
        made = self.directions(matrices, {name: self.state[parameters[name]] for name in matrices})
        made = {name: direction.to(matrices[name].dtype) for name, direction in made.items()}
        for name, direction in self.full.scatter(made, parts, self.owner).items():
            self.move(moved[name][0], name, moved[name][1], direction)


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether a parameter is a matrix or a stack of them."""
    return len(shape) in {2, 3} and min(shape) > 1


def is_block_matrix(name: str, shape: Shape) -> bool:
    """Whether it is one of a numbered block, and not a table that is looked up."""
    in_block = any(part.isdigit() for part in name.split("."))
    return is_matrix(name, shape) and in_block and "embed" not in name and "bias" not in name


def as_stack(tensor: Tensor) -> Tensor:
    """A matrix or a stack of them as (M, R, C)."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def eigen(covariance_MNN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (M, N), ascending, and eigenvectors (M, N, N), computed in fp64.

    In fp32 LAPACK fails to converge on what a table of many tokens gives: hundreds of directions that are zero but for
    some of the smallest numbers there are.
    """
    values_MN, vectors_MNN = torch.linalg.eigh(covariance_MNN.double())
    return values_MN.to(covariance_MNN.dtype), vectors_MNN.to(covariance_MNN.dtype)
