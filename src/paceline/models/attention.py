"""Which attention a model runs: ours, by the names ``matmul`` and ``fused``, among those of transformers.

Shapes: B batch, N query heads, K key/value heads, Q queries, S keys, H width of a query or key, V width of a value.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paceline.errors import ModelError
from paceline.models import fused_attention
from paceline.models.blockwise import HIDDEN, attention

MATMUL = "matmul"
"""Plain matrix products, block by block."""
FUSED = "fused"
"""A compiled kernel, for bf16 on a CPU without bias, cap, dropout or any mask but the causal one; all else is
``matmul``'s."""
OURS = (MATMUL, FUSED)

REFUSED = ("s_aux", "sinks", "indices", "block_indices", "cache")
"""Arguments by which families ask for what is not computed here: attention sinks, chosen keys, paged caches."""


def register() -> None:
    """Make ours known to transformers, with the masks that its ``sdpa`` gets. Again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name in OURS:
        AttentionInterface.register(name, partial(attend, name))
        AttentionMaskInterface.register(name, sdpa_mask)


def check(model_class: type[nn.Module], name: str) -> None:
    """Raise ``ModelError`` if a family runs an attention of its own whatever it is told.

    ``PlanError`` for a kernel that this machine cannot have.
    """
    if not replaceable(model_class):
        raise ModelError(
            f"model.attention={name}: {model_class.__name__} has an attention of its own, which cannot be replaced. "
            "Use model.attention=auto"
        )
    if name == FUSED:
        fused_attention.require(f"model.attention={FUSED}")


def replaceable(model_class: type[nn.Module]) -> bool:
    """Whether a class of transformers calls the attention it is told to."""
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def choose(model: nn.Module, *, dtype: torch.dtype, device: torch.device, compiled: bool) -> bool:
    """Give a model of transformers one of ours where it is the fastest; returns whether it was given.

    That is in bf16 on a CPU; the kernel where the model is ``compiled``, so that there is a compiler. Only a family
    that would run ``sdpa`` gets it: what that computes is computed here too. ``PlanError`` for a kernel that this
    machine cannot have.
    """
    config = getattr(model, "config", None)
    if dtype is not torch.bfloat16 or device.type != "cpu" or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if not replaceable(type(model)):
        return False
    register()
    if compiled:
        fused_attention.require("train.compile=true")
    hugging_face: Any = model
    hugging_face.set_attn_implementation(FUSED if compiled else MATMUL)
    return True


def attend(
    name: str,
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
    """As transformers calls it: query (B, N, Q, H), key (B, K, S, H), value (B, K, S, V) give (B, Q, N, V).

    Windows, documents and padding are in the mask. Where there is none, the module says whether it is causal, and a
    single query, which comes after all keys, sees them all. Raises ``ModelError`` for what is not computed here.
    """
    refused = [name for name in REFUSED if others.get(name) is not None]
    refused += ["output_attentions"] if others.get("output_attentions") else []
    if refused:
        raise ModelError(
            f"model.attention={name} does not compute {', '.join(refused)}, which {type(module).__name__} asks for. "
            "Use model.attention=eager"
        )
    queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and queries > 1
    bias = _sum(position_bias, attention_mask)
    if causal and key.shape[2] > queries:  # the first call with a cache of fixed length, which is empty behind them
        key, value = key[:, :, :queries], value[:, :, :queries]
        bias = None if bias is None else bias[..., :queries]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_plain = bias is None and not softcap and not dropout
    if name == FUSED and is_plain and fused_attention.fits(query, key, value):
        return fused_attention.fused_attention(query, key, value, causal=causal, scale=scale), None
    output = attention(query, key, value, bias=bias, causal=causal, scale=scale, softcap=softcap, dropout=dropout)
    return output, None


def _sum(position_bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    return position_bias.masked_fill(~mask, HIDDEN) if mask.dtype is torch.bool else position_bias + mask
