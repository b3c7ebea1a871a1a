"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal.

A step turns all directions of a matrix by the same amount, where AdamW follows the few largest. The rate is scaled as
Liu et al. 2025 (arXiv 2502.16982, section 2.2) do, so that a rate that was good for AdamW is good here, and one rate
serves all parameters. Matrices of the repeated blocks are Muon's; embeddings, heads and vectors are AdamW's.

Shapes: M matrices of R rows and C columns, R <= C.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.comm.boxes import Shape
from paceline.config import Count, Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, parameter_groups
from paceline.optim.matrices import Directions, MatrixOptimizer, as_stack, is_block_matrix
from paceline.parallel.full import FullTensors

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic X -> aX + b(XX')X + c(XX')^2 X: the steepest at 0 whose iterates stay near 1 (Jordan 2024)."""
STACKED = 1 << 24
"""Elements of the matrices that are made orthogonal at once: many small ones fill the units, few large ones do too."""


class Muon(GroupedConfig):
    """Momentum made orthogonal, for the matrices of the blocks; AdamW for the rest."""

    lr: Positive = 3.0e-4
    """The peak rate of both; the schedule multiplies it by a factor."""
    momentum: Fraction = 0.95
    """Decay of the average of a matrix's gradient, per step; the update looks ahead along it (Nesterov)."""
    iterations: Count = 5
    """Newton-Schulz iterations that make an update orthogonal, in bf16 (in fp64 for fp64 parameters)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's, for the rest."""
    eps: Positive = 1e-8
    """AdamW's, for the rest."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "tensors"
    source: ClassVar[str] = "Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982"
    code: ClassVar[str] = "paceline; the rest by torch.optim.AdamW"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """One average for a block's matrix, AdamW's two for the rest."""
        return value_bytes * sum(
            (1 if is_block_matrix(name, tuple(shape)) else 2) * math.prod(shape) for name, shape in shapes.items()
        )

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters; a matrix is made orthogonal on the rank that owns it."""
        return _Muon(self, parameters, full)


class _Muon(MatrixOptimizer):
    def __init__(self, options: Muon, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> None:
        super().__init__(
            options,
            parameter_groups(parameters, options),
            full,
            is_own=is_block_matrix,
            cost=lambda shape: float(math.prod(shape) * min(shape[-2:])),
            betas=options.betas,
            eps=options.eps,
        )
        self._options = options

    def prepare(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A look ahead along the momentum, which each rank keeps of its own values."""
        for parameter in parameters.values():
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters.values()]
        own = list(gradients.values())
        torch._foreach_lerp_(buffers, own, 1 - self._options.momentum)
        return dict(zip(gradients, torch._foreach_lerp(own, buffers, self._options.momentum), strict=True))

    def directions(self, matrices: Mapping[str, Tensor], states: Mapping[str, dict[str, Tensor]]) -> Directions:
        """Made orthogonal, matrices of one shape together."""
        made: Directions = {}
        for names in _alike(matrices):
            wide = [_as_wide(matrices[name]) for name in names]
            updates_MRC = orthogonal(torch.cat(wide), self._options.iterations)
            for name, update in zip(names, updates_MRC.split([len(stack) for stack in wide]), strict=True):
                turned = matrices[name].shape[-2:] != update.shape[-2:]
                made[name] = (update.mT if turned else update).reshape(matrices[name].shape)
        return made

    def move(self, group: dict[str, Any], name: str, parameter: Tensor, direction: Tensor) -> None:
        """Decay, and step: the root mean square of AdamW's updates is about 0.2, and so is that of these."""
        scale = 0.2 * max(self.full.shape(name)[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)


def orthogonal(matrices_MRC: Tensor, iterations: int) -> Tensor:
    """Bring all singular values of each matrix to about 1, by Newton-Schulz iterations; (M, R, C) with R <= C."""
    a, b, c = COEFFICIENTS
    dtype = torch.float64 if matrices_MRC.dtype is torch.float64 else torch.bfloat16
    x_MRC = matrices_MRC.to(dtype)
    x_MRC = x_MRC / torch.linalg.matrix_norm(x_MRC, keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=a)
    return x_MRC


def _alike(matrices: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of matrices of one shape, turned or not, a few at a time."""
    by_shape: dict[Shape, list[str]] = defaultdict(list)
    for name, tensor in matrices.items():
        by_shape[tuple(sorted(tensor.shape[-2:]))].append(name)
    for members in by_shape.values():
        chunk: list[str] = []
        for name in members:
            if chunk and sum(matrices[other].numel() for other in chunk) + matrices[name].numel() > STACKED:
                yield chunk
                chunk = []
            chunk.append(name)
        yield chunk


def _as_wide(tensor: Tensor) -> Tensor:
    """A matrix or a stack of them as (M, R, C) with R <= C."""
    stack = as_stack(tensor)
    return stack if stack.shape[-2] <= stack.shape[-1] else stack.mT
