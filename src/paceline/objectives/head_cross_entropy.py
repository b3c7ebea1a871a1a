"""Cross-entropy of the logits of a linear head, a few rows of which are there at a time.

The forward pass takes rows in chunks and is done with each at once: logits, losses, and what the loss adds to the
gradients of hidden states and head, for the gradient of a sum is known before the backward pass, up to its factor
(Liger kernel, arXiv 2410.10989, section 3.2). So no product is computed twice, and what waits for the backward pass is
two tensors as large as the hidden states and the weight. Positions without a target are left out from the start.

Shapes: B rows, S positions, N = B x S, T positions with a target, C of a chunk, D width, V vocabulary (a rank's part).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paceline.objectives.cross_entropy import over_ranks
from paceline.objectives.fused_cross_entropy import fused_cross_entropy
from paceline.objectives.softening import CERTAIN, NO_TARGET, Second, Softening, Targets
from paceline.objectives.vocabulary import VocabularyCut

CPU_CHUNK = 1 << 22
"""Logits of a chunk: 16 MiB in fp32. Few enough to be no matter, many enough for products at full speed."""
DEVICE_CHUNK = 1 << 26
"""The same elsewhere, 256 MiB: few large kernels."""
LEAST_ROWS = 128
"""Of a chunk, for wide vocabularies: each chunk reads and writes the whole gradient of the weight."""


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cut: VocabularyCut | None = None,
    softening: Softening = CERTAIN,
    second: Second | None = None,
    *,
    scale: float = 1.0,
    fused: bool = False,
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T + bias)[label] over all positions whose label is not -100, or of what
    ``softening`` says.

    ``hidden`` (B, S, D) or (N, D), ``weight`` (V, D) and ``bias`` (V,) of one floating dtype, in which the logits are;
    ``labels`` (B, S) or (N,) int64, ``second`` alike. With ``cut`` the head has this rank's entries and padding, labels
    are of the whole vocabulary, and all ranks get the same sum, though of the gradient of ``hidden`` each has its part.
    ``scale``: what the sum's own gradient is expected to be, with which gradients in fp16 are held until it comes.
    ``fused``: by one kernel where the vocabulary is not cut and a position has one label, of a model that
    ``fuses_loss``. Returns a scalar, computed in fp32 (fp64 for fp64); exactly 0 where no position has a target.
    Differentiable once. Raises ``IndexError`` or ``RuntimeError`` for a label outside the vocabulary.
    """
    places_T = (labels.flatten() != NO_TARGET).nonzero().squeeze(1)
    targets, learns = Targets.of(labels, softening, second).at(places_T), torch.is_grad_enabled()
    given = hidden.flatten(0, -2), weight, bias, places_T, targets
    ahead = scale if hidden.dtype is torch.float16 else 1.0
    fused = fused and cut is None and softening == CERTAIN and second is None
    total: Tensor = _HeadCrossEntropy.apply(*given, cut, learns, ahead, fused)  # type: ignore[no-untyped-call]
    return total


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        places_T: Tensor,
        targets: Targets,
        cut: VocabularyCut | None,
        learns: bool,
        scale: float,
        fused: bool,
    ) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        losses_T1 = torch.empty((len(places_T), 1), dtype=dtype, device=hidden_ND.device)
        ctx.scale = losses_T1.new_tensor(scale)  # rounded as the gradient of the sum will be
        wanted = [learns and needs for needs in ctx.needs_input_grad[:3]]
        grads = _Gradients(hidden_ND, weight_VD, bias_V, wanted, dtype)
        entries = len(weight_VD) if cut is None else cut.entries
        own_VD, own_V = weight_VD[:entries], None if bias_V is None else bias_V[:entries]
        rows = rows_at_a_time(len(weight_VD), on_cpu=weight_VD.device.type == "cpu")
        for begin in range(0, len(places_T), rows):
            chunk = slice(begin, begin + rows)
            chunk_C = places_T[chunk]
            hidden_CD = hidden_ND[chunk_C]
            logits_CV = F.linear(hidden_CD, own_VD, own_V)
            losses_T1[chunk], grad_CV = _chunk(logits_CV, targets.at(chunk), cut, any(wanted), fused)
            if grad_CV is not None:
                del logits_CV
                scaled_CV = grad_CV if scale == 1.0 else grad_CV.mul_(scale)
                grads.add(chunk_C, hidden_CD, own_VD, scaled_CV.to(weight_VD.dtype))
        ctx.save_for_backward(*grads.finished(weight_VD.dtype))
        return losses_T1.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        rest = grad_total / ctx.scale  # 1 where it is what was expected
        grads = (None if grad is None else grad * rest for grad in ctx.saved_tensors)
        return (*grads, *[None] * 6)


class _Gradients:
    """What the chunks add up to; None for what does not learn. Sums over chunks are in ``dtype``."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wanted: list[bool], dtype: torch.dtype
    ) -> None:
        self._hidden_ND = torch.zeros_like(hidden_ND) if wanted[0] else None
        self._weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if wanted[1] else None
        self._bias_V = torch.zeros_like(bias_V, dtype=dtype) if wanted[2] and bias_V is not None else None

    def add(self, chunk_C: Tensor, hidden_CD: Tensor, weight_VD: Tensor, grad_CV: Tensor) -> None:
        """A chunk; ``weight_VD`` without padding."""
        if self._hidden_ND is not None:
            self._hidden_ND.index_copy_(0, chunk_C, grad_CV @ weight_VD)
        if self._weight_VD is not None:
            own_VD = self._weight_VD[: len(weight_VD)]
            if own_VD.dtype == grad_CV.dtype:
                own_VD.addmm_(grad_CV.t(), hidden_CD)
            else:
                own_VD.add_(grad_CV.t() @ hidden_CD)
        if self._bias_V is not None:
            self._bias_V[: len(weight_VD)].add_(grad_CV.sum(0, dtype=self._bias_V.dtype))

    def finished(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Of hidden states, weight and bias, in ``dtype``."""
        sums = (self._hidden_ND, self._weight_VD, self._bias_V)
        return tuple(None if grad is None else grad.to(dtype) for grad in sums)


def _chunk(
    logits_CV: Tensor, targets: Targets, cut: VocabularyCut | None, learns: bool, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses of some rows (C, 1), and if it ``learns`` the gradient of their sum (C, V), in fp32 or more, or
    ``fused`` in place of the logits."""
    if fused:
        losses_C1 = fused_cross_entropy(logits_CV, targets.labels_NK.squeeze(1), learns=learns)
        return losses_C1, logits_CV if learns else None
    dtype, level_C1 = torch.promote_types(logits_CV.dtype, torch.float32), None
    if cut is None:
        log_CV = torch.log_softmax(logits_CV, 1, dtype=dtype)
        score_C1 = targets.score(log_CV)  # less the level, and so is the mean
        mean_C1 = log_CV.mean(1, keepdim=True) if targets.softening.label_smoothing else None
        if targets.softening.z_loss:
            level_C1 = targets.score(logits_CV).to(dtype) - score_C1
        losses_C1 = targets.losses(-score_C1, score_C1, mean_C1, level_C1)
        softmax_CV = log_CV.exp_() if learns else None
    else:
        found = over_ranks(logits_CV, targets, cut)
        losses_C1 = found.losses(targets)
        level_C1 = found.greatest_N1 + found.sum_N1.log() if targets.softening.z_loss else None
        softmax_CV = (logits_CV.to(dtype) - found.greatest_N1).exp_().div_(found.sum_N1) if learns else None
    if softmax_CV is None or not softmax_CV.shape[1]:  # a rank may have no entry at all
        return losses_C1, softmax_CV
    return losses_C1, targets.gradient(softmax_CV, level_C1, cut)


def rows_at_a_time(vocabulary: int, *, on_cpu: bool) -> int:
    """Rows of a chunk, for a head of so many entries."""
    return max(LEAST_ROWS, (CPU_CHUNK if on_cpu else DEVICE_CHUNK) // vocabulary)
