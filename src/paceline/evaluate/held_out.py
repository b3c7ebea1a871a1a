"""Loss and bits per byte on text that was held out of training."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from paceline.data.rows import Row
from paceline.data.tokens import TokenSet
from paceline.objectives.base import Batch
from paceline.schedule.base import Schedule

Sample = dict[str, str | bool]
"""``prompt``, the ``text`` the model made of it, and whether it wrote ``backward``: the text then comes first."""
Sampler = Callable[[], tuple[Sample, ...]]
Total = Callable[[tuple[float, ...]], list[float]]
"""Sums over all ranks of all replicas."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on the held-out part after a step."""

    step: int
    loss: float
    """Mean loss per target (nats)."""
    bits_per_byte: float | None
    """Bits per UTF-8 byte of text; None where the objective does not give the text a probability."""
    targets: int
    time: float
    samples: tuple[Sample, ...] = ()
    averaged: bool = False
    """Of the average of the weights, not of those that are trained."""

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Measures a model on this rank's share of the held-out rows; the sums run over all ranks."""

    model: nn.Module
    batch_of: Callable[[Sequence[Row]], Batch]
    """This rank's part of the micro-batch that some rows make."""
    schedule: Schedule
    rows: Callable[[], Iterator[Row]]
    """This rank's rows, from the start; as many on every rank, filled up with rows of zero weight."""
    micro: int
    tokens_per_byte: float | None
    """Tokens of the held-out text over its UTF-8 bytes; None where bits per byte mean nothing."""
    sampler: Sampler
    """Continues the prompts; only that of the first replica's ranks yields any."""

    def measure(self, step: int, total: Total) -> Evaluation:
        """Loss and bits per byte after ``step``; called on all ranks together."""
        self.model.eval()
        try:
            own = self._sums()
            samples = self.sampler()
        finally:
            self.model.train()
        loss_sum, targets = total(own)
        loss = loss_sum / targets if targets else math.nan
        bits = None if self.tokens_per_byte is None else loss * self.tokens_per_byte / math.log(2)
        return Evaluation(
            step=step, loss=loss, bits_per_byte=bits, targets=int(targets), time=time.time(), samples=samples
        )

    @torch.no_grad()
    def _sums(self) -> tuple[float, float]:
        loss, targets = 0.0, 0
        own = self.rows()
        while rows := list(islice(own, self.micro)):
            batch = self.batch_of(rows)
            loss += self.schedule.evaluate(batch)
            targets += batch.count
        return loss, float(targets)


def tokens_per_byte(sets: Sequence[TokenSet]) -> float | None:
    """Tokens (end-of-text included: knowing where a text ends costs bits too) over UTF-8 bytes; None without text."""
    n_bytes = sum(part.n_bytes for part in sets)
    return sum(len(part.tokens) for part in sets) / n_bytes if n_bytes else None
