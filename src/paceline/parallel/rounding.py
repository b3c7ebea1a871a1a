"""Stochastic rounding of fp32 values to bf16: up or down by chance, so that on average nothing is lost.

Rounded to the nearest, an update of less than half the last place of a weight changes nothing, however often it comes
(Gupta et al. 2015, arXiv 1502.02551, section 3; Zamirai et al. 2020, arXiv 2010.06192, for bf16 weights). bf16 is the
upper half of fp32, and the lower half, over 2^16, is the chance that a value is rounded away from zero. So a number of
16 random bits is added to the bits of the value, and the lower half is cut off.

What is drawn follows from a key and the position in the full tensor (``models.chance``), whoever rounds that part.
"""

from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from paceline.models.chance import drawn, fold

ELEMENTS = 1 << 17
"""Rounded at once on a CPU: the numbers drawn for them stay in its caches."""
DEVICE_ELEMENTS = 1 << 24
"""The same elsewhere: few large kernels."""


def round_box(exact: Tensor, kept: Tensor, *, start: Sequence[int], full_shape: Sequence[int], key: int) -> None:
    """Write ``exact`` (fp32) to ``kept`` (bf16), both of one shape: a box of a full tensor that begins at ``start``.

    Every value becomes one of the two bf16 numbers next to it, with chances such that it is the mean; what is a bf16
    number already stays. Infinities and NaN stay what they are.
    """
    if exact.ndim == 0:
        exact, kept, start, full_shape = exact.view(1), kept.view(1), (0,), (1,)
    rows = row_numbers(exact, start, full_shape)
    columns = torch.arange(start[-1], start[-1] + exact.shape[-1], device=exact.device)
    for part in _parts(exact):
        bits = drawn(fold(key, rows[part]), columns).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        bits += exact[part].view(torch.int32)
        kept[part].copy_(bits.bitwise_and_(-0x10000).view(torch.float32))


def row_numbers(box: Tensor, start: Sequence[int], full_shape: Sequence[int]) -> Tensor:
    """The number of each row (all dimensions but the last) in the full tensor: int64, of the shape without the last."""
    rows = torch.zeros((), dtype=torch.int64, device=box.device)
    for at, size, full in zip(start[:-1], box.shape[:-1], full_shape[:-1], strict=True):
        rows = rows.unsqueeze(-1) * full + torch.arange(at, at + size, device=box.device)
    return rows


def _parts(box: Tensor) -> Iterator[slice | EllipsisType]:
    """Of the first dimension, so many at a time that they fit the caches; a vector as a whole."""
    if box.ndim == 1:
        yield ...
        return
    elements = ELEMENTS if box.device.type == "cpu" else DEVICE_ELEMENTS
    step = max(1, elements // max(1, box[0].numel())) if len(box) else 1
    for begin in range(0, len(box), step):
        yield slice(begin, begin + step)
