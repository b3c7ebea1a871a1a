"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal.

A step turns all directions of a matrix by the same amount, where AdamW follows the few largest. The rate is scaled as
Liu et al. 2025 (arXiv 2502.16982, section 2.2) do, so that a rate that was good for AdamW is good here, and one rate
serves all parameters. Matrices of the repeated blocks are Muon's; embeddings, heads and vectors are AdamW's.

Shapes: M matrices of R rows and C columns, R <= C.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Count, Fraction, NonNegative, Options, Positive
from paceline.optim.base import decay_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic X -> aX + b(XX')X + c(XX')^2 X: the steepest at 0 whose iterates stay near 1 (Jordan 2024)."""
STACKED = 1 << 24
"""Elements of the matrices that are made orthogonal at once: many small ones fill the units, few large ones do too."""


class Muon(Options):
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
    """For matrices; norms and biases never decay."""

    is_elementwise: ClassVar[bool] = False

    @property
    def state_per_parameter(self) -> int:
        """AdamW's two at most; a block's matrix has one."""
        return 2

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over named parameters."""
        return _Muon(self, decay_groups(parameters, self.weight_decay))


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of a numbered block, or a stack of them (experts), and not a table looked up."""
    in_block = any(part.isdigit() for part in name.split("."))
    is_table = "embed" in name or "bias" in name
    return parameter.ndim in {2, 3} and min(parameter.shape) > 1 and in_block and not is_table


class _Muon(torch.optim.Optimizer):
    """One optimizer over two kinds of groups, with one state."""

    def __init__(self, options: Muon, groups: list[dict[str, Any]]) -> None:
        matrices = list(_part(groups, is_block_matrix))
        others = list(_part(groups, lambda name, parameter: not is_block_matrix(name, parameter)))
        super().__init__([*matrices, *others], {"lr": options.lr})
        self._matrices = self.param_groups[: len(matrices)]
        self._options = options
        self._others: torch.optim.Optimizer | None = None
        if others:
            adamw = torch.optim.AdamW(others, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
            self.param_groups[len(matrices) :] = adamw.param_groups
            adamw.state = self.state
            self._others = adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self._matrices:
            if learning := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._step_matrices(learning, group["lr"], group["weight_decay"])
        if self._others is not None:
            self._others.step()

    def _step_matrices(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - self._options.momentum)
        ahead = list(torch._foreach_lerp(gradients, buffers, self._options.momentum))
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        for members in _alike(ahead):
            wide = [_as_wide(ahead[i]) for i in members]
            updates_MRC = orthogonal(torch.cat(wide), self._options.iterations)
            scale = 0.2 * updates_MRC.shape[-1] ** 0.5  # the root mean square of AdamW's updates is about 0.2
            for i, update in zip(members, updates_MRC.split([len(stack) for stack in wide]), strict=True):
                if ahead[i].shape[-2:] != update.shape[-2:]:
                    update = update.mT
                parameters[i].add_(update.reshape(parameters[i].shape), alpha=-lr * scale)


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


def _part(groups: Iterable[dict[str, Any]], keep: Callable[[str, Tensor], bool]) -> Iterator[dict[str, Any]]:
    """The groups with only those parameters for which ``keep(name, parameter)``."""
    for group in groups:
        kept = [(name, p) for name, p in zip(group["names"], group["params"], strict=True) if keep(name, p)]
        if kept:
            yield {**group, "names": [name for name, _ in kept], "params": [p for _, p in kept]}


def _alike(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices of one shape, turned or not, a few at a time."""
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        by_shape[tuple(sorted(tensor.shape[-2:]))].append(i)
    for members in by_shape.values():
        chunk: list[int] = []
        for i in members:
            if chunk and sum(tensors[j].numel() for j in chunk) + tensors[i].numel() > STACKED:
                yield chunk
                chunk = []
            chunk.append(i)
        yield chunk


def _as_wide(tensor: Tensor) -> Tensor:
    """A matrix or a stack of them as (M, R, C) with R <= C."""
    stack = tensor.reshape(-1, *tensor.shape[-2:])
    return stack if stack.shape[-2] <= stack.shape[-1] else stack.mT
