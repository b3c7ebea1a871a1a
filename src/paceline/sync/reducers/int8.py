"""8-bit integers with a scale for each block: a quarter of the bytes.

    s = greatest |x| of the block / 127;   q = floor(x / s + u), u in [0, 1) by chance: the mean of s q is x

With error feedback u is about 1/2, for what is left out is sent the next time anyway.
"""

from typing import ClassVar

import torch
from torch import Tensor

from paceline.sync.reducers.coded import BLOCK, HALF, Code, CodedOptions, Draw
from paceline.sync.reducers.packing import as_bytes, from_bytes

_MOST = 127


class _Int8Code:
    def row_bytes(self, value_bytes: int) -> int:
        return BLOCK + value_bytes

    def encode(self, blocks: Tensor, lengths: Tensor, draw: Draw | None) -> Tensor:
        scale = blocks.abs().amax(1, keepdim=True) / _MOST
        codes = blocks / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        codes = (codes + (1 - HALF if draw is None else draw())).floor_().clamp_(-_MOST, _MOST)
        return torch.cat([as_bytes(codes.nan_to_num_(0.0).to(torch.int8)), as_bytes(scale)], 1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return from_bytes(rows[:, :BLOCK], torch.int8).to(dtype) * from_bytes(rows[:, BLOCK:], dtype)


class Int8(CodedOptions):
    """Send 8-bit integers with a scale for each 256 values, rounded by chance; sum in fp32."""

    error_feedback: bool = False
    """Keep what rounding leaves out and send it the next time; then values are rounded to the nearest."""

    code: ClassVar[Code] = _Int8Code()
    ns_per_value: ClassVar[float] = 29
    source: ClassVar[str] = "Alistarh et al. 2017 (QSGD), arXiv 1610.02132, by blocks of a fixed size"
