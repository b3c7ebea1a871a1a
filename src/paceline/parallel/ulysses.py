"""Ulysses attention: from a piece of the sequence with all heads to some heads with the whole sequence, and back.

Rank r of c holds piece r of c. One all-to-all brings together the queries, keys and values of N / c query heads and of
the key/value heads that these read; attention is then computed as on one rank; another all-to-all brings the outputs
home. The backward pass runs the same two the other way round.

After "DeepSpeed Ulysses" (arXiv 2309.14509).

Shapes: B batch, N query heads, K key/value heads, c ranks, S positions of a rank, T = c x S, H width of a query or key,
V width of a value.
"""

from dataclasses import replace

from torch import Tensor, cat

from paceline.comm.mesh import Axis
from paceline.errors import PlanError
from paceline.parallel import collectives
from paceline.parallel.partial_attention import Scores
from paceline.parallel.ring import WHERE, attend
from paceline.parallel.visible import Spans, Visible


def ulysses_spans(tokens: int, size: int, index: int) -> Spans:
    """The piece of a rank; ``tokens`` is a multiple of ``size``."""
    piece = tokens // size
    assert piece * size == tokens, (tokens, size)
    return [slice(index * piece, (index + 1) * piece)]


def ulysses_attention(
    query_BNSH: Tensor,
    key_BKSH: Tensor,
    value_BKSV: Tensor,
    sinks_N: Tensor | None,
    *,
    visible: Visible,
    scores: Scores,
    axis: Axis,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of ``axis``: (B, N, S, V).

    All tensors hold the positions of ``ulysses_spans``. ``sinks_N`` are as for ``ring_attention``; each rank finds the
    gradient of those of its heads. Raises ``PlanError`` if the query heads do not divide by c. Key and value heads that
    do not are repeated until they do.
    """
    heads, key_heads = query_BNSH.shape[1], key_BKSH.shape[1]
    if heads % axis.size:
        raise PlanError(not_divisible(heads, axis.size))
    copies = repeats(heads, key_heads, axis.size)
    key_BKSH, value_BKSV = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (key_BKSH, value_BKSV))
    parts = [_by_rank(x, axis.size) for x in (query_BNSH, key_BKSH, value_BKSV)]
    sent_BScE = cat(parts, -1)
    whole_BTE = collectives.all_to_all(sent_BScE, axis, 2, 1, where=WHERE).squeeze(2)
    whole = whole_BTE.split([x.shape[-1] for x in parts], -1)
    query, key, value = (
        x.unflatten(-1, (-1, like.shape[-1])).transpose(1, 2)
        for x, like in zip(whole, (query_BNSH, key_BKSH, value_BKSV), strict=True)
    )
    alone = Axis(name=axis.name)
    sinks_n = None if sinks_N is None else axis.piece(sinks_N, 0)
    if scores.chance_BN is not None:
        scores = replace(scores, chance_BN=axis.piece(scores.chance_BN, 1))
    output_BnTV = attend(query, key, value, sinks_n, visible, scores, alone, visible.whole, [visible.whole])
    output_BTnV = output_BnTV.transpose(1, 2)
    return collectives.all_to_all(output_BTnV, axis, 1, 2, where=WHERE).transpose(1, 2)


def repeats(heads: int, key_heads: int, size: int) -> int:
    """The fewest copies of each key/value head that make them divide by ``size``, and query heads by them."""
    group = heads // key_heads
    return next(copies for copies in range(1, group + 1) if group % copies == 0 and key_heads * copies % size == 0)


def not_divisible(heads: int, size: int, tensor: int = 1) -> str:
    """What to tell the user."""
    return (
        f"layout.attention=ulysses deals out {heads} attention heads, which do not divide by layout.context={size}"
        + (f" x layout.tensor={tensor}" if tensor > 1 else "")
        + ". Use layout.attention=ring, or a divisor"
    )


def _by_rank(x_BNSE: Tensor, size: int) -> Tensor:
    """The heads that each rank gets, with their widths in one dimension: (B, S, c, N / c x E)."""
    x_BScnE: Tensor = x_BNSE.transpose(1, 2).unflatten(2, (size, -1))
    return x_BScnE.flatten(3)
