"""Attention between some queries and some keys, as a part of a softmax over more keys than these.

The forward pass also returns the log of the sum of the exponentials of each query's scores, by which parts are put
together. The backward pass is told this number, and the output, for all keys, and gives what these keys contribute.

torch's fused kernels do it where they can. Elsewhere (soft caps, written-out masks, 16 bits on a CPU, where they do not
use the matrix units) it is plain batched matrix products over some rows of queries at a time. Scores in 16 bits are
rounded after a number near the greatest was subtracted: those that count are then near 0, where rounding is finest.

Shapes: B batch, N query heads, K key/value heads, G = N / K, R queries, C keys, H width of a query or key, V width of a
value; in a block X = B x K matrices of M = G x (some rows) rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.models.chance import fold, taken
from paceline.parallel.visible import Tile

BLOCK_ROWS = 128
BLOCK_SCORES = 1 << 25
"""Scores of a block, at most about, where not even ``BLOCK_ROWS`` rows fit."""

HIDDEN = float("-inf")
FUSED_WIDTH = 256
"""The widest head of the fused CUDA kernel; it takes multiples of 8."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How a score is made: cap(scale x query . key), where cap(x) = softcap x tanh(x / softcap)."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    """Of the probabilities, which are those of all keys all the same."""
    chance_BN: Tensor | None = None
    """(B, N) int64: what is dropped follows from it, the positions of query and key, as in ``models.chance``."""


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that parts are added up in."""
    return torch.promote_types(dtype, torch.float32)


def forward(
    query_BNRH: Tensor, key_BKCH: Tensor, value_BKCV: Tensor, scores: Scores, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Output (B, N, R, V) of these keys alone, and log-sum-exp (B, N, R); 0 and -inf for a query that sees none.

    Key and value heads are as many as query heads, or a divisor of that. What is returned may be of a wider dtype.
    Which keys are seen is read from ``tile``; the tensors hold its rows and columns and nothing else.
    """
    if _is_fused(query_BNRH, value_BKCV, scores, tile):
        return _fused_forward(query_BNRH, key_BKCH, value_BKCV, scores, tile)
    shape = query_BNRH.shape[:3]
    dtype = sums_dtype(query_BNRH.dtype)
    output_BNRV = query_BNRH.new_empty(*shape, value_BKCV.shape[-1], dtype=dtype)
    lse_BNR = query_BNRH.new_empty(shape, dtype=dtype)
    for block in _blocks(query_BNRH, key_BKCH, tile):
        query_XMH, key_XCH = block.take(query_BNRH), block.keys(key_BKCH)
        offset_XM1 = _greatest(query_XMH, key_XCH, scores)
        relative_XMC, _ = _relative_scores(query_XMH, key_XCH, scores, offset_XM1)
        block.hide(relative_XMC)
        lse_XM1 = relative_XMC.logsumexp(-1, keepdim=True)
        probabilities_XMC = (relative_XMC - lse_XM1.masked_fill(lse_XM1 == HIDDEN, 0.0)).exp_()
        block.drop(probabilities_XMC, scores, tile)
        block.put(output_BNRV, torch.bmm(probabilities_XMC.to(query_XMH.dtype), block.keys(value_BKCV)))
        block.put(lse_BNR.unsqueeze(-1), lse_XM1 + offset_XM1)
    return output_BNRV, lse_BNR


def backward(
    grad_BNRV: Tensor,
    query_BNRH: Tensor,
    output_BNRV: Tensor,
    lse_BNR: Tensor,
    key_BKCH: Tensor,
    value_BKCV: Tensor,
    scores: Scores,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to the gradients of query, key and value.

    ``output`` and ``lse`` are of all keys, and of sinks if there are any.
    """
    if _is_fused(query_BNRH, value_BKCV, scores, tile):
        return _fused_backward(grad_BNRV, query_BNRH, key_BKCH, value_BKCV, output_BNRV, lse_BNR, scores, tile)
    dtype = sums_dtype(query_BNRH.dtype)
    delta_BNR1 = (grad_BNRV.to(dtype) * output_BNRV.to(dtype)).sum(-1, keepdim=True)
    lse_BNR1 = lse_BNR.masked_fill(lse_BNR == HIDDEN, 0.0).unsqueeze(-1)
    grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=dtype) for x in (query_BNRH, key_BKCH, value_BKCV))
    for block in _blocks(query_BNRH, key_BKCH, tile):
        query_XMH, key_XCH, grad_XMV = block.take(query_BNRH), block.keys(key_BKCH), block.take(grad_BNRV)
        relative_XMC, tanh_XMC = _relative_scores(query_XMH, key_XCH, scores, block.take(lse_BNR1))
        block.hide(relative_XMC)
        probabilities_XMC = relative_XMC.exp_()
        grad_XMC = block.drop(torch.bmm(grad_XMV, block.keys(value_BKCV).mT), scores, tile) - block.take(delta_BNR1)
        dropped_XMC = block.drop(probabilities_XMC.clone() if scores.dropout else probabilities_XMC, scores, tile)
        block.add_keys(grad_value, torch.bmm(dropped_XMC.to(query_XMH.dtype).mT, grad_XMV))
        grad_XMC = grad_XMC.mul_(probabilities_XMC)
        if tanh_XMC is not None:
            grad_XMC *= 1 - tanh_XMC**2
        grad_XMC = grad_XMC.to(query_XMH.dtype)
        block.put(grad_query, _product(grad_XMC, key_XCH, scores.scale))
        block.add_keys(grad_key, _product(grad_XMC.mT, query_XMH, scores.scale))
    return grad_query, grad_key, grad_value


def _relative_scores(
    query_XMH: Tensor, key_XCH: Tensor, scores: Scores, offset_XM1: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scores less an offset, in the dtype of sums, and tanh(score / cap) if they are capped."""
    dtype = offset_XM1.dtype
    if scores.softcap is not None:
        tanh_XMC = _product(query_XMH, key_XCH.mT, scores.scale).to(dtype).div_(scores.softcap).tanh_()
        return tanh_XMC * scores.softcap - offset_XM1, tanh_XMC
    rounded_XM1 = offset_XM1.to(query_XMH.dtype)
    relative_XMC = torch.baddbmm(-rounded_XM1, query_XMH, key_XCH.mT, alpha=scores.scale).to(dtype)
    if rounded_XM1.dtype is not dtype:
        relative_XMC -= offset_XM1 - rounded_XM1
    return relative_XMC, None


def _greatest(query_XMH: Tensor, key_XCH: Tensor, scores: Scores) -> Tensor:
    """The greatest score of each query where rounding is coarse and nothing caps it; zeros elsewhere."""
    dtype = sums_dtype(query_XMH.dtype)
    if query_XMH.dtype.itemsize > 2 or scores.softcap is not None:
        return query_XMH.new_zeros(*query_XMH.shape[:2], 1, dtype=dtype)
    return _product(query_XMH, key_XCH.mT, scores.scale).amax(-1, keepdim=True).to(dtype)


def _product(a_XMK: Tensor, b_XKC: Tensor, scale: float) -> Tensor:
    """scale x a b: the scale costs nothing inside the product."""
    return torch.baddbmm(a_XMK.new_empty(1, 1, 1), a_XMK, b_XKC, beta=0, alpha=scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Some rows of queries, and the keys that they may see. The query heads of a key head stand below each other."""

    rows: slice
    columns: slice
    key_heads: int
    hidden: Tensor | None
    """(B|1, 1, 1, rows, columns)."""

    def take(self, x_BNRE: Tensor) -> Tensor:
        """(X, M, E)."""
        x_BKGRE: Tensor = x_BNRE[:, :, self.rows].unflatten(1, (self.key_heads, -1))
        return x_BKGRE.flatten(2, 3).flatten(0, 1)

    def put(self, x_BNRE: Tensor, block_XME: Tensor) -> None:
        place_BNRE = x_BNRE[:, :, self.rows]
        place_BNRE.copy_(block_XME.view(place_BNRE.shape))

    def keys(self, x_BKCE: Tensor) -> Tensor:
        """(X, C, E)."""
        return x_BKCE[:, :, self.columns].flatten(0, 1)

    def add_keys(self, x_BKCE: Tensor, block_XCE: Tensor) -> None:
        place_BKCE = x_BKCE[:, :, self.columns]
        place_BKCE += block_XCE.view(place_BKCE.shape)

    def drop(self, x_XMC: Tensor, scores: Scores, tile: Tile) -> Tensor:
        """Apply dropout in place."""
        if not scores.dropout:
            return x_XMC
        assert scores.chance_BN is not None
        device = x_XMC.device
        query_R = torch.arange(tile.query.start, tile.query.stop, device=device)
        key_C = torch.arange(tile.key.start, tile.key.stop, device=device)[self.columns]
        chance_BNR = fold(scores.chance_BN.unsqueeze(-1), query_R)
        taken_XMC = taken(self.take(chance_BNR.unsqueeze(-1)).squeeze(-1), key_C, scores.dropout)
        x_XMC.masked_fill_(taken_XMC, 0.0)
        return x_XMC.mul_(1.0 / (1.0 - scores.dropout)) if scores.dropout < 1.0 else x_XMC

    def hide(self, scores_XMC: Tensor) -> None:
        if self.hidden is not None:
            shape = -1, self.key_heads, *scores_XMC.shape[1:]
            scores_BKGRC = scores_XMC.view(shape).unflatten(2, (-1, self.rows.stop - self.rows.start))
            scores_BKGRC.masked_fill_(self.hidden, HIDDEN)


def _blocks(query_BNRH: Tensor, key_BKCH: Tensor, tile: Tile) -> Iterator[_Block]:
    batch, heads, rows, _ = query_BNRH.shape
    key_heads, columns = key_BKCH.shape[1:3]
    step = max(1, min(BLOCK_ROWS, BLOCK_SCORES // (batch * heads * columns)))
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        keys = slice(0, block.stop if tile.causal else columns)
        yield _Block(rows=block, columns=keys, key_heads=key_heads, hidden=_hidden(block, keys, tile, key_BKCH.device))


def _hidden(rows: slice, columns: slice, tile: Tile, device: torch.device) -> Tensor | None:
    assert not (tile.causal and tile.mask is not None)
    if tile.causal:
        row_R1 = torch.arange(rows.start, rows.stop, device=device)[:, None]
        return (torch.arange(columns.start, columns.stop, device=device) > row_R1)[None, None, None]
    return None if tile.mask is None else ~tile.mask[:, :, rows, columns].unsqueeze(1)


def _is_fused(query_BNRH: Tensor, value_BKCV: Tensor, scores: Scores, tile: Tile) -> bool:
    if (
        tile.mask is not None
        or scores.softcap is not None
        or scores.dropout
        or query_BNRH.shape[-1] != value_BKCV.shape[-1]
    ):
        return False
    if query_BNRH.device.type == "cuda":
        return query_BNRH.dtype.itemsize == 2 and query_BNRH.shape[-1] % 8 == 0 and query_BNRH.shape[-1] <= FUSED_WIDTH
    return query_BNRH.device.type == "cpu" and query_BNRH.dtype.itemsize > 2


def _fused_forward(query: Tensor, key: Tensor, value: Tensor, scores: Scores, tile: Tile) -> tuple[Tensor, Tensor]:
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    aten: Any = torch.ops.aten
    if query.device.type == "cuda":
        kernel = aten._scaled_dot_product_flash_attention
        output, lse, *_ = kernel(query, key, value, 0.0, tile.causal, False, scale=scores.scale)
    else:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = kernel(query, key, value, 0.0, tile.causal, scale=scores.scale)
    return output, lse


def _fused_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scores: Scores, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    key_heads = key.shape[1]
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    aten: Any = torch.ops.aten
    given = grad, query, key, value, output, lse.contiguous()
    if query.device.type == "cuda":
        kernel = aten._scaled_dot_product_flash_attention_backward
        no_random = torch.empty(2, dtype=torch.uint64, device=query.device)
        lengths = None, None, query.shape[2], key.shape[2]
        grads = kernel(*given, *lengths, 0.0, tile.causal, no_random, no_random, scale=scores.scale)
    else:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = kernel(*given, 0.0, tile.causal, scale=scores.scale)
    grad_query, grad_key, grad_value = grads
    return grad_query, *(x.unflatten(1, (key_heads, -1)).sum(2) for x in (grad_key, grad_value))


def _repeated(x_BKCE: Tensor, heads: int) -> Tensor:
    """As many heads as there are query heads."""
    return x_BKCE.repeat_interleave(heads // x_BKCE.shape[1], 1) if x_BKCE.shape[1] < heads else x_BKCE
