"""Embedding mixup: a sequence is learned together with a share of another one (Guo et al. 2019, arXiv 1905.08941,
"wordMixup", for labels that are one a position, as in Guo, Kim and Rush 2020, SeqMix, arXiv 2011.09039).

    embedding = w embedding(token) + (1 - w) embedding(token of the other)
    loss      = w loss(label) + (1 - w) loss(label of the other)

w is drawn from Beta(alpha, alpha) by (seed, step, sequence). The unit is the batch of the step: which sequence is mixed
in follows from the seed and the step's sequences (``data.loader``), and every rank reads it from the data itself. So no
layout and no micro-batch cuts the unit. Positions where the other sequence has ended are left as they are, and where
the first has no target there is none.

Shapes: B rows, S positions, P positions of this rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.data.rows import Row
from paceline.objectives.random import row_generator
from paceline.objectives.softening import NO_TARGET, Second

SHARES = 1 << 16
"""A share is a multiple of 1 over this, so that what is left for the other sequence is exact in fp32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """What is mixed into a micro-batch."""

    ids: Tensor
    """(B, S) int64: the tokens of the other sequences."""
    labels: Tensor
    """(B, S) int64: what these predict."""
    shares: Tensor
    """(B, S) fp32: of the first sequence, 1 where nothing is mixed in."""

    @classmethod
    def of(cls, rows: Sequence[Row], positions: int, alpha: float, *, seed: int, step: int) -> "Mixed":
        """The partners of rows of at most ``positions`` inputs, each predicting the token that follows."""
        ids, labels = np.zeros((2, len(rows), positions), np.int64)
        shares = np.ones((len(rows), positions), np.float32)
        for i, row in enumerate(rows):
            assert row.partner is not None, "the loader gives every row another one of its step"
            length = min(len(row.partner) - 1, positions)
            ids[i, :length], labels[i, :length] = row.partner[:length], row.partner[1 : length + 1]
            drawn = row_generator(seed, step, row.sequence).beta(alpha, alpha)
            shares[i, :length] = round(drawn * SHARES) / SHARES
        return cls(ids=torch.from_numpy(ids), labels=torch.from_numpy(labels), shares=torch.from_numpy(shares))

    @property
    def second(self) -> Second:
        """As the loss takes it."""
        return Second(labels=self.labels, shares=self.shares)

    def at(self, places_P: Tensor) -> "Mixed":
        """Of some positions."""
        return replace(
            self,
            ids=self.ids[:, places_P],
            labels=self.labels[:, places_P],
            shares=self.shares[:, places_P],
        )

    def padded(self, positions: int) -> "Mixed":
        """With so many positions at least, nothing mixed into the last ones: sequence parallelism adds some."""
        fill = (0, max(0, positions - self.ids.shape[1]))
        return Mixed(
            ids=F.pad(self.ids, fill),
            labels=F.pad(self.labels, fill, value=NO_TARGET),
            shares=F.pad(self.shares, fill, value=1.0),
        )

    def to(self, device: torch.device) -> "Mixed":
        """The same on ``device``."""
        return replace(self, ids=self.ids.to(device), labels=self.labels.to(device), shares=self.shares.to(device))


@contextmanager
def mixing(model: nn.Module, mixed: Mixed | None) -> Iterator[None]:
    """While it lasts the input embedding of ``model`` mixes in another sequence, at each call; None for nothing."""
    if mixed is None:
        yield
        return
    embedding = input_embedding(model)
    assert embedding is not None, "checked before training"
    own = vars(embedding).get("forward")
    embedding.forward = _Mixing(embedding.forward, mixed)
    try:
        yield
    finally:
        del embedding.forward
        if own is not None:
            embedding.forward = own


class _Mixing:
    """The forward of an embedding that is called with the ids of a micro-batch."""

    def __init__(self, forward: Any, mixed: Mixed) -> None:
        self._forward, self._mixed = forward, mixed

    def __call__(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mixed = self._mixed.padded(ids.shape[1])
        first, second = (self._forward(of, *args, **kwargs) for of in (ids, mixed.ids))
        return torch.lerp(second, first, mixed.shares.unsqueeze(-1).to(first.dtype))


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that a model says its ids go into; None if it does not say."""
    named: Any = model
    embedding = named.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embedding if isinstance(embedding, nn.Module) else None
