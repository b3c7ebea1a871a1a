"""Casts to bf16: half the bytes, summed in fp32."""

from typing import ClassVar

import torch
from torch import Tensor

from paceline.sync.reducers.coded import BLOCK, Code, CodedOptions, Draw
from paceline.sync.reducers.packing import as_bytes, from_bytes


class _BF16Code:
    def row_bytes(self, value_bytes: int) -> int:
        return 2 * BLOCK

    def encode(self, blocks: Tensor, lengths: Tensor, draw: Draw | None) -> Tensor:
        return as_bytes(blocks.to(torch.bfloat16))

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return from_bytes(rows, torch.bfloat16).to(dtype)


class BF16(CodedOptions):
    """Send in bf16, rounded to the nearest; sum in fp32."""

    error_feedback: bool = False
    """Keep what rounding leaves out and send it the next time."""

    code: ClassVar[Code] = _BF16Code()
    ns_per_value: ClassVar[float] = 10
    source: ClassVar[str] = "a cast"
