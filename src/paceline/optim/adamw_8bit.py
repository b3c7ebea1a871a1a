"""8-bit AdamW (Dettmers et al. 2022, arXiv 2110.02861): both averages in a byte a value, with a scale for each block.

A block is 256 neighbours of a row of the full tensor, wherever a layout cuts it: where a row is cut over ranks, they
agree on the scales of its blocks. So codes and scales are the same under every layout, and a checkpoint holds them as
they are. The codes are the signed and the unsigned dynamic map of the publication. A square that is not zero never
becomes zero: the step would be divided by eps alone. Vectors and small matrices keep their averages in full.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.comm.boxes import Shape
from paceline.config import Fraction, Natural, NonNegative, Positive
from paceline.optim.base import GroupedConfig, Sees, Shapes, StateKind, parameter_groups
from paceline.optim.with_adamw import WithAdamW
from paceline.parallel.full import FullTensors

BLOCK = 256
"""Values with one scale. The publication has 2,048 of a flat tensor; rows are shorter."""
CACHED = 1 << 16
"""Values that are taken together: averages are there in full for these only, or for one tensor whose rows are cut."""
KEYS = ("average_codes", "average_scales", "square_codes", "square_scales")


class AdamW8bit(GroupedConfig):
    """AdamW with its two averages in 8 bits a value."""

    lr: Positive = 3.0e-4
    """The peak rate; the schedule multiplies it by a factor."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its square, per step."""
    eps: Positive = 1e-8
    """Added to the root of the average square."""
    weight_decay: NonNegative = 0.1
    """For matrices; norms and biases never decay, unless a group says so."""
    small: Natural = 4096
    """Vectors, and tensors of fewer values, keep their averages in full."""

    sees: ClassVar[Sees] = "tensors"
    state_kinds: ClassVar[Mapping[str, StateKind]] = {"average_scales": "rows", "square_scales": "rows"}
    source: ClassVar[str] = "Dettmers et al. 2022, arXiv 2110.02861"
    code: ClassVar[str] = "paceline; vectors by torch.optim.AdamW"

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Two bytes a value and two scales a block; two values where they are kept in full."""
        kept = 0
        for shape in map(tuple, shapes.values()):
            scales = math.prod(shape[:-1]) * _blocks(shape[-1]) if shape else 0
            kept += 2 * (
                math.prod(shape) + value_bytes * scales
                if is_coded(shape, self.small)
                else value_bytes * math.prod(shape)
            )
        return kept

    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters; scales of rows that are cut are agreed on by the ranks."""
        return _AdamW8bit(self, parameters, full)


class _AdamW8bit(WithAdamW):
    def __init__(self, options: AdamW8bit, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> None:
        super().__init__(
            options,
            parameter_groups(parameters, options),
            lambda name: is_coded(full.shape(name), options.small),
            betas=options.betas,
            eps=options.eps,
        )
        self._options, self._full = options, full
        self._maps = {"average": dynamic_map(signed=True), "square": dynamic_map(signed=False)}

    def own_step(self) -> None:
        """See ``WithAdamW``."""
        for group in self.own_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._update(group, name, parameter, parameter.grad)

    def _update(self, group: dict[str, Any], name: str, parameter: Tensor, gradient: Tensor) -> None:
        state, width = self.state[parameter], parameter.shape[-1]
        if not state:
            state |= self._empty(parameter, _blocks(self._full.shape(name)[-1]))
        state["step"] += 1
        values = parameter.detach().reshape(-1, width)
        rows = [values, gradient.reshape(-1, width), *(state[key].view(len(values), -1) for key in KEYS)]
        columns = self._full.columns(name, width)
        if columns is None:
            for some in zip(*(tensor.split(max(1, CACHED // width)) for tensor in rows), strict=True):
                self._update_rows(group, int(state["step"]), None, *some)
        else:
            self._update_rows(group, int(state["step"]), _Cut(name, columns, parameter.shape[:-1]), *rows)
        if not parameter.is_contiguous():
            parameter.copy_(values.view(parameter.shape))

    def _empty(self, parameter: Tensor, blocks: int) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float64)}
        for key, values in self._maps.items():
            zero = int((values == 0).nonzero())
            made[f"{key}_codes"] = torch.full(parameter.shape, zero, dtype=torch.uint8, device=parameter.device)
            made[f"{key}_scales"] = parameter.new_zeros((*parameter.shape[:-1], blocks))
        return made

    def _update_rows(
        self,
        group: dict[str, Any],
        step: int,
        cut: "_Cut | None",
        values: Tensor,
        gradient: Tensor,
        average_codes: Tensor,
        average_scales: Tensor,
        square_codes: Tensor,
        square_scales: Tensor,
    ) -> None:
        """AdamW, then codes and scales of the new averages."""
        beta1, beta2 = self._options.betas
        average = self._decoded("average", average_codes, average_scales, cut)
        square = self._decoded("square", square_codes, square_scales, cut)
        average.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        divisor = (square / (1 - beta2**step)).sqrt_().add_(self._options.eps)
        values.mul_(1 - group["lr"] * group["weight_decay"])
        values.addcdiv_(average, divisor, value=-group["lr"] / (1 - beta1**step))
        for key, new, codes, scales in (
            ("average", average, average_codes, average_scales),
            ("square", square, square_codes, square_scales),
        ):
            scales.copy_(_greatest(new, cut, scales.shape[1]))
            if cut is not None:
                ours = scales.view(*cut.rows, scales.shape[1])
                ours.copy_(self._full.greatest(cut.name, ours))
            self._encode(key, new, codes, scales, cut)

    def _decoded(self, key: str, codes: Tensor, scales: Tensor, cut: "_Cut | None") -> Tensor:
        values = self._maps[key].to(scales.device, scales.dtype)
        return values[codes.int()].mul_(_spread(scales, cut, codes.shape[1]))

    def _encode(self, key: str, new: Tensor, codes: Tensor, scales: Tensor, cut: "_Cut | None") -> None:
        divisor = _spread(scales, cut, codes.shape[1]).clamp(min=torch.finfo(scales.dtype).tiny)
        codes.copy_(encode(new / divisor, self._maps[key].to(new.device, new.dtype)))
        if key == "square":
            codes.clamp_(min=1).masked_fill_(new == 0, 0)


@dataclass(frozen=True)
class _Cut:
    """A parameter whose rows are cut over ranks."""

    name: str
    columns: Tensor
    """Where the columns that are here are in the full tensor."""
    rows: Shape
    """The parameter's dimensions but the last, as they are here."""


def is_coded(shape: Shape, small: int) -> bool:
    """Whether the averages of a full tensor are kept in 8 bits."""
    return len(shape) >= 2 and math.prod(shape) >= small


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values of the codes, ascending, in [-1, 1] or [0, 1]: fp64.

    Seven powers of ten; the smaller the power, the fewer bits are left for the fraction.
    """
    magnitudes: list[float] = []
    for exponent in range(7):
        count = 2 ** (exponent + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        magnitudes += (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    values = [*magnitudes, *(-m for m in magnitudes if signed), 0.0, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float64)


def encode(values: Tensor, codes: Tensor) -> Tensor:
    """The number of the nearest of ascending ``codes``, of two the greater: uint8."""
    middles = (codes[:-1] + codes[1:]) / 2
    return torch.bucketize(values, middles, right=True).to(torch.uint8)


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _spread(scales: Tensor, cut: _Cut | None, width: int) -> Tensor:
    """A scale for each value: from (rows, blocks) to (rows, width)."""
    if cut is None:
        return scales.repeat_interleave(BLOCK, 1)[:, :width]
    return scales[:, (cut.columns // BLOCK).to(scales.device)]


def _greatest(values: Tensor, cut: _Cut | None, blocks: int) -> Tensor:
    """The greatest magnitude of each block, as far as it is here: (rows, blocks)."""
    if cut is None:
        padded = F.pad(values.abs(), (0, blocks * BLOCK - values.shape[1]))
        return padded.view(len(values), blocks, BLOCK).amax(-1)
    index = (cut.columns // BLOCK).to(values.device).expand_as(values)
    return values.new_zeros(len(values), blocks).scatter_reduce_(1, index, values.abs(), "amax")
