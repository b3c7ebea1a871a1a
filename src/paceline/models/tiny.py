"""The smallest useful config of each family that paceline is tested with: two layers, a hidden size of 32.

For tests, examples and rehearsals; every one trains on a laptop in milliseconds a step.
"""

from typing import Any

from paceline.models.heads import Head

_DECODER: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_ENCODER: dict[str, Any] = {**_DECODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2: dict[str, Any] = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5: dict[str, Any] = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_GROUPED = {"num_key_value_heads": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

TINY: dict[str, tuple[Head, dict[str, Any]]] = {
    "llama": ("causal", {**_DECODER, **_GROUPED, "model_type": "llama"}),
    "qwen3": ("causal", {**_DECODER, **_GROUPED, "model_type": "qwen3", "head_dim": 8}),
    "mistral": ("causal", {**_DECODER, **_GROUPED, "model_type": "mistral", "sliding_window": 16}),
    "gemma": ("causal", {**_DECODER, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("causal", {**_DECODER, **_GROUPED, "model_type": "gemma2", "head_dim": 8, "sliding_window": 16}),
    "gpt2": ("causal", {**_GPT2, "model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("causal", {**_DECODER, "model_type": "gpt_neox"}),
    "olmo": ("causal", {**_DECODER, "model_type": "olmo"}),
    "mixtral": ("causal", {**_DECODER, **_GROUPED, "model_type": "mixtral", "num_local_experts": 4}),
    "qwen3_moe": ("causal", {**_DECODER, **_GROUPED, **_MOE, "model_type": "qwen3_moe"}),
    "phi3": ("causal", {**_DECODER, **_GROUPED, "model_type": "phi3"}),
    "bert": ("masked", {**_ENCODER, "model_type": "bert"}),
    "albert": ("masked", {**_ENCODER, "model_type": "albert", "embedding_size": 16}),
    "t5": ("seq2seq", {**_T5, "model_type": "t5", "dropout_rate": 0.0}),
}

DROPOUTS: dict[str, tuple[str, ...]] = {
    "llama": ("attention_dropout",),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    "t5": ("dropout_rate",),
}
"""What makes a family drop out wherever it can, where ``TINY`` has 0."""
