"""Cross-entropy over a large vocabulary without an fp32 copy of the logits.

Rows are taken a few at a time, and backward computes their probabilities again. So the memory besides the logits is
their gradient, in their own dtype, and two chunks in fp32. The result does not depend on the chunk: rows are
independent, and their losses are added at once.

Where the vocabulary is cut over ranks, each has the logits of its own entries, and they stay there. The ranks tell each
other three fp32 numbers a position: the greatest of their logits, the sum of exponentials above it, the target's logit.

Shapes: B rows, S positions, N = B x S, V vocabulary (a rank's part of it), C rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paceline.objectives.vocabulary import VocabularyCut

NO_TARGET = -100

CPU_CHUNK = 1 << 21
"""fp32 elements of a chunk, 8 MiB: near the caches, yet so large that threads seldom wait for each other."""
DEVICE_CHUNK = 1 << 26
"""The same elsewhere, 256 MiB: few large kernels."""


def summed_cross_entropy(logits: Tensor, labels: Tensor, cut: VocabularyCut | None = None) -> Tensor:
    """Sum of -log softmax(logits)[label] over all positions whose label is not -100.

    ``logits`` (B, S, V) or (N, V), any floating dtype; ``labels`` (B, S) or (N,) int64. With ``cut`` the logits are of
    this rank's entries and padding, the labels of the whole vocabulary, and all ranks get the same sum. Returns a
    scalar, computed in fp32 (fp64 for fp64 logits); exactly 0 where no position has a target. Differentiable once in
    ``logits``, whose gradient has their dtype. Raises ``RuntimeError`` for a label outside the vocabulary.
    """
    total: Tensor = _SummedCrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), cut)  # type: ignore[no-untyped-call]
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, cut: VocabularyCut | None) -> Tensor:
        has_target_N1 = (labels_N != NO_TARGET).unsqueeze(1)
        labels_N1 = labels_N.unsqueeze(1).where(has_target_N1, 0)
        ctx.cut = cut
        if cut is None:
            ctx.save_for_backward(logits_NV, labels_N1, has_target_N1)
            greatest_N1, probability_N1 = _greatest(logits_NV)
            losses_N1 = greatest_N1 - probability_N1.log() - logits_NV.gather(1, labels_N1)
        else:
            greatest_N1, sum_N1, target_N1 = over_ranks(logits_NV[:, : cut.entries], labels_N1, cut)
            ctx.save_for_backward(logits_NV, labels_N1, has_target_N1, greatest_N1, sum_N1)
            losses_N1 = greatest_N1 - target_N1 + sum_N1.log()
        return losses_N1.masked_fill_(~has_target_N1, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N1, has_target_N1, *of_all_ranks = ctx.saved_tensors
        if ctx.cut is None:
            grad_NV = _gradient(logits_NV, labels_N1, grad_total)
        else:
            greatest_N1, sum_N1 = of_all_ranks
            grad_NV = _own_gradient(logits_NV, labels_N1, greatest_N1, sum_N1, grad_total, ctx.cut)
        without = has_target_N1.logical_not().squeeze(1).nonzero().squeeze(1)
        return grad_NV.index_fill_(0, without, 0.0), None, None


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


def _gradient(logits_NV: Tensor, labels_N1: Tensor, grad_total: Tensor) -> Tensor:
    grad_NV = torch.empty_like(logits_NV)
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    minus_one = torch.full((1, 1), -1.0, dtype=dtype, device=logits_NV.device)
    for rows in _chunks(logits_NV):
        grad_CV = torch.softmax(logits_NV[rows].to(dtype), dim=1)
        grad_CV.scatter_add_(1, labels_N1[rows], minus_one.expand(len(grad_CV), 1))
        grad_NV[rows] = grad_CV.mul_(grad_total)
    return grad_NV


def over_ranks(logits_NV: Tensor, labels_N1: Tensor, cut: VocabularyCut) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest logit of all ranks, the sum of exponentials above it, and the target's logit, all (N, 1).

    They are equal on all ranks, bit for bit.
    """
    in_vocabulary = (labels_N1 >= 0) & (labels_N1 < cut.vocabulary)
    torch._assert_async(in_vocabulary.all(), "label out of bounds")  # no rank would own it, and its logit would be 0
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    own_3N1 = torch.zeros((3, len(logits_NV), 1), dtype=dtype, device=logits_NV.device)
    own_3N1[0] = -torch.inf
    if cut.entries:
        columns_N1, is_own_N1 = own_columns(labels_N1, cut)
        own_3N1[0], probability_N1 = _greatest(logits_NV)
        own_3N1[1] = probability_N1.reciprocal()
        own_3N1[2] = logits_NV.gather(1, columns_N1).where(is_own_N1, 0.0)
    greatest_NR, sum_NR, target_NR = cut.axis.all_gather(own_3N1, 2, where="cross_entropy")
    greatest_N1 = greatest_NR.amax(1, keepdim=True)
    sum_N1 = (sum_NR * (greatest_NR - greatest_N1).exp()).sum(1, keepdim=True)
    return greatest_N1, sum_N1, target_NR.sum(1, keepdim=True)


def _own_gradient(
    logits_NV: Tensor, labels_N1: Tensor, greatest_N1: Tensor, sum_N1: Tensor, grad_total: Tensor, cut: VocabularyCut
) -> Tensor:
    grad_NV = torch.zeros_like(logits_NV)
    logits_NV, own_NV = logits_NV[:, : cut.entries], grad_NV[:, : cut.entries]
    columns_N1, is_own_N1 = own_columns(labels_N1, cut)
    for rows in _chunks(logits_NV) if cut.entries else ():
        grad_CV = (logits_NV[rows].to(sum_N1.dtype) - greatest_N1[rows]).exp_().div_(sum_N1[rows])
        grad_CV.scatter_add_(1, columns_N1[rows], -is_own_N1[rows].to(sum_N1.dtype))
        own_NV[rows] = grad_CV.mul_(grad_total)
    return grad_NV


def own_columns(labels_N1: Tensor, cut: VocabularyCut) -> tuple[Tensor, Tensor]:
    """The labels as columns of this rank, 0 for those of other ranks, and which are its own."""
    columns_N1 = labels_N1 - cut.start
    is_own_N1 = (columns_N1 >= 0) & (columns_N1 < cut.entries)
    return columns_N1.where(is_own_N1, 0), is_own_N1


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    elements = CPU_CHUNK if logits_NV.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, elements // logits_NV.shape[1])
    return (slice(begin, begin + rows) for begin in range(0, logits_NV.shape[0], rows))
