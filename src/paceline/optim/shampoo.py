"""Shampoo (Gupta, Koren & Singer 2018, arXiv 1802.09568), with the step sizes of Adam (Anil et al. 2020, 2002.09018).

    L <- d L + (1 - d) G G'        R <- d R + (1 - d) G' G        D = L^-1/4 M R^-1/4        M: the average of G
    w <- (1 - lr decay) w - lr |A| / |D| D        A: Adam's direction for the same matrix, which gives the length

A side longer than ``max_side`` has no factor; the other one then has the power -1/2. Roots are taken anew every
``every`` steps. All that is kept of a matrix lies whole on the rank that owns it.

Shapes: M matrices of R rows and C columns.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from paceline.comm.boxes import Shape
from paceline.config import Count, Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, StateKind, parameter_groups
from paceline.optim.matrices import Directions, MatrixOptimizer, as_stack, eigen, is_matrix
from paceline.parallel.full import FullTensors


class Shampoo(GroupedConfig):
    """The gradient of a matrix, turned and scaled by the roots of its covariances; AdamW for vectors."""

    lr: Positive = 3.0e-4
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its square, per step."""
    decay: Annotated[Positive, Field(le=1)] = 0.95
    """Of the covariances, per step; 1 adds them up, as in the first publication."""
    grafted: bool = True
    """Take the length of a step from Adam; false: from the roots themselves."""
    every: Count = 10
    """Steps from one computation of the roots to the next."""
    max_side: Count = 8192
    """The longest side that has a covariance."""
    ridge: Positive = 1e-6
    """Added to the eigenvalues of a covariance, as a share of the greatest."""
    eps: Positive = 1e-8
    """Added to the root of Adam's average square."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "tensors"
    state_kinds: ClassVar[Mapping[str, StateKind]] = dict.fromkeys(
        ("average", "square", "left", "right", "left_root", "right_root"), "owner"
    )
    source: ClassVar[str] = "Gupta et al. 2018, arXiv 1802.09568; Anil et al. 2020, arXiv 2002.09018"
    code: ClassVar[str] = "paceline; vectors by torch.optim.AdamW"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Two averages, and two squares for each side that has a covariance."""
        return value_bytes * sum(
            2 * math.prod(shape) + sides_numel(name, tuple(shape), self.max_side) for name, shape in shapes.items()
        )

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters; the roots of a matrix are taken on the rank that owns it."""
        return _Shampoo(self, parameters, full)


class _Shampoo(MatrixOptimizer):
    def __init__(self, options: Shampoo, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> None:
        super().__init__(
            options,
            parameter_groups(parameters, options),
            full,
            is_own=is_matrix,
            cost=lambda shape: eigen_cost(shape, options.max_side),
            betas=options.betas,
            eps=options.eps,
        )
        self._options = options

    def directions(self, matrices: Mapping[str, Tensor], states: Mapping[str, dict[str, Tensor]]) -> Directions:
        """Of each matrix by itself."""
        return {name: self._direction(as_stack(g), states[name]).view(g.shape) for name, g in matrices.items()}

    def move(self, group: dict[str, Any], name: str, parameter: Tensor, direction: Tensor) -> None:
        """Decay, and step."""
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _direction(self, gradient_MRC: Tensor, state: dict[str, Tensor]) -> Tensor:
        options, step = self._options, int(state["step"])
        if "average" not in state:
            state |= {key: torch.zeros_like(gradient_MRC) for key in ("average", "square")}
            state |= empty_sides(gradient_MRC, options.max_side)
        beta1, beta2 = options.betas
        state["average"].lerp_(gradient_MRC, 1 - beta1)
        state["square"].lerp_(gradient_MRC.square(), 1 - beta2)
        add_covariances(gradient_MRC, state, keep=options.decay, add=1 - options.decay if options.decay < 1 else 1.0)
        if (step - 1) % options.every == 0:
            self._take_roots(state, bias=1 - options.decay**step if options.decay < 1 else 1.0)
        mean_MRC = state["average"] / (1 - beta1**step)
        made_MRC = mean_MRC
        if "left" in state:
            made_MRC = state["left_root"] @ made_MRC
        if "right" in state:
            made_MRC = made_MRC @ state["right_root"]
        if not options.grafted:
            return made_MRC
        adam_MRC = mean_MRC / ((state["square"] / (1 - beta2**step)).sqrt() + options.eps)
        length = torch.linalg.matrix_norm(made_MRC, keepdim=True)
        ratio = torch.linalg.matrix_norm(adam_MRC, keepdim=True) / length
        grafted_MRC: Tensor = made_MRC * torch.where(length > 0, ratio, 0.0)
        return grafted_MRC

    def _take_roots(self, state: dict[str, Tensor], bias: float) -> None:
        sides = [key for key in ("left", "right") if key in state]
        for key in sides:
            state[f"{key}_root"] = inverse_root(state[key] / bias, 2 * len(sides), self._options.ridge)


def inverse_root(covariance_MNN: Tensor, order: int, ridge: float) -> Tensor:
    """The power -1/order of symmetric matrices without negative eigenvalues, but for rounding; 0 for one that is 0."""
    values_MN, vectors_MNN = eigen(covariance_MNN)
    greatest_M1 = values_MN[:, -1:]
    powers_MN = (values_MN.clamp(min=0) + ridge * greatest_M1).pow(-1 / order).where(greatest_M1 > 0, 0.0)
    root_MNN: Tensor = (vectors_MNN * powers_MN.unsqueeze(-2)) @ vectors_MNN.mT
    return root_MNN.contiguous()  # as it is when it is restored


def empty_sides(gradient_MRC: Tensor, most: int) -> dict[str, Tensor]:
    """Room for the covariances of both sides, but for those that are too long."""
    stack, height, width = gradient_MRC.shape
    sides = {"left": height, "right": width}
    return {key: gradient_MRC.new_zeros(stack, size, size) for key, size in sides.items() if size <= most}


def add_covariances(gradient_MRC: Tensor, state: dict[str, Tensor], *, keep: float, add: float) -> None:
    """Of the rows and columns of a gradient."""
    if "left" in state:
        state["left"].baddbmm_(gradient_MRC, gradient_MRC.mT, beta=keep, alpha=add)
    if "right" in state:
        state["right"].baddbmm_(gradient_MRC.mT, gradient_MRC, beta=keep, alpha=add)


def sides_numel(name: str, shape: Shape, most: int) -> int:
    """Values of two square matrices for each side that has a covariance."""
    if not is_matrix(name, shape):
        return 0
    return math.prod(shape[:-2]) * sum(2 * size * size for size in shape[-2:] if size <= most)


def eigen_cost(shape: Shape, most: int) -> float:
    """Of decompositions and products with both sides, in multiplications and up to a factor."""
    stack, sides = math.prod(shape[:-2]), [size for size in shape[-2:] if size <= most]
    return stack * sum(float(size) ** 3 + size * math.prod(shape[-2:]) for size in sides)
