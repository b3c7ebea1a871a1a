"""Casts to fp16, with a power of two for each block: half the bytes, summed in fp32.

fp16 has 3 more bits of a value than bf16 and little range, which gradients leave at both ends. So a block is first
divided by the power of two above its greatest value, which rounds nothing.
"""

from typing import ClassVar

import torch
from torch import Tensor

from paceline.sync.reducers.coded import BLOCK, Code, CodedOptions, Draw
from paceline.sync.reducers.packing import as_bytes, from_bytes


class _FP16Code:
    def row_bytes(self, value_bytes: int) -> int:
        return 2 * BLOCK + value_bytes

    def encode(self, blocks: Tensor, lengths: Tensor, draw: Draw | None) -> Tensor:
        greatest = blocks.abs().amax(1, keepdim=True)
        _, exponent = torch.frexp(greatest)
        scale = torch.ldexp(torch.ones_like(greatest), exponent)
        scale = torch.where(greatest.isfinite(), scale, torch.nan)
        return torch.cat([as_bytes((blocks / scale).half()), as_bytes(scale)], 1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return from_bytes(rows[:, : 2 * BLOCK], torch.float16).to(dtype) * from_bytes(rows[:, 2 * BLOCK :], dtype)


class FP16(CodedOptions):
    """Send in fp16, each block as multiples of a power of two; sum in fp32."""

    error_feedback: bool = False
    """Keep what rounding leaves out and send it the next time."""

    code: ClassVar[Code] = _FP16Code()
    ns_per_value: ClassVar[float] = 16
    source: ClassVar[str] = "a cast"
