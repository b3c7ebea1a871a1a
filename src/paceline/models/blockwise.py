"""Attention as plain batched matrix products, block by block, forward and backward.

torch's own attention on CPUs computes bf16 products at a fifth of the speed of the matrix units. Here queries are taken
some rows at a time; scores, probabilities and their products are matrix products in the tensors' own dtype, and keys
that no query of the block sees are left out: nearly half of them under a causal mask. The backward pass computes the
probabilities again, so nothing of size Q x S is kept.

Scores in 16 bits are rounded after the greatest of each query has been subtracted: those that count are then near 0,
where rounding is finest. It takes the product twice, and makes the result as exact as one from fp32 scores.

Shapes: B batch, N query heads, K key/value heads, G = N / K query heads of one key/value head, Q queries, S keys,
H width of a query or key, V width of a value; in a block R rows of queries, C columns of keys, X = B x K matrices of
M = G x R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from paceline.models.chance import taken

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
    chance_BNQ: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scale x query key^T) + bias) value, as (B, Q, N, V), differentiable once.

    ``bias`` (1|B, 1|N, Q, S): truth values, True where a query sees a key, or numbers that are added and may learn.
    ``causal``: query i sees keys 0 to i only. ``softcap`` c: cap(x) = c tanh(x / c). ``dropout`` of the probabilities
    follows from ``chance_BNQ`` (int64) and the number of the key, as in ``chance``; without it these are drawn from
    torch's default generator. A query that sees no key gives 0.
    """
    if has_torch_function((query_BNQH,)):
        options: dict[str, Any] = {
            "bias": bias,
            "causal": causal,
            "scale": scale,
            "softcap": softcap,
            "dropout": dropout,
        }
        own: Tensor = handle_torch_function(attention, (query_BNQH,), query_BNQH, key_BKSH, value_BKSV, **options)
        return own
    assert not causal or query_BNQH.shape[2] == key_BKSH.shape[2]
    if dropout == 0.0:
        chance_BNQ = None
    elif chance_BNQ is None:
        chance_BNQ = torch.randint(1 << 62, query_BNQH.shape[:3], device=query_BNQH.device)
    given = query_BNQH, key_BKSH, value_BKSV, bias, chance_BNQ
    output_BQNV: Tensor
    output_BQNV, _ = _attention(*given, causal, scale, softcap or 0.0, dropout)
    return output_BQNV


# Operators of torch's own kind, opaque to torch.compile: what a block leaves out depends on the values of the bias.
@torch.library.custom_op("paceline::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    chance: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, Q, N, V) and, for the backward pass, the greatest score of each query (B, Q, N, 1)."""
    blocks = _Blocks(query, key, bias, chance, None, causal, scale, softcap, dropout)
    output_BQNV, greatest_BQN1 = _empty_outputs(query, value)
    value_XSV = value.flatten(0, 1)
    for block in blocks:
        output_XMV = torch.bmm(block.drop(block.probabilities_XMC), value_XSV[:, block.keys])
        blocks.put(output_BQNV, block.rows, output_XMV)
        blocks.put(greatest_BQN1, block.rows, block.greatest_XM1)
    return output_BQNV, greatest_BQN1


@torch.library.custom_op("paceline::attention_backward", mutates_args=())
def _attention_backward(
    grad_BQNV: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    bias_learns: bool,
    chance: Tensor | None,
    greatest_BQN1: Tensor,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (nothing in it unless ``bias_learns``)."""
    blocks = _Blocks(query, key, bias, chance, greatest_BQN1, causal, scale, softcap, dropout)
    grads = _empty_gradients(query, key, value, bias if bias_learns else None)
    grad_query, grad_key, grad_value, grad_bias = grads
    key_XSH, value_XSV = blocks.key_XSH, value.flatten(0, 1)
    sums = torch.promote_types(query.dtype, torch.float32)  # over blocks: rounding each to bf16 would lose bits
    grad_key_XSH, grad_value_XSV = (torch.zeros_like(x, dtype=sums) for x in (key_XSH, value_XSV))
    grad_bias.zero_()
    for block in blocks:
        grad_XMV = blocks.take(grad_BQNV, block.rows)
        grad_value_XSV[:, block.keys] += torch.bmm(block.drop(block.probabilities_XMC).mT, grad_XMV)
        grad_XMC = block.drop(torch.bmm(grad_XMV, value_XSV[:, block.keys].mT))
        grad_XMC = torch._softmax_backward_data(grad_XMC, block.probabilities_XMC, -1, grad_XMC.dtype)
        if bias_learns:
            place = grad_bias[..., block.rows, block.keys]
            place += blocks.split(grad_XMC, block.rows).flatten(1, 2).sum_to_size(place.shape)
        if block.tanh_XMC is not None:
            grad_XMC *= 1 - block.tanh_XMC**2
        blocks.put(grad_query.transpose(1, 2), block.rows, _product(grad_XMC, key_XSH[:, block.keys], scale))
        grad_key_XSH[:, block.keys] += _product(grad_XMC.mT, block.query_XMH, scale)
    grad_key.copy_(grad_key_XSH.view(key.shape))
    grad_value.copy_(grad_value_XSV.view(value.shape))
    return grads


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, value)


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bias_learns: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(query, key, value, bias if bias_learns else None)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad_BQNV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bias, chance, greatest = ctx.saved_tensors
    learns = ctx.needs_input_grad[3]
    *grads, grad_bias = _attention_backward(grad_BQNV, query, key, value, bias, learns, chance, greatest, *ctx.options)
    return *grads, grad_bias if learns else None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _empty_outputs(query_BNQH: Tensor, value_BKSV: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query_BNQH.shape
    shape = batch, queries, heads
    return query_BNQH.new_empty(*shape, value_BKSV.shape[-1]), query_BNQH.new_empty(*shape, 1)


def _empty_gradients(
    query_BNQH: Tensor, key_BKSH: Tensor, value_BKSV: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The heads of one position lie together in memory, as the projections before them read it."""
    query, key, value = (
        x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query_BNQH, key_BKSH, value_BKSV)
    )
    return query, key, value, query.new_empty(0) if bias is None else torch.empty_like(bias)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some rows of queries, and the range of keys that holds all they see."""

    rows: slice
    keys: slice
    query_XMH: Tensor
    greatest_XM1: Tensor
    """What was subtracted from the scores before they were rounded."""
    probabilities_XMC: Tensor
    tanh_XMC: Tensor | None
    """Of the scores over the cap."""
    keep_XMC: Tensor | None
    """0 where dropout takes a probability, 1 / (1 - dropout) elsewhere."""

    def drop(self, x_XMC: Tensor) -> Tensor:
        """Apply dropout."""
        return x_XMC if self.keep_XMC is None else x_XMC * self.keep_XMC


class _Blocks:
    """Iterates over the blocks of one attention; again with equal results, if told the greatest scores.

    The query heads of one key/value head stand below each other in one matrix, so that no key is repeated.
    """

    def __init__(
        self,
        query_BNQH: Tensor,
        key_BKSH: Tensor,
        bias: Tensor | None,
        chance_BNQ: Tensor | None,
        greatest_BQN1: Tensor | None,
        causal: bool,
        scale: float,
        softcap: float,
        dropout: float,
    ) -> None:
        self._query_BQNH = query_BNQH.transpose(1, 2)
        self.key_XSH = key_BKSH.flatten(0, 1)
        self._batch, self._heads = key_BKSH.shape[:2]
        self._bias = bias
        self._chance_BNQ = chance_BNQ
        self._greatest_BQN1 = greatest_BQN1
        self._causal = causal
        self._scale = scale
        self._softcap = softcap
        self._dropout = dropout

    def take(self, x_BQNE: Tensor, rows: slice) -> Tensor:
        """Some rows of all heads as matrices: (X, M, E)."""
        x_BRKGE: Tensor = x_BQNE[:, rows].unflatten(2, (self._heads, -1))
        return x_BRKGE.permute(0, 2, 3, 1, 4).reshape(len(self.key_XSH), -1, x_BQNE.shape[-1])

    def put(self, x_BQNE: Tensor, rows: slice, block_XME: Tensor) -> None:
        """Write matrices (X, M, E) to some rows of all heads."""
        x_BRKGE = x_BQNE[:, rows].unflatten(2, (self._heads, -1))
        x_BRKGE.copy_(self.split(block_XME, rows).permute(0, 3, 1, 2, 4))

    def split(self, x_XME: Tensor, rows: slice) -> Tensor:
        """The heads and rows of matrices apart: (B, K, G, R, E)."""
        return x_XME.view(self._batch, self._heads, -1, rows.stop - rows.start, x_XME.shape[-1])

    def __iter__(self) -> Iterator[_Block]:
        seen_QS = None if self._bias is None else _sees(self._bias).flatten(0, 1).any(0)
        batch, queries, heads, _ = self._query_BQNH.shape
        keys = self.key_XSH.shape[1]
        step = max(1, min(BLOCK_ROWS, BLOCK_SCORES // (batch * heads * keys)))
        for begin in range(0, queries, step):
            rows = slice(begin, min(begin + step, queries))
            yield self._block(rows, self._range(rows, seen_QS))

    def _range(self, rows: slice, seen_QS: Tensor | None) -> slice:
        """The keys that some query of ``rows`` sees; one where they see none."""
        end = rows.stop if self._causal else self.key_XSH.shape[1]
        if seen_QS is None:
            return slice(0, end)
        seen = seen_QS[rows, :end].any(0).nonzero()
        return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 1)

    def _block(self, rows: slice, keys: slice) -> _Block:
        query_XMH = self.take(self._query_BQNH, rows)
        scores_XMC, greatest_XM1 = self._scores(query_XMH, rows, keys)
        tanh_XMC = None
        if self._softcap:
            tanh_XMC = scores_XMC.div_(self._softcap).tanh_()
            scores_XMC = tanh_XMC * self._softcap
        blind = self._hide(self.split(scores_XMC, rows), rows, keys)
        probabilities_XMC = scores_XMC.softmax(-1)
        if blind is not None:
            self.split(probabilities_XMC, rows).masked_fill_(blind, 0.0)
        return _Block(
            rows=rows,
            keys=keys,
            query_XMH=query_XMH,
            greatest_XM1=greatest_XM1,
            probabilities_XMC=probabilities_XMC,
            tanh_XMC=tanh_XMC,
            keep_XMC=None if self._chance_BNQ is None else self._keep(self._chance_BNQ, rows, keys, scores_XMC.dtype),
        )

    def _scores(self, query_XMH: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Scores less the greatest of each query, and these: zeros where rounding is fine or a cap follows."""
        key_XHC = self.key_XSH[:, keys].mT
        if query_XMH.dtype.itemsize > 2 or self._softcap:
            return _product(query_XMH, key_XHC, self._scale), query_XMH.new_zeros(*query_XMH.shape[:2], 1)
        if self._greatest_BQN1 is not None:
            greatest_XM1 = self.take(self._greatest_BQN1, rows)
        else:
            greatest_XM1 = _product(query_XMH, key_XHC, self._scale).amax(-1, keepdim=True)
        return torch.baddbmm(-greatest_XM1, query_XMH, key_XHC, alpha=self._scale), greatest_XM1

    def _keep(self, chance_BNQ: Tensor, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
        """(X, M, C)."""
        chance_XM = self.take(chance_BNQ.transpose(1, 2).unsqueeze(-1), rows).squeeze(-1)
        columns_C = torch.arange(keys.start, keys.stop, device=chance_XM.device)
        keep_XMC = taken(chance_XM, columns_C, self._dropout).logical_not_().to(dtype)
        return keep_XMC.div_(1.0 - self._dropout) if self._dropout < 1.0 else keep_XMC

    def _hide(self, scores_BKGRC: Tensor, rows: slice, keys: slice) -> Tensor | None:
        """Add the bias, and -inf at hidden keys; returns the queries (B|1, K|1, G|1, R, 1) that see none, if any."""
        if self._causal:
            first = max(keys.start, rows.start)
            position_R1 = torch.arange(rows.start, rows.stop, device=scores_BKGRC.device).unsqueeze(1)
            past_RC = torch.arange(first, keys.stop, device=scores_BKGRC.device) <= position_R1
            scores_BKGRC[..., first - keys.start :] += _added(past_RC, scores_BKGRC.dtype)
        if self._bias is None:
            return None
        bias = self._bias[..., rows, keys]
        bias = bias.unsqueeze(2) if bias.shape[1] == 1 else bias.unflatten(1, (self._heads, -1))
        if bias.dtype is torch.bool and bias.all():
            return None
        scores_BKGRC += _added(bias, scores_BKGRC.dtype)
        blind = ~_sees(scores_BKGRC if self._causal else bias).any(-1, keepdim=True)
        return blind if blind.any() else None


def _added(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Truth values as numbers to add: adding them is faster than filling by a mask."""
    if bias.dtype is not torch.bool:
        return bias
    return torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill_(~bias, HIDDEN)


def _sees(bias: Tensor) -> Tensor:
    return bias if bias.dtype is torch.bool else bias != HIDDEN


def _product(a_XMK: Tensor, b_XKC: Tensor, scale: float) -> Tensor:
    """scale x a b: the scale costs nothing inside the product."""
    return torch.baddbmm(a_XMK.new_empty(1, 1, 1), a_XMK, b_XKC, beta=0, alpha=scale)
