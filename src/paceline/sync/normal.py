"""Normal numbers that follow from a key and the place in the full tensor, whoever draws them.

Box and Muller 1958: of two uniform numbers u, v, sqrt(-2 ln u) cos(2 pi v) is normal. Both have 32 bits, so none is
farther out than 6.7 standard deviations; the tail that is missing has a probability of 2e-11.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.comm.boxes import whole
from paceline.comm.replica import Shard
from paceline.models.chance import drawn, fold, stream_seed
from paceline.parallel.rounding import row_numbers


def add_normal(tensor: Tensor, shard: Shard, deviation: float, key: Sequence[object]) -> None:
    """Add N(0, deviation^2) to a tensor like a shard, in place; padding stays as it is."""
    part = shard.part or whole(shard.local.shape)
    seeds = [stream_seed(*key, shard.name, name) for name in ("radius", "angle")]
    for block in part.blocks:
        box = block.of(tensor)
        start, full_shape = block.start, part.full_shape
        if box.ndim == 0:
            box, start, full_shape = box.view(1), (0,), (1,)
        rows = row_numbers(box, start, full_shape)
        columns = torch.arange(start[-1], start[-1] + box.shape[-1], device=box.device)
        u, v = ((drawn(fold(seed, rows), columns).double() + 2.0**31 + 0.5) / 2.0**32 for seed in seeds)
        normal = (-2.0 * u.log()).sqrt_().mul_((2.0 * math.pi * v).cos_())
        box.add_((deviation * normal).to(box.dtype))
