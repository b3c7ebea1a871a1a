"""Cross-entropy over a large vocabulary without an fp32 copy of the logits.

Rows are taken a few at a time, and backward computes their probabilities again. So the memory besides the logits is
their gradient, in their own dtype, and two chunks in fp32. The result does not depend on the chunk: rows are
independent, and their losses are added at once.

Shapes: B rows, S positions, N = B x S, V vocabulary, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_TARGET = -100

CPU_CHUNK = 1 << 21
"""fp32 elements of a chunk, 8 MiB: near the caches, yet so large that threads seldom wait for each other."""
DEVICE_CHUNK = 1 << 26
"""The same elsewhere, 256 MiB: few large kernels."""


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label] over all positions whose label is not -100.

    ``logits`` (B, S, V) or (N, V), any floating dtype; ``labels`` (B, S) or (N,) int64. Returns a scalar, computed in
    fp32 (fp64 for fp64 logits); exactly 0 where no position has a target. Differentiable once in ``logits``, whose
    gradient has their dtype. Raises ``RuntimeError`` for a label outside the vocabulary.
    """
    total: Tensor = _SummedCrossEntropy.apply(logits.flatten(0, -2), labels.flatten())  # type: ignore[no-untyped-call]
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        has_target_N1 = (labels_N != NO_TARGET).unsqueeze(1)
        labels_N1 = labels_N.unsqueeze(1).where(has_target_N1, 0)
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        lse_N1 = torch.empty(labels_N1.shape, dtype=dtype, device=logits_NV.device)
        for rows in _chunks(logits_NV):
            # The greatest probability is 1 / sum(exp(logits - the greatest)). The kernel of softmax is one pass over
            # the chunk; that of logsumexp is five.
            logits_CV = logits_NV[rows].to(dtype)
            greatest_C1 = torch.softmax(logits_CV, dim=1).amax(1, keepdim=True)
            lse_N1[rows] = logits_CV.amax(1, keepdim=True) - greatest_C1.log()
        ctx.save_for_backward(logits_NV, labels_N1, has_target_N1)
        losses_N1 = lse_N1 - logits_NV.gather(1, labels_N1)
        return losses_N1.masked_fill_(~has_target_N1, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None]:
        logits_NV, labels_N1, has_target_N1 = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        minus_one = torch.full((1, 1), -1.0, dtype=dtype, device=logits_NV.device)
        for rows in _chunks(logits_NV):
            grad_CV = torch.softmax(logits_NV[rows].to(dtype), dim=1)
            grad_CV.scatter_add_(1, labels_N1[rows], minus_one.expand(len(grad_CV), 1))
            grad_NV[rows] = grad_CV.mul_(grad_total)
        without = has_target_N1.logical_not().squeeze(1).nonzero().squeeze(1)
        return grad_NV.index_fill_(0, without, 0.0), None


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    elements = CPU_CHUNK if logits_NV.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, elements // logits_NV.shape[1])
    return (slice(begin, begin + rows) for begin in range(0, logits_NV.shape[0], rows))
