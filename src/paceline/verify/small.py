"""How a model is made small: every size of its config that is greater than needed becomes a small one.

A size that the user made smaller stays. The kind of a model stays too: whether heads share keys and values, and which
layers are of which type.
"""

from collections.abc import Mapping, Sequence
from typing import Any

LAYERS = 5  # divides by no number of stages

SIZES: dict[str, int] = {
    "vocab_size": 131,  # divides by no number of ranks
    "vocab_size_per_layer_input": 131,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "attention_hidden_size", "block_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "conv_dim", "lru_width"), 32),
    **dict.fromkeys(("embedding_size", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("num_layers", "num_decoder_layers", "num_encoder_layers", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads",), 4),
    **dict.fromkeys(("head_dim", "d_kv", "query_pre_attn_scalar", "v_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_topk", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "n_groups"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 12),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "ctx_len", "context_length"), 64),
    **dict.fromkeys(("block_size", "max_seq_len"), 64),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "time_step_rank"), 1),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "index_topk"), 8),
}
"""What the sizes of a family's config become, where they are greater."""

_FOUR_AND_ONE = ["sliding_attention"] * 4 + ["full_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 2, "layer_types": 2 * _FOUR_AND_ONE},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 1, "num_experts": 4},
    "kimi_linear": {"num_experts": 8},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
}
"""What else a family needs to be small."""

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

PER_LAYER = (
    "layer_types",
    "layers_block_type",
    "block_types",
    "mlp_layer_types",
    "hybrid_override_pattern",
    "no_rope_layers",
    "attention_layers",
)
"""Lists with an entry for each layer."""


def small_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes every size of a config small; query and key/value heads keep their ratio's kind: all, some or one."""
    small: dict[str, Any] = {key: most for key, most in SIZES.items() if _exceeds(config.get(key), most)}
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int):
        now = small.get("num_attention_heads", heads)
        small["num_key_value_heads"] = now if groups == heads else 1 if groups == 1 else max(1, now // 2)
    if config.get("head_dim") is not None and config.get("head_dim") == config.get("qk_rope_head_dim"):
        small["head_dim"] = min(config["head_dim"], SIZES["qk_rope_head_dim"])
    small |= {key: token for key, token in TOKENS.items() if _exceeds(config.get(key), SIZES["vocab_size"] - 1)}
    small |= FAMILIES.get(str(config.get("model_type")), {})
    layers = small.get("num_hidden_layers", small.get("num_layers"))
    for key in PER_LAYER:
        if layers and key not in small and isinstance(types := config.get(key), Sequence):
            small[key] = types[:layers]
    if isinstance(text := config.get("text_config"), Mapping):
        known = {key: value for key, value in text.items() if key not in ("dtype", "attn_implementation")}
        small["text_config"] = {**known, **small_sizes(text)}
    return small


def _exceeds(size: Any, most: int) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > most
