"""One bit a value: its sign, times the mean absolute value of its block.

    C(p) = |p|_1 / d * sign(p)

With error feedback at both ends it is what 1-bit Adam sends; without it, it need not converge (Karimireddy et al.
2019). The sign of zero is positive.
"""

from typing import ClassVar

import torch
from torch import Tensor

from paceline.sync.reducers.coded import BLOCK, Code, CodedOptions, Draw
from paceline.sync.reducers.packing import as_bytes, from_bytes, looked_up, packed


class _SignCode:
    def row_bytes(self, value_bytes: int) -> int:
        return BLOCK // 8 + value_bytes

    def encode(self, blocks: Tensor, lengths: Tensor, draw: Draw | None) -> Tensor:
        is_value = torch.arange(BLOCK, device=blocks.device) < lengths.unsqueeze(1)
        scale = torch.where(is_value, blocks.abs(), 0.0).sum(1, keepdim=True) / lengths.unsqueeze(1)
        return torch.cat([packed(blocks >= 0, 1), as_bytes(scale)], 1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        signs = torch.tensor([-1.0, 1.0], dtype=dtype, device=rows.device)
        return looked_up(rows[:, : BLOCK // 8], 1, signs).mul_(from_bytes(rows[:, BLOCK // 8 :], dtype))


class Sign(CodedOptions):
    """Send signs with the mean absolute value of each 256 values; sum in fp32."""

    error_feedback: bool = True
    """Keep what the signs leave out and send it the next time."""

    code: ClassVar[Code] = _SignCode()
    ns_per_value: ClassVar[float] = 25
    source: ClassVar[str] = (
        "Karimireddy et al. 2019, arXiv 1901.09847, by blocks; sums as in 1-bit Adam, arXiv 2102.02888"
    )
