"""4 bits a value with a scale for each block: an eighth of the bytes. Two codes.

    linear    -7 .. 7 sevenths of the block's greatest value
    e3m0      0 and +-2^-k of the block's greatest value, k = 0 .. 6: a sign and three bits of exponent, as Streaming
              DiLoCo sends outer gradients (Douillard et al. 2025, arXiv 2501.18512)

A scale for each 256 values leaves little for exponents to do: equal steps leave out half as much, of gradients and of
what weights have moved by (docs/log.md).

Without error feedback a value becomes one of its two neighbours by chance, with the value as the mean; else the
nearest.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from paceline.sync.base import SyncContext
from paceline.sync.reducers.coded import BLOCK, HALF, Code, CodedOptions, CodedReducer, Draw
from paceline.sync.reducers.packing import as_bytes, from_bytes, looked_up, packed

LEVELS = {
    "linear": [k / 7 for k in range(8)],
    "e3m0": [0.0, *(2.0**-k for k in reversed(range(7)))],
}
"""Shares of a block's greatest value that three bits stand for."""


class _FourBitCode:
    def __init__(self, levels: list[float]) -> None:
        self._levels = levels

    def row_bytes(self, value_bytes: int) -> int:
        return BLOCK // 2 + value_bytes

    def encode(self, blocks: Tensor, lengths: Tensor, draw: Draw | None) -> Tensor:
        levels = torch.tensor(self._levels, dtype=blocks.dtype, device=blocks.device)
        scale = blocks.abs().amax(1, keepdim=True)
        share = (blocks.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).nan_to_num_(0.0)
        if draw is None:
            between = torch.lerp(levels[:-1], levels[1:], HALF)
            codes = torch.bucketize(share, between, out_int32=True).to(torch.uint8)
        else:
            above = torch.bucketize(share, levels, out_int32=True).clamp_(1, 7)  # the first level that is not less
            low = levels[above - 1]
            codes = above.to(torch.uint8) - ((share - low) / (levels[above] - low) <= draw()).to(torch.uint8)
        return torch.cat([packed(codes | ((blocks < 0).to(torch.uint8) << 3), 4), as_bytes(scale)], 1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        values = torch.tensor([*self._levels, *(-level for level in self._levels)], dtype=dtype, device=rows.device)
        return looked_up(rows[:, : BLOCK // 2], 4, values).mul_(from_bytes(rows[:, BLOCK // 2 :], dtype))


CODES = {name: _FourBitCode(levels) for name, levels in LEVELS.items()}


class Int4(CodedOptions):
    """Send 4 bits a value with a scale for each 256 values; sum in fp32."""

    format: Literal["linear", "e3m0"] = "linear"
    """Equal steps, or powers of two."""
    error_feedback: bool = True
    """Keep what rounding leaves out and send it the next time; without it values are rounded by chance."""

    code: ClassVar[Code] = CODES["linear"]  # as many bytes as the other
    ns_per_value: ClassVar[float] = 39
    source: ClassVar[str] = "e3m0: Douillard et al. 2025 (Streaming DiLoCo), arXiv 2501.18512"

    def build(self, context: SyncContext) -> CodedReducer:
        """The reducer at work."""
        return CodedReducer(context, CODES[self.format], error_feedback=self.error_feedback)
