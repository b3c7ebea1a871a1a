"""Some values of each block, the same places on all members, so that no place is sent (Stich et al. 2018, arXiv
1809.07599, random-k; Konecny et al. 2016, arXiv 1610.05492, section 3, random mask).

Places follow from the seed, the step and the block. Without error feedback what is sent is multiplied by the inverse of
the share, which makes the mean right; with it, it is sent as it is.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from paceline.config import Options, Share
from paceline.models.chance import drawn
from paceline.parallel.dealt import blocks_of
from paceline.plan.wire import all_reduce_bytes, all_reduce_delays
from paceline.sync.base import Shapes, SyncContext
from paceline.sync.reducers.blocks import BlockReducer
from paceline.sync.reducers.topk import BLOCK, taken


class RandomK(Options):
    """Send some values of each 4096, chosen by chance."""

    share: Share = 0.05
    """Of the values of a block, rounded up."""
    error_feedback: bool = True
    """Keep what is not sent and add it the next time; without it what is sent is made larger instead."""

    is_exact: ClassVar[bool] = False
    ns_per_value: ClassVar[float] = 31
    source: ClassVar[str] = "Stich et al. 2018, arXiv 1809.07599"

    def wire_bytes(self, shapes: Shapes, members: int) -> int:
        """The values once round a ring."""
        blocks = sum(blocks_of(shape, BLOCK) for shape in shapes.values())
        return all_reduce_bytes(4 * blocks * taken(self.share), members)

    def delays(self, shapes: Shapes, members: int) -> int:
        """Of one sum."""
        blocks = sum(blocks_of(shape, BLOCK) for shape in shapes.values())
        return all_reduce_delays(4 * blocks * taken(self.share), members)

    def late_delays(self, shapes: Shapes, members: int) -> int:
        """None: it is one exchange."""
        return 0

    def state_bytes(self, shapes: Shapes) -> int:
        """The residual, that of before until the sum is used, and what is needed while it is made: 20 bytes a value."""
        values = sum(4 * math.prod(shape) for shape in shapes.values())
        blocks = sum(blocks_of(shape, BLOCK) for shape in shapes.values())
        return 2 * values * self.error_feedback + blocks * (20 * BLOCK + 4 * taken(self.share))

    def build(self, context: SyncContext) -> "RandomKReducer":
        """The reducer at work."""
        return RandomKReducer(context, taken(self.share), error_feedback=self.error_feedback)


class RandomKReducer(BlockReducer):
    """Sums of values at places drawn alike, over a link."""

    def __init__(self, context: SyncContext, number: int, *, error_feedback: bool) -> None:
        super().__init__(context, BLOCK, error_feedback=error_feedback)
        self._number = number

    def start_exchange(self, blocks: Tensor, step: int) -> Callable[[], Tensor]:
        """See ``BlockReducer``."""
        places = self._places(step)
        sent = blocks.gather(1, places)
        if not self.error_feedback:
            sent *= BLOCK / self._number
        # What is not finite must be seen by all, also where it is not taken.
        sent[~blocks.isfinite().all(1)] = torch.nan
        blocks.scatter_(1, places, 0.0)
        pending = self.link.all_reduce(sent)

        def arrive() -> Tensor:
            pending.wait()
            return torch.zeros_like(blocks).scatter_(1, places, sent)

        return arrive

    def _places(self, step: int) -> Tensor:
        """Drawn for each block, without one twice: int64 (N, number)."""
        columns = torch.arange(BLOCK, device=self.device)
        order = drawn(self.keys(step, "places"), columns).long() * BLOCK + columns
        return order.topk(self._number, dim=1, sorted=False).indices
