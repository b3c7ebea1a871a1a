"""What a position is to predict besides one label with certainty: label smoothing, z-loss, and two labels at once.

With z the V logits of a position, L = log(sum(exp(z))), and shares w of labels y that sum to 1, the loss is

    (1 - e) (L - score) + e (L - mean(z)) + c L^2  =  (L - score) + e (score - mean(z)) + c L^2,    score = sum w z[y]

and its gradient is softmax(z) (1 + 2 c L) - e / V - (1 - e) w at each label. It is a sum over positions, like all
losses here. e: ``label_smoothing`` (Szegedy et al. 2016, arXiv 1512.00567, section 7); c: ``z_loss`` (Chowdhery et al.
2022, PaLM, arXiv 2204.02311, section 5); two labels: ``mixup`` (``objectives.mixup``).

Shapes: N positions, C of a chunk, K labels of a position, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from paceline.objectives.vocabulary import VocabularyCut

NO_TARGET = -100


@dataclass(frozen=True, kw_only=True)
class Softening:
    """What an objective's config says of the loss of a target."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


CERTAIN = Softening()
"""The label, and nothing else."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Second:
    """Another label of each position, beside the first."""

    labels: Tensor
    """(B, S) int64; -100 where there is none, and the first has all of the share."""
    shares: Tensor
    """(B, 1) or (B, S) fp32: of the first label."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What positions are to predict. Of a cut vocabulary every rank has the same."""

    labels_NK: Tensor
    """int64, of the whole vocabulary; anything from 0 on where there is no target."""
    shares_NK: Tensor | None
    """Of the labels of a position, which sum to 1; None for one label."""
    softening: Softening

    @classmethod
    def of(cls, labels: Tensor, softening: Softening, second: Second | None) -> Self:
        """Of all positions; ``labels`` (B, S) or (N,), -100 where there is no target."""
        firsts_N = labels.flatten().masked_fill(labels.flatten() == NO_TARGET, 0)
        if second is None:
            return cls(labels_NK=firsts_N.unsqueeze(1), shares_NK=None, softening=softening)
        has_second_N = second.labels.flatten() != NO_TARGET
        seconds_N = second.labels.flatten().where(has_second_N, firsts_N)
        shares_N = second.shares.expand(labels.shape).flatten().where(has_second_N, 1.0)
        return cls(
            labels_NK=torch.stack([firsts_N, seconds_N], 1),
            shares_NK=torch.stack([shares_N, 1.0 - shares_N], 1),
            softening=softening,
        )

    def at(self, rows: slice | Tensor) -> "Targets":
        """Of some positions."""
        shares_NK = None if self.shares_NK is None else self.shares_NK[rows]
        return replace(self, labels_NK=self.labels_NK[rows], shares_NK=shares_NK)

    def score(self, values_NV: Tensor, cut: VocabularyCut | None = None) -> Tensor:
        """The sum of the labels' values by their shares (N, 1), in the dtype of the values; with ``cut`` this rank's
        part of it."""
        columns_NK, is_own_NK = own_columns(self.labels_NK, cut)
        found_NK = values_NV.gather(1, columns_NK)
        if is_own_NK is not None:
            found_NK = found_NK.where(is_own_NK, 0.0)
        return found_NK if self.shares_NK is None else (found_NK * self.shares_NK).sum(1, keepdim=True)

    def losses(self, losses_N1: Tensor, score_N1: Tensor, mean_N1: Tensor | None, level_N1: Tensor | None) -> Tensor:
        """From L - score, score, the mean of the logits and L: the losses (N, 1). The third and the fourth are looked
        at by what asks for them alone; second and third may have another zero than the logits."""
        if mean_N1 is not None:
            losses_N1 = losses_N1 + self.softening.label_smoothing * (score_N1 - mean_N1)
        if level_N1 is not None:
            losses_N1 = losses_N1 + self.softening.z_loss * level_N1.square()
        return losses_N1

    def gradient(self, softmax_NV: Tensor, level_N1: Tensor | None, cut: VocabularyCut | None = None) -> Tensor:
        """The gradient in the logits, put in the place of their softmax; with ``cut`` in those of this rank's."""
        smoothing = self.softening.label_smoothing
        if level_N1 is not None:
            softmax_NV.mul_(1.0 + 2.0 * self.softening.z_loss * level_N1)
        if smoothing:
            softmax_NV.sub_(smoothing / (softmax_NV.shape[1] if cut is None else cut.vocabulary))
        columns_NK, is_own_NK = own_columns(self.labels_NK, cut)
        taken_NK = torch.full_like(columns_NK, smoothing - 1.0, dtype=softmax_NV.dtype)
        if self.shares_NK is not None:
            taken_NK.mul_(self.shares_NK)
        if is_own_NK is not None:
            taken_NK.mul_(is_own_NK)
        return softmax_NV.scatter_add_(1, columns_NK, taken_NK)


def own_columns(labels_NK: Tensor, cut: VocabularyCut | None) -> tuple[Tensor, Tensor | None]:
    """The labels as columns of this rank, 0 for those of other ranks, and which are its own; None for all."""
    if cut is None:
        return labels_NK, None
    columns_NK = labels_NK - cut.start
    is_own_NK = (columns_NK >= 0) & (columns_NK < cut.entries)
    return columns_NK.where(is_own_NK, 0), is_own_NK
