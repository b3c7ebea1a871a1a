"""Parameters and the optimizer's state of one shard, and what is done with gradients there.

    sum       g = sum over pushes of weight * g_push, in the order of the workers
    delay     (Zheng et al. 2017, arXiv 1609.08326) g + lambda g (.) g (.) (theta - theta_bak), where theta_bak is what
              the worker had read; ``adaptive``: lambda = lambda_0 / sqrt(MS + 1e-7), MS = m MS + (1 - m) g (.) g
    step      the run's own optimizer, on this shard's values

Values are in one flat tensor, piece after piece.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paceline.optim.base import OptimizerConfig
from paceline.sync.server.codec import Boxed
from paceline.sync.server.place import Box, Piece
from paceline.sync.server.shard import Gradient

Compensation = Literal["none", "constant", "adaptive"]
_EPSILON = 1e-7
_MOST_FREE = 2


@dataclass(frozen=True, kw_only=True)
class Delay:
    """How gradients of old parameters are compensated."""

    kind: Compensation = "none"
    strength: float = 0.04
    """lambda, or lambda_0 of ``adaptive``."""
    decay: float = 0.95
    """m of ``adaptive``."""


class TensorStore:
    """The store of one shard, over pieces of parameters that all are of one dtype.

    ``ndims``: of the whole parameters, by name: matrices decay, vectors do not. ``apart``: parameters whose pieces are
    kept elsewhere.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        ndims: Mapping[str, int],
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        delay: Delay | None = None,
        *,
        apart: Set[str] = frozenset(),
    ) -> None:
        self._pieces, self._delay = pieces, delay or Delay()
        self._offsets = [0]
        for piece in pieces:
            self._offsets.append(self._offsets[-1] + (0 if piece.name in apart else piece.numel))
        total = self._offsets[-1]
        self.flat = torch.zeros(total, dtype=dtype)
        self._sum = torch.zeros(total, dtype=dtype)
        self._gradient = self._sum
        """Of the next step: the sum, or the only push as it lies there."""
        self._free: list[Tensor] = []
        """Copies that are not read any more: memory that is there already is several times faster than new."""
        self._mean_square = torch.zeros(total if self._delay.kind == "adaptive" else 0, dtype=dtype)
        self._runs = {name: self._run_of(name) for name in dict.fromkeys(p.name for p in pieces if p.name not in apart)}
        self._parameters = {name: _like(self.flat[a:b], ndims[name]) for name, (a, b) in self._runs.items()}
        self._numbers = {name: i for i, name in enumerate(self._runs)}
        self._piece_names = [piece.name for piece in pieces]
        self._touched: set[str] = set()
        self._segments: dict[tuple[Box, ...], tuple[list[tuple[int, int]] | None, frozenset[str]]] = {}
        full: Any = None  # an optimizer of single values does not ask what it has parts of
        self.optimizer = optimizer.build(self._parameters, full) if self._parameters else None
        self._peaks = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def gather(self, gradients: Sequence[Gradient], *, measured: bool) -> float:
        """See ``Store``; a parameter of which no push has a gradient stays without one."""
        self._touched = set()
        self._gradient = self._sum
        is_first = True
        for gradient in gradients:
            for _, part in sorted(gradient.parts.items()):
                self._touched |= self._known(part.boxes)[1]
                if self._delay.kind != "none" and self._delays(gradient):
                    part = Boxed(part.boxes, self._compensated(part, gradient.base))
                if is_first and self._is_all(part.boxes):
                    if gradient.weight == 1.0 and len(gradients) == len(gradient.parts) == 1:
                        self._gradient = part.flat
                    else:
                        torch.mul(part.flat, gradient.weight, out=self._sum)
                    is_first = False
                    continue
                if is_first:
                    self._sum.zero_()
                    is_first = False
                for own, values in self._pairs(self._sum, part):
                    own.add_(values, alpha=gradient.weight)
        if is_first:
            self._sum.zero_()
        if not measured or not len(self._gradient):
            return 0.0
        return float(torch.linalg.vector_norm(self._gradient)) ** 2

    def step(self, rate: float, scale: float) -> None:
        """See ``Store``."""
        if self.optimizer is None:
            return
        if scale != 1.0:
            self._gradient = torch.mul(self._gradient, scale, out=self._sum)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        for name, parameter in self._parameters.items():
            low, high = self._runs[name]
            parameter.grad = self._gradient[low:high].view_as(parameter) if name in self._touched else None
        self.optimizer.step()

    def copy(self) -> Tensor:
        """See ``Store``."""
        copy = self._free.pop() if self._free else torch.empty_like(self.flat)
        return copy.copy_(self.flat)

    def release(self, copy: Tensor) -> None:
        """See ``Store``."""
        if len(self._free) < _MOST_FREE:
            self._free.append(copy)

    def read(self, copy: Tensor | None, wanted: Any) -> list[Tensor]:
        """The boxes that are wanted, as views, of the parameters or of what the optimizer keeps by some key.

        ``wanted``: boxes, and None or a key. They are valid until anything else is asked of this store.
        """
        boxes, key = wanted[:2]
        source = self.flat if copy is None else copy
        if key is not None:
            source = self._kept(key)
        segments, _ = self._known(boxes)
        if segments is not None:
            return [source[low:high] for low, high in segments]
        return [self._box(source, box) for box in boxes]

    def fill(self, key: str | None, values: Boxed) -> None:
        """Set parameters (None), or what the optimizer keeps, before the first step."""
        target = self.flat if key is None else self._kept(key)
        for own, given in self._pairs(target, values):
            own.copy_(given)
        if key is not None and self.optimizer is not None:
            for name in self._known(values.boxes)[1]:
                (low, high), parameter = self._runs[name], self._parameters[name]
                self.optimizer.state[parameter][key] = target[low:high].clone().view_as(parameter)

    def kept(self) -> dict[str, dict[str, Any]]:
        """What the optimizer keeps of each parameter: None for a tensor like it, else the number and its dtype."""
        state = self.optimizer.state if self.optimizer is not None else {}
        return {
            name: {
                key: None if value.numel() == p.numel() and value.ndim else (float(value), str(value.dtype)[6:])
                for key, value in state[p].items()
                if isinstance(value, Tensor)
            }
            for name, p in self._parameters.items()
            if state.get(p)
        }

    def set_scalars(self, scalars: Mapping[str, Mapping[str, tuple[float, str]]]) -> None:
        """Set the numbers that the optimizer keeps, before the first step."""
        for name, values in scalars.items():
            if name in self._parameters and self.optimizer is not None:
                kept = self.optimizer.state[self._parameters[name]]
                kept.update({key: torch.tensor(value, dtype=getattr(torch, d)) for key, (value, d) in values.items()})

    def save(self, copies: Mapping[int, Tensor]) -> dict[str, Any]:
        """Tensors by name, and the rest: everything, as plain values and tensors in memory of their own."""
        state = self.optimizer.state if self.optimizer is not None else {}
        kept = [
            (self._numbers[name], key, value.clone())
            for name, parameter in self._parameters.items()
            for key, value in state.get(parameter, {}).items()
        ]
        return {
            "flat": self.flat.clone(),
            "mean_square": self._mean_square.clone(),
            "copies": list(copies.items()),
            "kept": kept,
        }

    def load(self, saved: Mapping[str, Any]) -> Mapping[int, Tensor]:
        """As saved."""
        self.flat.copy_(saved["flat"])
        self._mean_square.copy_(saved["mean_square"])
        names = list(self._runs)
        for number, key, value in saved["kept"]:
            assert self.optimizer is not None
            self.optimizer.state[self._parameters[names[number]]][key] = value.clone()
        return dict(saved["copies"])

    # Places.

    def _run_of(self, name: str) -> tuple[int, int]:
        """Pieces of one tensor are neighbours."""
        numbers = [i for i, piece in enumerate(self._pieces) if piece.name == name]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        return self._offsets[numbers[0]], self._offsets[numbers[-1] + 1]

    def _known(self, boxes: tuple[Box, ...]) -> tuple[list[tuple[int, int]] | None, frozenset[str]]:
        """The boxes as runs of the flat tensor, None if they are not, and the parameters that they are of."""
        if boxes not in self._segments:
            is_whole = all(shape == self._pieces[number].shape for number, _, shape in boxes)
            runs: list[tuple[int, int]] = []
            for number, _, _ in boxes if is_whole else ():
                low, high = self._offsets[number], self._offsets[number + 1]
                if runs and runs[-1][1] == low:
                    runs[-1] = (runs[-1][0], high)
                else:
                    runs.append((low, high))
            names = frozenset(self._piece_names[number] for number, _, _ in boxes)
            self._segments[boxes] = runs if is_whole else None, names
        return self._segments[boxes]

    def _is_all(self, boxes: tuple[Box, ...]) -> bool:
        return self._known(boxes)[0] == [(0, len(self.flat))]

    def _box(self, flat: Tensor, box: Box) -> Tensor:
        number, start, shape = box
        piece = flat[self._offsets[number] : self._offsets[number + 1]].view(self._pieces[number].shape)
        return piece[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def _pairs(self, flat: Tensor, values: Boxed) -> Iterator[tuple[Tensor, Tensor]]:
        """What of a flat tensor each value belongs to, and the values."""
        segments, _ = self._known(values.boxes)
        at = 0
        if segments is not None:
            for low, high in segments:
                yield flat[low:high], values.flat[at : at + high - low]
                at += high - low
            return
        for box in values.boxes:
            numel = math.prod(box[2])
            yield self._box(flat, box), values.flat[at : at + numel].view(box[2])
            at += numel

    # Rules.

    def _delays(self, gradient: Gradient) -> bool:
        return gradient.base is not None or self._delay.kind == "adaptive"

    def _compensated(self, part: Boxed, base: Tensor | None) -> Tensor:
        delay = self._delay
        flat = part.flat.clone()
        mean_squares = self._pairs(self._mean_square, part) if delay.kind == "adaptive" else None
        bases = self._pairs(base, part) if base is not None else None
        for now, values in self._pairs(self.flat, Boxed(part.boxes, flat)):
            square = values.square()
            if mean_squares is not None:
                mean_square, _ = next(mean_squares)
                mean_square.mul_(delay.decay).add_(square, alpha=1 - delay.decay)
            if bases is None:
                continue
            moved = now - next(bases)[0]
            strength: Any = delay.strength
            if mean_squares is not None:
                strength = delay.strength / (mean_square + _EPSILON).sqrt()
            values.add_(strength * square * moved)
        return flat

    # What the optimizer keeps.

    def _kept(self, key: str) -> Tensor:
        assert self.optimizer is not None
        flat = torch.zeros_like(self.flat)
        for name, parameter in self._parameters.items():
            value = self.optimizer.state.get(parameter, {}).get(key)
            if value is not None:
                low, high = self._runs[name]
                flat[low:high] = value.reshape(-1)
        return flat


def _like(values: Tensor, ndim: int) -> nn.Parameter:
    """Values as a vector, or as a matrix of one column if they are of one."""
    return nn.Parameter(values.view(-1, 1) if ndim >= 2 else values, requires_grad=True)
