"""Attention for bf16 on CPUs as one compiled kernel: ``fused_attention.cpp`` says how it computes.

Shapes: B batch, N query heads, K key/value heads, Q queries, S keys, H width of a query or key, V width of a value.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from paceline.errors import PlanError
from paceline.models.kernels import library

SOURCE = Path(__file__).with_suffix(".cpp")


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "queries", "keys", "width")),
        ("value_width", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "position", "head")))


def require(what: str) -> None:
    """Compile the kernel if there is none yet, and see that this processor can run it; ``PlanError`` if not.

    ``what`` wants it: a setting, as the user writes it.
    """
    library(SOURCE, what)
    one = torch.ones(1, 2, 1, 2, dtype=torch.bfloat16)
    try:
        fused_attention(one, one, one, causal=True, scale=1.0)
    except RuntimeError:
        raise PlanError(f"{what}: torch has no products of bf16 blocks for this processor. Leave it out") from None


def fits(query_BNQH: Tensor, key_BKSH: Tensor, value_BKSV: Tensor) -> bool:
    """Whether the kernel computes these: bf16 on a CPU, of even widths."""
    tensors = (query_BNQH, key_BKSH, value_BKSV)
    is_even = query_BNQH.shape[-1] % 2 == 0 and value_BKSV.shape[-1] % 2 == 0
    return is_even and all(x.dtype is torch.bfloat16 and x.device.type == "cpu" for x in tensors)


def fused_attention(query_BNQH: Tensor, key_BKSH: Tensor, value_BKSV: Tensor, *, causal: bool, scale: float) -> Tensor:
    """softmax(scale x query key^T) value, as (B, Q, N, V), differentiable once; for what ``fits``, after ``require``.

    ``causal``: query i sees keys 0 to i only, and there are as many of both. Scores and sums are in fp32.
    """
    assert not causal or query_BNQH.shape[2] == key_BKSH.shape[2]
    output_BQNV: Tensor
    output_BQNV, _ = _attention(query_BNQH, key_BKSH, value_BKSV, causal, scale)
    return output_BQNV


@torch.library.custom_op("paceline::fused_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, Q, N, V), and the logarithms of the sums of exponentials (B, N, Q) in fp32."""
    query, key, value = (_with_dense_rows(x) for x in (query, key, value))
    output_BQNV, lse_BNQ = _empty_outputs(query, value)
    views = [_view(x) for x in (query, key, value, output_BQNV.transpose(1, 2))]
    _call("paceline_attention", query, key, value, causal, scale, *views, lse_BNQ.data_ptr())
    return output_BQNV, lse_BNQ


@torch.library.custom_op("paceline::fused_attention_backward", mutates_args=())
def _attention_backward(
    grad_BQNV: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output_BQNV: Tensor,
    lse_BNQ: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, grad = (_with_dense_rows(x) for x in (query, key, value, grad_BQNV.transpose(1, 2)))
    grads = _empty_gradients(query, key, value)
    before = [_view(x) for x in (grad, query, key, value, output_BQNV.transpose(1, 2))]
    after = [_view(x) for x in grads]
    _call("paceline_attention_backward", query, key, value, causal, scale, *before, lse_BNQ.data_ptr(), *after)
    return grads


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, value)


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(query, key, value)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _differentiate(ctx: Any, grad_BQNV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad_BQNV, *ctx.saved_tensors, *ctx.options), None, None


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


# The compiler decides by these what to keep for the backward pass and what to compute again.
@register_flop_formula(torch.ops.paceline.fused_attention)
def _flops(query: Any, key: Any, value: Any, causal: bool, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, queries, width = query
    flops: int = 2 * batch * heads * queries * key[2] * (width + value[3]) // (2 if causal else 1)
    return flops


@register_flop_formula(torch.ops.paceline.fused_attention_backward)
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    *_, causal, _ = others
    width, value_width = query[3], value[3]
    flops: int = _flops(query, key, value, causal) * (3 * width + 2 * value_width) // (width + value_width)
    return flops


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    lse_BNQ = query.new_empty(batch, heads, queries, dtype=torch.float32)
    return query.new_empty(batch, queries, heads, value.shape[-1]), lse_BNQ


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of one position lie together in memory, as the projections before them read it."""
    grads = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value)]
    return grads[0], grads[1], grads[2]


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _view(x_BNPE: Tensor) -> Any:
    batch, head, position, _ = x_BNPE.stride()
    return ctypes.byref(_View(x_BNPE.data_ptr(), batch, position, head))


def _call(name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *arguments: Any) -> None:
    batch, heads, queries, width = query.shape
    sizes = _Sizes(batch, heads, key.shape[1], queries, key.shape[2], width, value.shape[3], scale, causal)
    sizes.threads = torch.get_num_threads()
    pointers = [ctypes.c_void_p(x) if isinstance(x, int) else x for x in arguments]
    if getattr(library(SOURCE, "model.attention=fused"), name)(ctypes.byref(sizes), *pointers):
        raise RuntimeError("brgemm of bf16 is not there on this processor")
