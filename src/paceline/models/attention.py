"""Which attention a model runs: ours, by the name ``matmul``, among those of transformers.

Shapes: B batch, N query heads, K key/value heads, Q queries, S keys, H width of a query or key, V width of a value.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from paceline.errors import ModelError
from paceline.models.blockwise import HIDDEN, attention

MATMUL = "matmul"

REFUSED = ("s_aux", "sinks", "indices", "block_indices", "cache")
"""Arguments by which families ask for what is not computed here: attention sinks, chosen keys, paged caches."""


def register() -> None:
    """Make ``matmul`` known to transformers, with the masks that its ``sdpa`` gets. Again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(MATMUL, matmul_attention)
    AttentionMaskInterface.register(MATMUL, sdpa_mask)


def check(model_class: type[nn.Module]) -> None:
    """Raise ``ModelError`` if a family runs an attention of its own whatever it is told."""
    if not replaceable(model_class):
        raise ModelError(
            f"model.attention={MATMUL}: {model_class.__name__} has an attention of its own, which cannot be replaced. "
            "Use model.attention=auto"
        )


def replaceable(model_class: type[nn.Module]) -> bool:
    """Whether a class of transformers calls the attention it is told to."""
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def choose(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Give a model of transformers ``matmul`` where it is the fastest; returns whether it was given.

    That is in bf16 on a CPU. Only a family that would run ``sdpa`` gets it: what that computes is computed here too.
    """
    config = getattr(model, "config", None)
    if dtype is not torch.bfloat16 or device.type != "cpu" or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if not replaceable(type(model)):
        return False
    register()
    hugging_face: Any = model
    hugging_face.set_attn_implementation(MATMUL)
    return True


def matmul_attention(
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
            f"model.attention={MATMUL} does not compute {', '.join(refused)}, which {type(module).__name__} asks for. "
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
    output = attention(query, key, value, bias=bias, causal=causal, scale=scale, softcap=softcap, dropout=dropout)
    return output, None


def _sum(position_bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    return position_bias.masked_fill(~mask, HIDDEN) if mask.dtype is torch.bool else position_bias + mask
