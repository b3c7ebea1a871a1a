"""SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3): Adam in the eigenbasis of Shampoo's covariances.

    L <- b L + (1 - b) G G'        R <- b R + (1 - b) G' G        Q_L, Q_R: their eigenvectors
    V <- b2 V + (1 - b2) (Q_L' G Q_R)^2        M <- b1 M + (1 - b1) G
    w <- w - lr sqrt(1 - b2^t) / (1 - b1^t) Q_L (Q_L' M Q_R / (sqrt(V) + eps)) Q_R', then w <- (1 - lr decay) w

As in the authors' code, the first step only makes the bases, and V follows the eigenvectors when their order changes;
later bases come from one step of power iteration and a QR decomposition, every ``every`` steps. A side longer than
``max_side`` keeps its own basis. All that is kept of a matrix lies whole on the rank that owns it.

Where a covariance is zero any basis is one of eigenvectors, and rounding would choose: another one under every layout,
and so other updates. The longer side of a matrix is zero in many directions at first. So a fixed basis is chosen there
(``eigenbasis``), and the power iteration leaves it alone until the covariance is known.

Shapes: M matrices of R rows and C columns, N of a side.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paceline.config import Count, Fraction, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, StateKind, parameter_groups
from paceline.optim.matrices import Directions, MatrixOptimizer, as_stack, eigen, is_matrix
from paceline.optim.shampoo import add_covariances, eigen_cost, empty_sides, sides_numel
from paceline.parallel.full import FullTensors


class SOAP(GroupedConfig):
    """Adam in the basis in which the gradient's covariances are diagonal; AdamW for vectors."""

    lr: Positive = 1.0e-3
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.95, 0.95)
    """Decay of the averages of the gradient and of its rotated square, per step."""
    decay: Fraction = 0.95
    """Of the covariances, per step."""
    every: Count = 10
    """Steps from one change of the bases to the next."""
    max_side: Count = 8192
    """The longest side that has a covariance."""
    eps: Positive = 1e-8
    """Added to the root of the average square."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""

    sees: ClassVar[Sees] = "tensors"
    state_kinds: ClassVar[Mapping[str, StateKind]] = dict.fromkeys(
        ("average", "square", "left", "right", "left_basis", "right_basis"), "owner"
    )
    source: ClassVar[str] = "Vyas et al. 2024, arXiv 2409.11321"
    code: ClassVar[str] = "paceline; vectors by torch.optim.AdamW"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Two averages, and two squares for each side that has a covariance."""
        return value_bytes * sum(
            2 * math.prod(shape) + sides_numel(name, tuple(shape), self.max_side) for name, shape in shapes.items()
        )

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters; a matrix is rotated on the rank that owns it."""
        return _SOAP(self, parameters, full)


class _SOAP(MatrixOptimizer):
    def __init__(self, options: SOAP, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> None:
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
        """Step, and decay; nothing in the first step."""
        if self.state[parameter]["step"] > 1:
            parameter.add_(direction, alpha=-group["lr"]).mul_(1 - group["lr"] * group["weight_decay"])

    def _direction(self, gradient_MRC: Tensor, state: dict[str, Tensor]) -> Tensor:
        options, done = self._options, int(state["step"]) - 1
        keep, add = options.decay, 1 - options.decay
        if done == 0:
            state |= {key: torch.zeros_like(gradient_MRC) for key in ("average", "square")}
            state |= empty_sides(gradient_MRC, options.max_side)
            add_covariances(gradient_MRC, state, keep=keep, add=add)
            for key in _sides(state):
                state[f"{key}_basis"] = eigenbasis(state[key])
            return torch.zeros_like(gradient_MRC)
        beta1, beta2 = options.betas
        state["average"].lerp_(gradient_MRC, 1 - beta1)
        state["square"].lerp_(rotated(gradient_MRC, state).square_(), 1 - beta2)
        made_MRC = rotated(state["average"], state).div_(state["square"].sqrt().add_(options.eps))
        made_MRC = rotated_back(made_MRC, state).mul_((1 - beta2**done) ** 0.5 / (1 - beta1**done))
        add_covariances(gradient_MRC, state, keep=keep, add=add)
        if done % options.every == 0:
            self._turn(state)
        return made_MRC

    def _turn(self, state: dict[str, Tensor]) -> None:
        """One power iteration from the bases so far, in the order of the eigenvalues they find."""
        for dim, key in ((-2, "left"), (-1, "right")):
            if key not in state:
                continue
            basis_MNN = state[f"{key}_basis"]
            image_MNN = state[key] @ basis_MNN
            values_MN = (basis_MNN * image_MNN).sum(-2)
            image_MNN += _least(values_MN).unsqueeze(-1) * basis_MNN
            order_MN = values_MN.argsort(dim=-1, descending=True, stable=True)
            image_MNN = torch.take_along_dim(image_MNN, order_MN.unsqueeze(-2), -1)
            along = order_MN.unsqueeze(-1 if dim == -2 else -2)
            state["square"] = torch.take_along_dim(state["square"], along, dim)
            # In the order of memory in which it is restored: products in another one would round otherwise.
            state[f"{key}_basis"] = torch.linalg.qr(image_MNN).Q.contiguous()


def eigenbasis(covariance_MNN: Tensor) -> Tensor:
    """Eigenvectors, those of the greatest values first; where values are rounding alone, those of a fixed matrix."""
    values_MN, vectors_MNN = eigen(covariance_MNN)
    size = values_MN.shape[-1]
    fixed_NN = torch.arange(size, 0, -1, dtype=values_MN.dtype, device=values_MN.device).diag() / size
    known_MN = values_MN > size * torch.finfo(values_MN.dtype).eps * values_MN[:, -1:]
    for vectors_NN, unknown in zip(vectors_MNN, (~known_MN).sum(-1).tolist(), strict=True):
        if unknown:
            open_NU = vectors_NN[:, :unknown]
            vectors_NN[:, :unknown] = open_NU @ eigen((open_NU.mT @ fixed_NN @ open_NU).unsqueeze(0))[1][0]
    basis_MNN: Tensor = vectors_MNN.flip(-1).contiguous()
    return basis_MNN


def _least(values_MN: Tensor) -> Tensor:
    """What is added to eigenvalues, so that an image of a value of 0 is the vector itself, not rounding: (M, 1)."""
    share = float(torch.finfo(values_MN.dtype).eps) ** 0.5
    least_M1: Tensor = share * values_MN.amax(-1, keepdim=True)
    return least_M1


def rotated(tensor_MRC: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """In the bases of both sides; a new tensor."""
    left, right = state.get("left_basis"), state.get("right_basis")
    tensor_MRC = tensor_MRC.clone() if left is None else left.mT @ tensor_MRC
    return tensor_MRC if right is None else tensor_MRC @ right


def rotated_back(tensor_MRC: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """From the bases of both sides."""
    left, right = state.get("left_basis"), state.get("right_basis")
    tensor_MRC = tensor_MRC if left is None else left @ tensor_MRC
    return tensor_MRC if right is None else tensor_MRC @ right.mT


def _sides(state: Mapping[str, Tensor]) -> list[str]:
    return [key for key in ("left", "right") if key in state]
