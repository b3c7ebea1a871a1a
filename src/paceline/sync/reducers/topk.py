"""The greatest values of each block, with their places (Aji and Heafield 2017, arXiv 1704.05021; error feedback: Stich
et al. 2018, arXiv 1809.07599).

A block is 4096 values, as in SparseLoCo, so that a place takes 12 bits. Of equal values the first are taken. Every
member's values go to all, so bytes grow with the members: beyond 8 / (share times 5.5 bytes) of them a plain sum sends
less.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from paceline.config import Options, Share
from paceline.parallel.dealt import blocks_of
from paceline.plan.wire import all_gather_bytes, all_gather_delays
from paceline.sync.base import Shapes, SyncContext
from paceline.sync.reducers.blocks import BlockReducer
from paceline.sync.reducers.packing import as_bytes, from_bytes, packed_12, unpacked_12

BLOCK = 4096


class TopK(Options):
    """Send the greatest values of each 4096, with their places."""

    share: Share = 0.01
    """Of the values of a block, rounded up."""
    decay: Share = 1.0
    """What is left of the residual each time; SparseLoCo has 0.95."""
    error_feedback: bool = True
    """Keep what is not sent and add it the next time."""

    is_exact: ClassVar[bool] = False
    ns_per_value: ClassVar[float] = 23
    source: ClassVar[str] = "Aji and Heafield 2017, arXiv 1704.05021; Stich et al. 2018, arXiv 1809.07599"

    def wire_bytes(self, shapes: Shapes, members: int) -> int:
        """Values and places of one member to all others."""
        return all_gather_bytes(_blocks(shapes) * row_bytes(taken(self.share), 4), members)

    def delays(self, shapes: Shapes, members: int) -> int:
        """Of one gathering."""
        return all_gather_delays(members)

    def late_delays(self, shapes: Shapes, members: int) -> int:
        """None: it is one exchange."""
        return 0

    def state_bytes(self, shapes: Shapes) -> int:
        """The residual, that of before until the sum is used, and what is needed while it is made: 20 bytes a value."""
        values = sum(4 * math.prod(shape) for shape in shapes.values())
        return 2 * values * self.error_feedback + _blocks(shapes) * (20 * BLOCK + row_bytes(taken(self.share), 4))

    def build(self, context: SyncContext) -> "TopKReducer":
        """The reducer at work."""
        return TopKReducer(context, self)


class TopKReducer(BlockReducer):
    """Sums of the greatest values over a link."""

    def __init__(self, context: SyncContext, options: TopK) -> None:
        super().__init__(context, BLOCK, error_feedback=options.error_feedback, decay=options.decay)
        self._number = taken(options.share)

    def start_exchange(self, blocks: Tensor, step: int) -> Callable[[], Tensor]:
        """See ``BlockReducer``."""
        places = greatest(blocks, self._number)
        rows = torch.cat([as_bytes(blocks.gather(1, places)), packed_12(places)], 1)
        blocks.scatter_(1, places, 0.0)
        gathered = rows.new_empty(self.link.size, *rows.shape)
        pending = self.link.all_gather(gathered, rows)
        value_bytes = self._number * blocks.element_size()

        def arrive() -> Tensor:
            pending.wait()
            sums = torch.zeros_like(blocks)
            for told in gathered:
                at = unpacked_12(told[:, value_bytes:], self._number)
                sums.scatter_add_(1, at, from_bytes(told[:, :value_bytes], blocks.dtype))
            return sums

        return arrive


def greatest(blocks: Tensor, number: int) -> Tensor:
    """Places of the values of greatest magnitude in each row, the first of equal ones: int64 (N, number).

    Magnitudes are compared in fp32, and what is no number is greater than all.
    """
    size = blocks.shape[1]
    magnitudes = torch.empty_like(blocks, dtype=torch.float32).copy_(blocks).abs_()
    order = magnitudes.view(torch.int32).long() * size  # the bits of what is not negative are in order
    order += torch.arange(size - 1, -1, -1, device=blocks.device)
    return order.topk(number, dim=1, sorted=False).indices


def taken(share: float) -> int:
    """Values of a block."""
    return max(1, math.ceil(share * BLOCK))


def row_bytes(number: int, value_bytes: int) -> int:
    """Of a block: values, and places of 12 bits."""
    return number * value_bytes + 3 * -(-number // 2)


def _blocks(shapes: Shapes) -> int:
    return sum(blocks_of(shape, BLOCK) for shape in shapes.values())
