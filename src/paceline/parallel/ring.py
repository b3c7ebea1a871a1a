"""Ring attention: queries stay, keys and values go round, and the parts of each softmax are put together on the way.

The sequence is cut into 2 x c pieces, and rank r of c holds pieces r and 2c - 1 - r: under a causal mask every rank
then has as much to compute at every step of the ring. Keys and values make c - 1 hops in the forward pass and as many
in the backward pass, in which their gradients follow one step behind and make c hops, the last one home.

After "Ring Attention with Blockwise Transformers" (arXiv 2310.01889); the order of the pieces is known as head-tail, or
zigzag.

Shapes: B batch, N query heads, K key/value heads, S positions of a rank, H width of a query or key, V width of a value,
E = H + V.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from paceline.comm.mesh import Axis
from paceline.parallel import partial_attention
from paceline.parallel.kept import kept
from paceline.parallel.partial_attention import Scores, sums_dtype
from paceline.parallel.visible import Spans, Visible

WHERE = "attention"
"""The place in the model under which messages are tallied."""


def ring_spans(tokens: int, size: int, index: int) -> Spans:
    """The pieces of a rank; ``tokens`` is a multiple of 2 x ``size``."""
    piece = tokens // (2 * size)
    assert piece * 2 * size == tokens, (tokens, size)
    return [slice(number * piece, (number + 1) * piece) for number in (index, 2 * size - 1 - index)]


def ring_attention(
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

    All tensors hold the positions of ``ring_spans``. ``sinks_N`` are scores that every query has beside those of its
    keys, for no value; each rank finds the part of their gradient that its queries make. Differentiable once; all ranks
    call it, and run backward, in one order. Sends c - 1 messages of K x S x E numbers a row of the batch forward;
    backward the same, and c more of their gradients in the dtype of sums.
    """
    spans = [ring_spans(visible.tokens, axis.size, index) for index in range(axis.size)]
    return attend(query_BNSH, key_BKSH, value_BKSV, sinks_N, visible, scores, axis, spans[axis.index], spans)


def attend(
    query_BNSH: Tensor,
    key_BKSH: Tensor,
    value_BKSV: Tensor,
    sinks_N: Tensor | None,
    visible: Visible,
    scores: Scores,
    axis: Axis,
    queries: Spans,
    keys: Sequence[Spans],
) -> Tensor:
    """The same for any cut: ``queries`` are the positions of the queries, ``keys`` those of each rank's keys."""
    output: Tensor = _Ring.apply(  # type: ignore[no-untyped-call]
        query_BNSH, key_BKSH, value_BKSV, sinks_N, visible, scores, axis, queries, keys
    )
    return output


class _Ring(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BNSH: Tensor,
        key_BKSH: Tensor,
        value_BKSV: Tensor,
        sinks_N: Tensor | None,
        visible: Visible,
        scores: Scores,
        axis: Axis,
        queries: Spans,
        keys: Sequence[Spans],
    ) -> Tensor:
        output_BNSV, lse_BNS = kept(
            lambda: _go_round(query_BNSH, key_BKSH, value_BKSV, sinks_N, visible, scores, axis, queries, keys)
        )
        ctx.save_for_backward(query_BNSH, key_BKSH, value_BKSV, sinks_N, output_BNSV, lse_BNS)
        ctx.options = visible, scores, axis, queries, keys
        return output_BNSV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSV: Tensor) -> tuple[Tensor | None, ...]:
        query_BNSH, key_BKSH, value_BKSV, sinks_N, output_BNSV, lse_BNS = ctx.saved_tensors
        visible, scores, axis, queries, keys = ctx.options
        grad_BNSV = grad_BNSV.contiguous()
        widths = [key_BKSH.shape[-1], value_BKSV.shape[-1]]
        dtype = sums_dtype(query_BNSH.dtype)
        held_BKSE = torch.cat([key_BKSH, value_BKSV], -1)
        grad_query = torch.zeros_like(query_BNSH, dtype=dtype)
        before = None
        for hop in range(axis.size):
            following = axis.rotate(held_BKSE, where=WHERE) if hop + 1 < axis.size else None
            grad_held = torch.zeros_like(held_BKSE, dtype=dtype)
            key, value = held_BKSE.split(widths, -1)
            grad_key, grad_value = grad_held.split(widths, -1)
            for tile in visible.tiles(queries, keys[(axis.index - hop) % axis.size]):
                rows, columns = tile.rows, tile.columns
                parts = partial_attention.backward(
                    grad_BNSV[:, :, rows],
                    query_BNSH[:, :, rows],
                    output_BNSV[:, :, rows],
                    lse_BNS[:, :, rows],
                    key[:, :, columns],
                    value[:, :, columns],
                    scores,
                    tile,
                )
                grad_query[:, :, rows] += parts[0]
                grad_key[:, :, columns] += parts[1]
                grad_value[:, :, columns] += parts[2]
            if before:  # what the ranks before found for the keys that are here now
                grad_held += before()
            before = axis.rotate(grad_held, where=WHERE)
            if following:
                held_BKSE = following()
        assert before is not None
        grads = grad_query, *before().split(widths, -1)
        grad_sinks_N = None
        if sinks_N is not None:
            share_BNS = (sinks_N.to(dtype)[:, None] - lse_BNS).exp_()
            grad_sinks_N = -(share_BNS * (grad_BNSV.to(dtype) * output_BNSV).sum(-1)).sum((0, 2)).to(sinks_N.dtype)
        return *(grad.to(query_BNSH.dtype) for grad in grads), grad_sinks_N, None, None, None, None, None


def _go_round(
    query_BNSH: Tensor,
    key_BKSH: Tensor,
    value_BKSV: Tensor,
    sinks_N: Tensor | None,
    visible: Visible,
    scores: Scores,
    axis: Axis,
    queries: Spans,
    keys: Sequence[Spans],
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the scores (B, N, S)."""
    sums = _Sums(query_BNSH, value_BKSV.shape[-1], sinks_N)
    held_BKSE = torch.cat([key_BKSH, value_BKSV], -1)
    for hop in range(axis.size):
        following = axis.rotate(held_BKSE, where=WHERE) if hop + 1 < axis.size else None
        key, value = held_BKSE.split([key_BKSH.shape[-1], value_BKSV.shape[-1]], -1)
        for tile in visible.tiles(queries, keys[(axis.index - hop) % axis.size]):
            part = query_BNSH[:, :, tile.rows], key[:, :, tile.columns], value[:, :, tile.columns]
            sums.add(tile.rows, *partial_attention.forward(*part, scores, tile))
        if following:
            held_BKSE = following()
    return sums.output.to(query_BNSH.dtype), sums.lse


class _Sums:
    """A softmax-weighted sum over keys that come in parts, after a sink."""

    def __init__(self, query_BNSH: Tensor, width: int, sinks_N: Tensor | None) -> None:
        dtype = sums_dtype(query_BNSH.dtype)
        self.output = query_BNSH.new_zeros(*query_BNSH.shape[:3], width, dtype=dtype)
        self.lse = query_BNSH.new_full(query_BNSH.shape[:3], partial_attention.HIDDEN, dtype=dtype)
        if sinks_N is not None:
            self.lse.copy_(sinks_N[:, None].expand_as(self.lse))

    def add(self, rows: slice, output_BNRV: Tensor, lse_BNR: Tensor) -> None:
        """Add a part for some queries."""
        output, lse = self.output[:, :, rows], self.lse[:, :, rows]
        total = torch.logaddexp(lse, lse_BNR)
        finite = total.masked_fill(total == partial_attention.HIDDEN, 0.0)  # a query that has seen no key yet
        output.mul_((lse - finite).exp_().unsqueeze(-1)).add_(output_BNRV * (lse_BNR - finite).exp_().unsqueeze(-1))
        lse.copy_(total)
