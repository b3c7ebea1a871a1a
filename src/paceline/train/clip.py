"""Clipping: gradients that are too large are made smaller before the optimizer sees them."""

from collections.abc import Sequence

import torch

from paceline.train.update import Adjustment, Update


class ClipValue(Adjustment):
    """Hold every value of the gradient within plus and minus ``most``."""

    def __init__(self, most: float) -> None:
        self._most = most

    def before(self, update: Update) -> None:
        """See ``Adjustment``."""
        if found := [gradient for _, _, gradient in update.gradients()]:
            torch._foreach_clamp_min_(found, -self._most)
            torch._foreach_clamp_max_(found, self._most)
        update.changed()


class ClipBlocks(Adjustment):
    """Scale the gradients of each block to a global norm of ``most``, where theirs is greater; so those outside of all
    blocks, together.

    ``blocks`` are the names of the whole model's blocks. No message is sent but the one that measures all of them.
    """

    def __init__(self, most: float, blocks: Sequence[str]) -> None:
        self._most, self._blocks = most, blocks

    def start(self, update: Update) -> None:
        """See ``Adjustment``."""
        numbers = {block: i for i, block in enumerate(self._blocks)}
        groups = [numbers.get(_block_of(shard.name, numbers), len(numbers)) for shard in update.shards]
        update.group(groups, len(numbers) + 1)

    def before(self, update: Update) -> None:
        """See ``Adjustment``."""
        update.scale_groups([_factor(norm, self._most) for norm in update.norms()])


class ClipNorm(Adjustment):
    """Scale all gradients so that their global norm is ``most``, where it is greater."""

    def __init__(self, most: float) -> None:
        self._most = most

    def before(self, update: Update) -> None:
        """See ``Adjustment``."""
        update.scale(_factor(update.norm(), self._most))


def _block_of(name: str, blocks: dict[str, int]) -> str:
    """The block that a parameter is in; its own name if it is in none."""
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name


def _factor(norm: float, most: float) -> float:
    return most / norm if norm > most else 1.0
