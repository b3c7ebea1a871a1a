"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

fp16 has nothing between 0 and 2^-24, where many gradients are, and nothing above 65504. So the loss is multiplied
before the backward pass, and what comes of it divided in fp32 after. If a gradient overflows on any rank, no rank takes
the step, and the scale falls by half; after many steps without it doubles. That is among the replicas that share their
gradients: one that learns alone decides alone, and has a scale of its own.

A scale is a power of two, so that it rounds nothing: while nothing leaves the range, the steps do not depend on it.
"""

import torch
from torch import Tensor

from paceline.config import LossScaleConfig

MOST = 2.0**24
"""A model without gradients would let the scale grow for ever."""


class LossScale:
    """By what the loss is multiplied in the next step, the same on all ranks that share gradients.

    ``options`` None: by 1, in all steps.
    """

    def __init__(self, options: LossScaleConfig | None = None) -> None:
        self._options = options
        self.value = options.initial if options else 1.0
        self.good_steps = 0
        """Steps since it last changed."""
        self.skipped_steps = 0
        """Steps of the run that were not taken because a gradient overflowed."""

    @property
    def is_dynamic(self) -> bool:
        """Whether it follows from what overflowed so far, and so is part of a run's state."""
        return self._options is not None

    def after(self, stepped: bool) -> bool:
        """Take note of whether the step was taken; returns whether one that was not is to be skipped, at a lower scale.

        If not it is an error: nothing is scaled, or the scale is at its least.
        """
        if self._options is None:
            return False
        if not stepped and self.value <= self._options.least:
            return False
        self.good_steps += 1
        if not stepped:
            self.value, self.good_steps = self.value / 2, 0
            self.skipped_steps += 1
        elif self.good_steps == self._options.growth_steps:
            self.value, self.good_steps = min(2 * self.value, max(MOST, self.value)), 0
        return not stepped

    def state(self) -> Tensor:
        """What a checkpoint keeps: the value, the good steps and the skipped ones, fp64."""
        return torch.tensor([self.value, self.good_steps, self.skipped_steps], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what ``state`` gave."""
        self.value, good_steps, skipped_steps = state.flatten().tolist()
        self.good_steps, self.skipped_steps = int(good_steps), int(skipped_steps)
