"""What pulls at matrices besides the loss; norms, biases and other vectors are left alone.

Gradients that come from a penalty are added after clipping, as an optimizer's own decay is: they are not noise.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from paceline.comm.replica import Shard, local_part
from paceline.train.update import Adjustment, Update


def matrices(update: Update) -> list[Shard]:
    """The shards of matrices, and of stacks of them."""
    return [shard for shard in update.shards if shard.parameter.ndim >= 2]


class L2(Adjustment):
    """A penalty of half the squared norm, ``strength`` times, as part of the loss: gradient += strength x weight.

    An adaptive optimizer divides it by the size of the gradients; what AdamW calls ``weight_decay`` is not.
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def before(self, update: Update) -> None:
        """See ``Adjustment``."""
        for shard in matrices(update):
            if (gradient := shard.gradient) is not None:
                gradient.add_(shard.local, alpha=self._strength)


class MomentumPenalty(Adjustment):
    """A penalty of half the squared length of the last update, ``strength`` times, as part of the loss:

        gradient += strength x (weight - weight before the last update)

    It pulls back along the last update, and so damps what momentum carries on: for SGD at a constant rate it is
    exactly a momentum that is smaller by rate x strength. (A proximal term as in Li et al. 2018, FedProx, arXiv
    1812.06127, equation 2, about the weights before the last update in place of a server's.) Keeps these weights.
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength
        self._before: dict[str, Tensor] = {}

    def start(self, update: Update) -> None:
        """See ``Adjustment``: there was no update yet."""
        self._before = {shard.name: shard.parameter.detach().clone() for shard in matrices(update)}

    def before(self, update: Update) -> None:
        """See ``Adjustment``."""
        for shard in matrices(update):
            now, before = shard.local, local_part(self._before[shard.name])
            if (gradient := shard.gradient) is not None:
                gradient.add_(now - before, alpha=self._strength)
            before.copy_(now)

    def state(self) -> Mapping[str, Tensor]:
        """See ``Adjustment``."""
        return self._before


class L1(Adjustment):
    """A penalty of the sum of absolute values, ``strength`` times, by its proximal step after the optimizer's: every
    weight goes toward 0 by rate x strength, and what would pass 0 is exactly 0.

    (Soft thresholding, as in ISTA: Beck & Teboulle 2009, "A fast iterative shrinkage-thresholding algorithm", section
    2. A subgradient added to the gradient would swing about 0 and never reach it.)
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def after(self, update: Update) -> None:
        """See ``Adjustment``; a parameter without a gradient was not updated, and stays."""
        for shard in matrices(update):
            if shard.gradient is not None:
                weight = shard.local
                weight.copy_(torch.nn.functional.softshrink(weight, update.rates[shard.name] * self._strength))
