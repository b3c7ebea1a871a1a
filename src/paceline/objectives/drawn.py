"""Labels that a model draws from its own distribution, in place of those of the text.

An estimate of curvature needs them (Liu et al. 2023, arXiv 2305.14342, algorithm 2). What is drawn at a position is a
function of the seed, the step, the sequence and the position, so that it is the same under every layout: the position's
number in [0, 1) says where in the sum of the probabilities, in the order of the vocabulary, the label lies.

Shapes: B rows, S positions, N positions with a target, C of a chunk, V vocabulary (a rank's part of it), R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.models.chance import fold, stream_seed
from paceline.objectives.deferred import DeferredLogits
from paceline.objectives.head_cross_entropy import rows_at_a_time
from paceline.objectives.softening import NO_TARGET
from paceline.objectives.vocabulary import VocabularyCut


@dataclass(frozen=True)
class Draw:
    """Of what the labels of a batch are a function, beside sequence and position."""

    seed: int
    step: int


@torch.no_grad()
def drawn_labels(
    logits: Tensor,
    labels_BS: Tensor,
    draw: Draw,
    *,
    sequences: tuple[int, ...],
    columns: Tensor | None,
    cut: VocabularyCut | None,
) -> Tensor:
    """Labels (B, S) drawn from the model's ``logits`` (B, S, V), where ``labels_BS`` has a target.

    ``sequences`` (B) and ``columns`` (S), None for all, say which positions of which sequences these are. With ``cut``
    the logits are of this rank's entries and padding, and all ranks get the same labels.
    """
    has_target_BS = labels_BS != NO_TARGET
    places_N = has_target_BS.flatten().nonzero().squeeze(1)
    chances_N = _chances(draw, sequences, columns, labels_BS)[has_target_BS]
    rows, logits_of = _rows(logits)
    drawn_BS = labels_BS.clone()
    for begin in range(0, len(places_N), rows):
        chunk_C = places_N[begin : begin + rows]
        drawn_BS.view(-1)[chunk_C] = _draw(logits_of(chunk_C), chances_N[begin : begin + rows], cut)
    return drawn_BS


def _chances(draw: Draw, sequences: tuple[int, ...], columns: Tensor | None, labels_BS: Tensor) -> Tensor:
    """A number in [0, 1) for each position, a multiple of 2^-53: (B, S) fp64."""
    device = labels_BS.device
    positions_S = torch.arange(labels_BS.shape[1]) if columns is None else columns
    keys_B = fold(stream_seed(draw.seed, "drawn labels", draw.step), torch.tensor(sequences, device=device))
    keys_BS = fold(keys_B.unsqueeze(1), positions_S.to(device))
    return (keys_BS >> 11).bitwise_and_((1 << 53) - 1).double() * 2.0**-53


def _rows(logits: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many positions to take at a time, and a function that gives the logits of some: of all (B x S) by number."""
    on_cpu, vocabulary = logits.device.type == "cpu", logits.shape[-1]
    if isinstance(logits, DeferredLogits):
        hidden, weight, bias = logits.parts()
        hidden_ND = hidden.flatten(0, -2)
        return rows_at_a_time(vocabulary, on_cpu=on_cpu), lambda chunk: F.linear(hidden_ND[chunk], weight, bias)
    logits_NV = logits.flatten(0, -2)
    return rows_at_a_time(vocabulary, on_cpu=on_cpu), lambda chunk: logits_NV[chunk]


def _draw(logits_CV: Tensor, chances_C: Tensor, cut: VocabularyCut | None) -> Tensor:
    """One label of the whole vocabulary for each row: (C,) int64."""
    if cut is not None:
        logits_CV = logits_CV[:, : cut.entries]
    logits_CV = logits_CV.double()
    own_C2 = torch.full((len(logits_CV), 2), -torch.inf, dtype=torch.float64, device=logits_CV.device)
    own_C2[:, 1] = 0.0
    if logits_CV.shape[1]:  # a rank may have no entry at all
        own_C2[:, 0] = logits_CV.amax(1)
        own_C2[:, 1] = (logits_CV - own_C2[:, :1]).exp().sum(1)
    of_ranks_RC2 = (own_C2 if cut is None else cut.axis.all_gather(own_C2, 0, where="drawn labels")).view(
        -1, *own_C2.shape
    )
    greatest_C = of_ranks_RC2[..., 0].amax(0)
    ends_RC = (of_ranks_RC2[..., 1] * (of_ranks_RC2[..., 0] - greatest_C).exp()).cumsum(0)
    wanted_C = chances_C * ends_RC[-1]
    owner_C = (ends_RC <= wanted_C).sum(0).clamp_(max=len(ends_RC) - 1)
    index = 0 if cut is None else cut.axis.index
    before_C1 = (ends_RC[index - 1] if index else torch.zeros_like(wanted_C)).unsqueeze(1)
    sums_CV = (logits_CV - greatest_C.unsqueeze(1)).exp().cumsum(1) + before_C1
    found_C = (sums_CV <= wanted_C.unsqueeze(1)).sum(1).clamp_(max=max(0, logits_CV.shape[1] - 1))
    if cut is None:
        return found_C
    return cut.axis.all_reduce(torch.where(owner_C == index, found_C + cut.start, 0), where="drawn labels")
