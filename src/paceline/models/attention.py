"""Attention as plain matrix products, under the name ``matmul``: the units of a CPU that multiply bf16 matrices run it.

torch's attention on CPUs computes bf16 in fp32 registers, at a tenth of what the matrix units do. Here queries are taken
a block of rows at a time; scores, probabilities and their products with the values are batched matrix products in the
tensors' own dtype, the softmax sums in fp32, and keys that no query of the block sees are left out: nearly half of them
under a causal mask. The backward pass computes the probabilities again, so that no S x S tensor is kept.

Shapes: B batch, N query heads, K key/value heads, G = N / K query heads of one key/value head, Q queries, S keys,
H width of a query/key head, V width of a value head, R rows of a block, C keys (columns) of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paceline.errors import ModelError

NAME = "matmul"

BLOCK_ROWS = 128
"""Queries of a block: fewer skip more of the masked half, more fill the matrix units better."""

BLOCK_ELEMENTS = 1 << 25
"""At most about this many scores at once; rows with very many keys are taken fewer at a time."""

REFUSED = ("s_aux", "sinks", "indices", "block_indices", "cache")
"""Arguments by which families of transformers ask for what is not computed here: sinks, chosen keys, paged caches."""


def register() -> None:
    """Make ``matmul`` known to transformers, with the masks that its ``sdpa`` gets. Again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _transformers_interface)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def require(model: nn.Module) -> None:
    """Raise ``ModelError`` if the model's family does not let its attention be chosen: it would run its own."""
    model_class: Any = type(model)
    if not model_class._can_set_attn_implementation():
        raise ModelError(
            f"model.attention={NAME}: {model_class.__name__} has an attention of its own that cannot be replaced. "
            "Use model.attention=auto"
        )


def choose(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Switch a transformers decoder to ``matmul`` where that is the fastest that gives the same; says whether it did.

    That is for bf16 on a CPU, if the family would run ``sdpa``, whose arguments and masks are the same.
    """
    config = getattr(model, "config", None)
    own = getattr(config, "_attn_implementation", None)
    if dtype is not torch.bfloat16 or device.type != "cpu" or own != "sdpa":
        return False
    hugging_face: Any = model
    if config.is_encoder_decoder or not type(hugging_face)._can_set_attn_implementation():
        return False
    register()
    hugging_face.set_attn_implementation(NAME)
    return True


def _transformers_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, N, Q, H), key (B, K, S, H), value (B, K, S, V); gives (B, Q, N, V).

    A mask already holds windows, documents and padding. Without one the module says whether it is causal; a single
    query, which follows all keys, sees them all. Raises ``ModelError`` for the ``REFUSED``.
    """
    refused = [name for name in REFUSED if others.get(name) is not None]
    if refused or others.get("output_attentions"):
        raise ModelError(
            f"model.attention={NAME} does not compute {', '.join(refused) or 'output_attentions'}, which "
            f"{type(module).__name__} asks for. Use model.attention=eager"
        )
    queries = query.shape[2]
    causal = attention_mask is None and queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and key.shape[2] > queries:  # the first call with a cache of fixed length: what follows is still empty
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    output_BQNV = attention(
        query,
        key,
        value,
        mask=attention_mask,
        bias=position_bias,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        dropout=dropout,
    )
    return output_BQNV, None


def attention(
    query_BNQH: Tensor,
    key_BKSH: Tensor,
    value_BKSV: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(cap(scale x query key^T) + bias + mask) value, as (B, Q, N, V).

    ``mask`` (1|B, 1|N, Q, S): bool, True where a query sees a key, or added to the scores. ``bias``: likewise added, and
    differentiable. ``causal``: query i sees keys 0 to i. ``softcap`` c: cap(x) = c tanh(x / c). A query that sees no key
    gives 0. ``dropout`` draws its mask from torch's default generator.
    """
    if bias is not None and mask is not None:
        bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else bias + mask
    seed = torch.randint(1 << 62, ()) if dropout > 0.0 else None
    output: Tensor = _attention(
        query_BNQH, key_BKSH, value_BKSV, mask if bias is None else bias, seed, causal, scale, softcap or 0.0, dropout
    )
    return output


# Operators of torch's own kind, opaque to torch.compile: which keys a block sees depends on the values of a mask.
@torch.library.custom_op("paceline::attention", mutates_args=())
def _attention(
    query_BNQH: Tensor,
    key_BKSH: Tensor,
    value_BKSV: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    heads = _Heads(key_BKSH)
    value_XSV = value_BKSV.flatten(0, 1)
    output_BQNV = _empty_output(query_BNQH, value_BKSV)
    for block in _blocks(query_BNQH, key_BKSH, bias, seed, causal, scale, softcap, dropout):
        heads.put(output_BQNV, block.rows, torch.bmm(block.kept(block.probabilities_XMC), value_XSV[:, block.keys]))
    return output_BQNV


@torch.library.custom_op("paceline::attention_backward", mutates_args=())
def _attention_backward(
    grad_BQNV: Tensor,
    query_BNQH: Tensor,
    key_BKSH: Tensor,
    value_BKSV: Tensor,
    bias: Tensor | None,
    bias_learns: bool,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (one element unless ``bias_learns``)."""
    heads = _Heads(key_BKSH)
    grads = _empty_gradients(query_BNQH, key_BKSH, value_BKSV, bias if bias_learns else None)
    grad_query, grad_key, grad_value, grad_bias = grads
    key_XSH = key_BKSH.flatten(0, 1)
    value_XVS = value_BKSV.flatten(0, 1).transpose(1, 2).contiguous()
    # Sums over blocks are in fp32, and transposed: products whose result is C wide run faster than those H wide.
    dtype = torch.promote_types(query_BNQH.dtype, torch.float32)
    grad_key_XHS = key_XSH.new_zeros(key_XSH.transpose(1, 2).shape, dtype=dtype)
    grad_value_XVS = value_XVS.new_zeros(value_XVS.shape, dtype=dtype)
    grad_bias.zero_()
    for block in _blocks(query_BNQH, key_BKSH, bias, seed, causal, scale, softcap, dropout):
        grad_XMV = heads.take(grad_BQNV.transpose(1, 2), block.rows)
        grad_value_XVS[..., block.keys] += torch.bmm(grad_XMV.transpose(1, 2), block.kept(block.probabilities_XMC))
        grad_XMC = block.kept(torch.bmm(grad_XMV, value_XVS[..., block.keys]))
        grad_XMC = torch._softmax_backward_data(grad_XMC, block.probabilities_XMC, -1, grad_XMC.dtype)
        if bias_learns:
            place = grad_bias[..., block.rows, block.keys]
            place += heads.split(grad_XMC, block.rows).flatten(1, 2).sum_to_size(place.shape)
        if block.tanh_XMC is not None:
            grad_XMC *= 1 - block.tanh_XMC**2
        heads.put(grad_query.transpose(1, 2), block.rows, _product(grad_XMC, key_XSH[:, block.keys], scale))
        grad_key_XHS[..., block.keys] += _product(block.query_XMH.transpose(1, 2), grad_XMC, scale)
    grad_key.copy_(grad_key_XHS.transpose(1, 2).view(key_BKSH.shape))
    grad_value.copy_(grad_value_XVS.transpose(1, 2).view(value_BKSV.shape))
    return grads


@_attention.register_fake
def _(query_BNQH: Tensor, key_BKSH: Tensor, value_BKSV: Tensor, *_: Any) -> Tensor:
    return _empty_output(query_BNQH, value_BKSV)


@_attention_backward.register_fake
def _(
    grad_BQNV: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bias_learns: bool, *_: Any
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
    """Heads lie beside each other in memory, as projections read and write them."""
    own = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query_BNQH, key_BKSH, value_BKSV)]
    return own[0], own[1], own[2], query_BNQH.new_empty(1) if bias is None else bias.new_empty(bias.shape)


class _Heads:
    """Query heads of one key/value head stand below each other: X = B x K matrices of M = G x R rows."""

    def __init__(self, key_BKSH: Tensor) -> None:
        self._batch, self._keys = key_BKSH.shape[:2]

    def take(self, x_BNQE: Tensor, rows: slice) -> Tensor:
        """The rows of a block as matrices: (X, M, E)."""
        return x_BNQE[:, :, rows].unflatten(1, (self._keys, -1)).flatten(2, 3).flatten(0, 1).contiguous()

    def split(self, x_XME: Tensor, rows: slice) -> Tensor:
        """Matrices as (B, K, G, R, E)."""
        return x_XME.view(self._batch, self._keys, -1, rows.stop - rows.start, x_XME.shape[-1])

    def put(self, x_BQNE: Tensor, rows: slice, block_XME: Tensor) -> None:
        """Write the rows of a block."""
        x_BQNE[:, rows].unflatten(2, (self._keys, -1)).copy_(self.split(block_XME, rows).permute(0, 3, 1, 2, 4))


@dataclass(frozen=True)
class _Block:
    """Some rows of queries, and the smallest range of keys that holds all they see."""

    rows: slice
    keys: slice
    query_XMH: Tensor
    probabilities_XMC: Tensor
    tanh_XMC: Tensor | None
    """Of the scores over the cap."""
    keep_XMC: Tensor | None
    """1 / (1 - dropout) or 0."""

    def kept(self, x_XMC: Tensor) -> Tensor:
        """After dropout."""
        return x_XMC if self.keep_XMC is None else x_XMC * self.keep_XMC


def _blocks(
    query_BNQH: Tensor,
    key_BKSH: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> Iterator[_Block]:
    """The probabilities, block by block; the same ones at every call."""
    heads = _Heads(key_BKSH)
    key_XHS = key_BKSH.flatten(0, 1).transpose(1, 2).contiguous()
    seen_QS = _seen(bias)
    generator = None if seed is None else torch.Generator(query_BNQH.device).manual_seed(int(seed))
    for rows in _row_ranges(query_BNQH, key_BKSH):
        keys = _key_range(rows, seen_QS, causal, key_BKSH.shape[2])
        query_XMH = heads.take(query_BNQH, rows)
        scores_XMC = _product(query_XMH, key_XHS[..., keys], scale)
        tanh_XMC = None
        if softcap:
            tanh_XMC = scores_XMC.div_(softcap).tanh_()
            scores_XMC = tanh_XMC * softcap
        scores = heads.split(scores_XMC, rows)
        blind = None
        if bias is not None:
            added = _added(bias[..., rows, keys], scores)
            scores += added
            blind = added.amax(-1, keepdim=True) == float("-inf")
        if causal:
            future = scores.new_full((rows.stop - rows.start,) * 2, float("-inf")).triu_(1)
            scores[..., rows.start :] += future
        probabilities = scores.softmax(-1)
        if blind is not None and blind.any():
            probabilities.masked_fill_(blind, 0.0)
        probabilities_XMC = probabilities.view_as(scores_XMC)
        keep_XMC = None
        if generator is not None:
            keep_XMC = torch.empty_like(scores_XMC).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
        yield _Block(rows, keys, query_XMH, probabilities_XMC, tanh_XMC, keep_XMC)
