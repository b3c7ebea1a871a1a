"""Bits and bytes of what is sent: tensors as rows of uint8."""

import torch
from torch import Tensor


def as_bytes(values: Tensor) -> Tensor:
    """(N, K) of any dtype as (N, K times its bytes) uint8, in the same memory where that is possible."""
    return values.contiguous().view(torch.uint8)


def from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``as_bytes`` was given, in new memory: a row of a larger one may not be aligned, which a view has to be."""
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2 or 4 bits (N, K), K a multiple of those in a byte, as bytes: the first code is the lowest."""
    each = 8 // bits
    groups = codes.to(torch.uint8).view(len(codes), codes.shape[1] // each, each)
    rows = groups[..., 0].clone()
    for place in range(1, each):
        rows |= groups[..., place] << (bits * place)
    return rows


def looked_up(rows: Tensor, bits: int, values: Tensor) -> Tensor:
    """What the codes of packed rows stand for: (N, K) of the dtype of ``values``, which has one for each code."""
    codes = torch.arange(256, device=rows.device).unsqueeze(1) >> torch.arange(0, 8, bits, device=rows.device)
    table = values[codes & ((1 << bits) - 1)]  # of a byte, all at once
    return torch.embedding(table, rows.int()).flatten(1)


def packed_12(numbers: Tensor) -> Tensor:
    """Numbers below 4096 (N, K), two of them in three bytes."""
    if numbers.shape[1] % 2:
        numbers = torch.cat([numbers, torch.zeros_like(numbers[:, :1])], 1)
    low, high = numbers[:, ::2], numbers[:, 1::2]
    three = torch.stack([low & 0xFF, (low >> 8) | ((high & 0xF) << 4), high >> 4], dim=-1)
    return three.to(torch.uint8).flatten(1)


def unpacked_12(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` of what ``packed_12`` was given, int64."""
    first, middle, last = rows.long().view(len(rows), rows.shape[1] // 3, 3).unbind(-1)
    pairs = torch.stack([first | ((middle & 0xF) << 8), (middle >> 4) | (last << 4)], dim=-1)
    return pairs.flatten(1)[:, :count]
