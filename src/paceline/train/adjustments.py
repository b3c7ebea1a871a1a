"""Which adjustments of updates a config asks for, in the order in which they are made."""

from collections.abc import Iterator, Sequence

from paceline.config import Config
from paceline.train.clip import ClipBlocks, ClipNorm, ClipValue
from paceline.train.max_norm import MaxNorm
from paceline.train.penalties import L1, L2, MomentumPenalty
from paceline.train.update import Adjustment


def adjustments(config: Config, blocks: Sequence[str]) -> tuple[Adjustment, ...]:
    """Clipping by value, by block, of the whole, then penalties; after the step sparsity, then the bound of rows."""
    return tuple(_asked(config, blocks))


def _asked(config: Config, blocks: Sequence[str]) -> Iterator[Adjustment]:
    train, regularisation = config.train, config.regularisation
    if train.clip_value is not None:
        yield ClipValue(train.clip_value)
    if train.clip_block_norm is not None:
        yield ClipBlocks(train.clip_block_norm, blocks)
    clips = any(sync.clips for sync in config.syncs) and config.all_replicas > 1
    if train.clip_norm is not None and not clips:  # else it is the norm of a sum that is clipped, by who has the sum
        yield ClipNorm(train.clip_norm)
    if regularisation.l2:
        yield L2(regularisation.l2)
    if regularisation.momentum:
        yield MomentumPenalty(regularisation.momentum)
    if regularisation.l1:
        yield L1(regularisation.l1)
    if regularisation.max_norm is not None:
        yield MaxNorm(regularisation.max_norm)
