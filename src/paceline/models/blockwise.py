"""Attention as plain batched matrix products, block by block, forward and backward.

torch's own attention on CPUs computes bf16 products at a tenth of the speed of the matrix units. Here queries are taken
some rows at a time; scores, probabilities and their products are matrix products in the tensors' own dtype (the softmax
sums in fp32), and keys that no query of the block sees are left out: nearly half of them under a causal mask. The
backward pass computes the probabilities again, so nothing of size Q x S is kept.

Shapes: B batch, N query heads, K key/value heads, G = N / K query heads of one key/value head, Q queries, S keys,
H width of a query or key, V width of a value; in a block R rows of queries, C columns of keys, X = B x K matrices of
M = G x R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_ROWS = 128
"""Queries of a block: fewer leave out more of what is masked, more fill the matrix units better."""

BLOCK_SCORES = 1 << 25
"""Scores of a block, at most about: where there are very many keys, a block has fewer rows."""

HIDDEN = float("-inf")


def attention(
    query_BNQH: Tensor,
    key_BKSH: Tensor,
    value_BKSV: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(cap(scale x query key^T) + bias) value, as (B, Q, N, V), differentiable once.

    ``bias`` (1|B, 1|N, Q, S): truth values, True where a query sees a key, or numbers that are added and may learn.
    ``causal``: query i sees keys 0 to i only. ``softcap`` c: cap(x) = c tanh(x / c). ``dropout`` of the probabilities
    is drawn from torch's default generator. A query that sees no key gives 0.
    """
    seed = torch.randint(1 << 62, ()) if dropout > 0.0 else None
    output: Tensor = _attention(
        query_BNQH, key_BKSH, value_BKSV, bias, seed, causal, scale, softcap or 0.0, dropout
    )
    return output


# Operators of torch's own kind, opaque to torch.compile: what a block leaves out depends on the values of the bias.
@torch.library.custom_op("paceline::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    blocks = _Blocks(query, key, bias, seed, causal, scale, softcap, dropout)
    value_XSV = value.flatten(0, 1)
    output_BQNV = _empty_output(query, value)
    for block in blocks:
        output_XMV = torch.bmm(block.drop(block.probabilities_XMC), value_XSV[:, block.keys])
        blocks.put(output_BQNV, block.rows, output_XMV)
    return output_BQNV


@torch.library.custom_op("paceline::attention_backward", mutates_args=())
def _attention_backward(
    grad_BQNV: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    bias_learns: bool,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (nothing in it unless ``bias_learns``)."""
    blocks = _Blocks(query, key, bias, seed, causal, scale, softcap, dropout)
    grads = _empty_gradients(query, key, value, bias if bias_learns else None)
    grad_query, grad_key, grad_value, grad_bias = grads
    key_XSH, value_XVS = key.flatten(0, 1), value.flatten(0, 1).mT.contiguous()
    # Summed over blocks in fp32, and transposed: products whose result is C wide are faster than those H wide.
    sums = {"dtype": torch.promote_types(query.dtype, torch.float32), "device": query.device}
    grad_key_XHS = torch.zeros(key_XSH.mT.shape, **sums)
    grad_value_XVS = torch.zeros(value_XVS.shape, **sums)
    grad_bias.zero_()
    for block in blocks:
        grad_XMV = blocks.take(grad_BQNV.transpose(1, 2), block.rows)
        grad_value_XVS[..., block.keys] += torch.bmm(grad_XMV.mT, block.drop(block.probabilities_XMC))
        grad_XMC = block.drop(torch.bmm(grad_XMV, value_XVS[..., block.keys]))
        grad_XMC = torch._softmax_backward_data(grad_XMC, block.probabilities_XMC, -1, grad_XMC.dtype)
        if bias_learns:
            place = grad_bias[..., block.rows, block.keys]
            place += blocks.split(grad_XMC, block.rows).flatten(1, 2).sum_to_size(place.shape)
        if block.tanh_XMC is not None:
            grad_XMC *= 1 - block.tanh_XMC**2
        blocks.put(grad_query.transpose(1, 2), block.rows, _product(grad_XMC, key_XSH[:, block.keys], scale))
        grad_key_XHS[..., block.keys] += _product(block.query_XMH.mT, grad_XMC, scale)
    grad_key.copy_(grad_key_XHS.mT.reshape(key.shape))
    grad_value.copy_(grad_value_XVS.mT.reshape(value.shape))
    return grads


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return _empty_output(query, value)


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bias_learns: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(query, key, value, bias if bias_learns else None)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad_BQNV: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bias, seed = ctx.saved_tensors
    learns = ctx.needs_input_grad[3]
    *grads, grad_bias = _attention_backward(grad_BQNV, query, key, value, bias, learns, seed, *ctx.options)
    return *grads, grad_bias if learns else None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _empty_output(query_BNQH: Tensor, value_BKSV: Tensor) -> Tensor:
    batch, heads, queries, _ = query_BNQH.shape
    return query_BNQH.new_empty(batch, queries, heads, value_BKSV.shape[-1])


def _empty_gradients(
    query_BNQH: Tensor, key_BKSH: Tensor, value_BKSV: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The heads of one position lie together in memory, as the projections before them read it."""
    query, key, value = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query_BNQH, key_BKSH, value_BKSV))
    return query, key, value, query.new_empty(0) if bias is None else torch.empty_like(bias)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some rows of queries, and the range of keys that holds all they see."""

    rows: slice
    keys: slice
    query_XMH: Tensor
    probabilities_XMC: Tensor
    tanh_XMC: Tensor | None
    """Of the scores over the cap."""
    keep_XMC: Tensor | None
    """0 where dropout takes a probability, 1 / (1 - dropout) elsewhere."""

    def drop(self, x_XMC: Tensor) -> Tensor:
        """Apply dropout."""
        return x_XMC if self.keep_XMC is None else x_XMC * self.keep_XMC


class _Blocks:
    """Iterates over the blocks of one attention, with the same probabilities and dropout every time.

    The query heads of one key/value head stand below each other in one matrix, so that no key is repeated.
    """

    def __init__(
        self,
        query_BNQH: Tensor,
        key_BKSH: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        causal: bool,
        scale: float,
        softcap: float,
        dropout: float,
    ) -> None:
        self._query_BNQH = query_BNQH
        self._key_XHS = key_BKSH.flatten(0, 1).mT.contiguous()
        self._batch, self._keys = key_BKSH.shape[:2]
        self._bias = bias
        self._seed = seed
        self._causal = causal
        self._scale = scale
        self._softcap = softcap
        self._dropout = dropout

    def take(self, x_BNQE: Tensor, rows: slice) -> Tensor:
        """Some rows of all heads as matrices: (X, M, E)."""
        x_BKGRE = x_BNQE[:, :, rows].unflatten(1, (self._keys, -1))
        return x_BKGRE.reshape(self._batch * self._keys, -1, x_BNQE.shape[-1])

    def split(self, x_XME: Tensor, rows: slice) -> Tensor:
        """The heads and rows of matrices apart: (B, K, G, R, E)."""
        return x_XME.view(self._batch, self._keys, -1, rows.stop - rows.start, x_XME.shape[-1])

    def put(self, x_BQNE: Tensor, rows: slice, block_XME: Tensor) -> None:
        """Write matrices (X, M, E) to some rows of all heads."""
        x_BRKGE = x_BQNE[:, rows].unflatten(2, (self._keys, -1))
        x_BRKGE.copy_(self.split(block_XME, rows).permute(0, 3, 1, 2, 4))

    def __iter__(self) -> Iterator[_Block]:
        generator = None
        if self._seed is not None:
            generator = torch.Generator(self._query_BNQH.device).manual_seed(int(self._seed))
        seen_QS = None if self._bias is None else _sees(self._bias).flatten(0, 1).any(0)
        for rows in self._rows():
            keys = self._columns(rows, seen_QS)
            yield self._block(rows, keys, generator)

    def _rows(self) -> Iterator[slice]:
        _, heads, queries, _ = self._query_BNQH.shape
        scores_of_row = self._batch * heads * self._key_XHS.shape[-1]
        step = max(1, min(BLOCK_ROWS, BLOCK_SCORES // max(1, scores_of_row)))
        return (slice(begin, min(begin + step, queries)) for begin in range(0, queries, step))

    def _columns(self, rows: slice, seen_QS: Tensor | None) -> slice:
        end = rows.stop if self._causal else self._key_XHS.shape[-1]
        if seen_QS is None:
            return slice(0, end)
        seen = seen_QS[rows, :end].any(0).nonzero()
        return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)

    def _block(self, rows: slice, keys: slice, generator: torch.Generator | None) -> _Block:
        query_XMH = self.take(self._query_BNQH, rows)
        scores_XMC = _product(query_XMH, self._key_XHS[..., keys], self._scale)
        tanh_XMC = None
        if self._softcap:
            tanh_XMC = scores_XMC.div_(self._softcap).tanh_()
            scores_XMC = tanh_XMC * self._softcap
        scores_BKGRC = self.split(scores_XMC, rows)
        blind = self._hide(scores_BKGRC, rows, keys)
        probabilities_BKGRC = scores_BKGRC.softmax(-1)
        if blind is not None:
            probabilities_BKGRC.masked_fill_(blind, 0.0)
        probabilities_XMC = probabilities_BKGRC.view_as(scores_XMC)
        keep_XMC = None
        if generator is not None:
            keep = 1.0 - self._dropout
            keep_XMC = torch.empty_like(scores_XMC).bernoulli_(keep, generator=generator).div_(keep)
        return _Block(
            rows=rows,
            keys=keys,
            query_XMH=query_XMH,
            probabilities_XMC=probabilities_XMC,
            tanh_XMC=tanh_XMC,
            keep_XMC=keep_XMC,
        )

    def _hide(self, scores_BKGRC: Tensor, rows: slice, keys: slice) -> Tensor | None:
        """Add the bias, and -inf to what is masked; returns which queries see no key, if there are any."""
        if self._causal:
            ahead = keys.stop - rows.start
            if ahead > 0: 
                scores_BKGRC[..., -ahead:] += 0
        return None
