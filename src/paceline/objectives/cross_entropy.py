"""Cross-entropy over a large vocabulary without an fp32 copy of the logits.

Rows are taken a few at a time, and backward computes their probabilities again. So the memory besides the logits is
their gradient, in their own dtype, and two chunks in fp32. The result does not depend on the chunk: rows are
independent, and their losses are added at once.

Where the vocabulary is cut over ranks, each has the logits of its own entries, and they stay there. The ranks tell each
other three fp32 numbers a position: the greatest of their logits, the sum of exponentials above it, the target's logit;
with label smoothing a fourth, the sum of their logits.

Shapes: B rows, S positions, N = B x S, V vocabulary (a rank's part of it), C rows of a chunk, R ranks, M
numbers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paceline.objectives.softening import CERTAIN, NO_TARGET, Second, Softening, Targets
from paceline.objectives.vocabulary import VocabularyCut

CPU_CHUNK = 1 << 21
"""fp32 elements of a chunk, 8 MiB: near the caches, yet so large that threads seldom wait for each other."""
DEVICE_CHUNK = 1 << 26
"""The same elsewhere, 256 MiB: few large kernels."""


def summed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    cut: VocabularyCut | None = None,
    softening: Softening = CERTAIN,
    second: Second | None = None,
) -> Tensor:
    """Sum of -log softmax(logits)[label] over all positions whose label is not -100, or of what ``softening`` says.

    ``logits`` (B, S, V) or (N, V), any floating dtype; ``labels`` (B, S) or (N,) int64, ``second`` alike. With ``cut``
    the logits are of this rank's entries and padding, the labels of the whole vocabulary, and all ranks get the same
    sum. Returns a scalar, computed in fp32 (fp64 for fp64 logits); exactly 0 where no position has a target.
    Differentiable once in ``logits``, whose gradient has their dtype. Raises ``RuntimeError`` for a label outside the
    vocabulary.
    """
    targets, has_target_N1 = Targets.of(labels, softening, second), labels.reshape(-1, 1) != NO_TARGET
    total: Tensor = _SummedCrossEntropy.apply(logits.flatten(0, -2), targets, has_target_N1, cut)  # type: ignore[no-untyped-call]
    return total


def plain_cross_entropy(
    logits: Tensor, labels: Tensor, softening: Softening = CERTAIN, second: Second | None = None
) -> Tensor:
    """The same of whole logits, by functions that can be differentiated any number of times: they are all kept."""
    logits_NV = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    targets, has_target_N1 = Targets.of(labels, softening, second), labels.reshape(-1, 1) != NO_TARGET
    level_N1, score_N1 = logits_NV.logsumexp(1, keepdim=True), targets.score(logits_NV)
    mean_N1 = logits_NV.mean(1, keepdim=True) if softening.label_smoothing else None
    losses_N1 = targets.losses(level_N1 - score_N1, score_N1, mean_N1, level_N1 if softening.z_loss else None)
    return losses_N1.where(has_target_N1, 0.0).sum()


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets: Targets, has_target_N1: Tensor, cut: VocabularyCut | None
    ) -> Tensor:
        found = _alone(logits_NV, targets) if cut is None else over_ranks(logits_NV[:, : cut.entries], targets, cut)
        ctx.targets, ctx.cut = targets, cut
        ctx.save_for_backward(logits_NV, has_target_N1, found.greatest_N1, found.sum_N1)
        return found.losses(targets).masked_fill_(~has_target_N1, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, has_target_N1, greatest_N1, sum_N1 = ctx.saved_tensors
        targets, cut = ctx.targets, ctx.cut
        grad_NV = torch.zeros_like(logits_NV) if cut is not None else torch.empty_like(logits_NV)
        logits_NV, own_NV = (logits_NV, grad_NV) if cut is None else (t[:, : cut.entries] for t in (logits_NV, grad_NV))
        level_N1 = greatest_N1 + sum_N1.log() if targets.softening.z_loss else None
        for rows in _chunks(logits_NV) if own_NV.shape[1] else ():
            logits_CV = logits_NV[rows].to(sum_N1.dtype)
            if cut is None:
                softmax_CV = torch.softmax(logits_CV, dim=1)
            else:
                softmax_CV = (logits_CV - greatest_N1[rows]).exp_().div_(sum_N1[rows])
            level_C1 = None if level_N1 is None else level_N1[rows]
            own_NV[rows] = targets.at(rows).gradient(softmax_CV, level_C1, cut).mul_(grad_total)
        without = has_target_N1.logical_not().squeeze(1).nonzero().squeeze(1)
        return grad_NV.index_fill_(0, without, 0.0), None, None, None


class Found(NamedTuple):
    """What a loss is made of, in fp32 or more; of a cut vocabulary equal on all ranks, bit for bit."""

    greatest_N1: Tensor
    """Logit of a position."""
    sum_N1: Tensor
    """Of exponentials above the greatest."""
    score_N1: Tensor
    mean_N1: Tensor | None
    """Of all logits; where it is asked for."""

    def losses(self, targets: Targets) -> Tensor:
        """Of the positions (N, 1)."""
        log_sum_N1 = self.sum_N1.log()
        level_N1 = self.greatest_N1 + log_sum_N1 if targets.softening.z_loss else None
        certain_N1 = self.greatest_N1 - self.score_N1 + log_sum_N1
        return targets.losses(certain_N1, self.score_N1, self.mean_N1, level_N1)


def _alone(logits_NV: Tensor, targets: Targets) -> Found:
    """Of whole logits."""
    greatest_N1, probability_N1 = _greatest(logits_NV)
    mean_N1 = None
    if targets.softening.label_smoothing:
        mean_N1 = logits_NV.sum(1, keepdim=True, dtype=greatest_N1.dtype) / logits_NV.shape[1]
    score_N1 = targets.score(logits_NV).to(greatest_N1.dtype)
    return Found(greatest_N1, probability_N1.reciprocal_(), score_N1, mean_N1)


def over_ranks(logits_NV: Tensor, targets: Targets, cut: VocabularyCut) -> Found:
    """The same, of logits of this rank's entries."""
    in_vocabulary = (targets.labels_NK >= 0) & (targets.labels_NK < cut.vocabulary)
    torch._assert_async(in_vocabulary.all(), "label out of bounds")  # no rank would own it, and its logit would be 0
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    smooths = targets.softening.label_smoothing > 0.0
    own_MN1 = torch.zeros((4 if smooths else 3, len(logits_NV), 1), dtype=dtype, device=logits_NV.device)
    own_MN1[0] = -torch.inf
    if cut.entries:
        own_MN1[0], probability_N1 = _greatest(logits_NV)
        own_MN1[1] = probability_N1.reciprocal_()
        own_MN1[2] = targets.score(logits_NV, cut)
        if smooths:
            own_MN1[3] = logits_NV.sum(1, keepdim=True, dtype=dtype)
    greatest_NR, sum_NR, *sums_NR = cut.axis.all_gather(own_MN1, 2, where="cross_entropy")
    greatest_N1 = greatest_NR.amax(1, keepdim=True)
    sum_N1 = (sum_NR * (greatest_NR - greatest_N1).exp()).sum(1, keepdim=True)
    score_N1, *total_N1 = (part_NR.sum(1, keepdim=True) for part_NR in sums_NR)
    return Found(greatest_N1, sum_N1, score_N1, total_N1[0] / cut.vocabulary if smooths else None)


def _greatest(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each row and its probability (N, 1), in fp32 or more."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    greatest_N1, probability_N1 = torch.empty((2, len(logits_NV), 1), dtype=dtype, device=logits_NV.device)
    for rows in _chunks(logits_NV):
        # The greatest probability is 1 / sum(exp(logits - the greatest)). The kernel of softmax is one pass over
        # the chunk; that of logsumexp is five.
        logits_CV = logits_NV[rows].to(dtype)
        probability_N1[rows] = torch.softmax(logits_CV, dim=1).amax(1, keepdim=True)
        greatest_N1[rows] = logits_CV.amax(1, keepdim=True)
    return greatest_N1, probability_N1


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    elements = CPU_CHUNK if logits_NV.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, elements // logits_NV.shape[1])
    return (slice(begin, begin + rows) for begin in range(0, logits_NV.shape[0], rows))
