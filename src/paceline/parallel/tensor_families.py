"""Our own tensor rules, by family (``model_type``), for what transformers has no plan for, or a wrong one.

They are laid over its plan. Patterns and styles are those of ``tensor_rules``.
"""

from collections.abc import Mapping

_QKV = {"q_proj": "column", "k_proj": "column", "v_proj": "column"}


def _under(prefix: str, rules: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": style for name, style in rules.items()}


_LLAMA_ATTENTION = _under("self_attn", {**_QKV, "o_proj": "row"})
_LLAMA = {**_LLAMA_ATTENTION, **_under("mlp", {"gate_proj": "column", "up_proj": "column", "down_proj": "row"})}
_BART = {
    **_under("self_attn", {**_QKV, "out_proj": "row"}),
    **_under("encoder_attn", {**_QKV, "out_proj": "row"}),
    **_under("layers.*", {"fc1": "column", "fc2": "row"}),
}
_GPT2 = {"attn.c_attn": "qkv", "attn.c_proj": "row", "mlp.c_fc": "column", "mlp.c_proj": "row"}
_GPT_NEO = {**_under("attention", {**_QKV, "out_proj": "row"}), "mlp.c_fc": "column", "mlp.c_proj": "row"}
_GPTJ = {**_under("attn", {**_QKV, "out_proj": "row"}), "mlp.fc_in": "column", "mlp.fc_out": "row"}
_NEOX_MLP = _under("mlp", {"dense_h_to_4h": "column", "dense_4h_to_h": "row"})
_BLOOM = {**_under("self_attention", {"query_key_value": "column", "dense": "row"}), **_NEOX_MLP}  # head by head
_PERSIMMON = {**_under("self_attn", {"query_key_value": "column", "dense": "row"}), **_NEOX_MLP}
_GPT_OSS = {
    **_LLAMA_ATTENTION,
    "self_attn.sinks": "dim-1",
    "mlp.experts": "experts",
    **_under("mlp.experts", {"gate_up_proj": "woven-1", "gate_up_proj_bias": "woven-1"}),
    **_under("mlp.experts", {"down_proj": "dim-2", "down_proj_bias": "share"}),
}
_MODERN_BERT = {**_under("attn", {**_QKV, "Wqkv": "qkv", "Wo": "row"}), "mlp.Wi": "pair", "mlp.Wo": "row"}
_BERT = {
    **_under("layer.*.attention.self", {"query": "column", "key": "column", "value": "column"}),
    "layer.*.attention.self": "enter",  # what is around it adds the hidden states to what leaves the region
    "layer.*.attention.output.dense": "row",
    "layer.*.intermediate": "enter",
    "layer.*.intermediate.dense": "column",
    "layer.*.output.dense": "row",
}
_ALBERT = {
    **_under("attention", {"query": "lone_column", "key": "lone_column", "value": "lone_column", "dense": "row"}),
    "ffn": "lone_column",
    "ffn_output": "row",
}
_T5 = {
    **_under("SelfAttention", {"q": "column", "k": "column", "v": "column", "o": "row"}),
    **_under("EncDecAttention", {"q": "column", "k": "column", "v": "column", "o": "row"}),
    "relative_attention_bias": "heads",
    **_under("DenseReluDense", {"wi": "column", "wi_0": "column", "wi_1": "column", "wo": "row"}),
}
_LFM = {
    **_under("self_attn", {**_QKV, "out_proj": "row"}),
    **_under("feed_forward", {"w1": "column", "w3": "column", "w2": "row"}),
}
_LATENT = {
    # The latents and the keys that all heads share are whole; of their gradients each rank has its heads' part.
    **_under("self_attn", {"q_proj": "column", "q_b_proj": "column", "kv_b_proj": "column", "o_proj": "row"}),
}

_GRANITE_SHARED = {**_LLAMA_ATTENTION, **_under("shared_mlp", {"input_linear": "pair", "output_linear": "row"})}
_SHARED_EXPERTS = _under("shared_experts", {"gate_proj": "column", "up_proj": "column", "down_proj": "row"})

FAMILIES: dict[str, dict[str, str]] = (
    dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt"), _GPT2)
    | dict.fromkeys(("emu3_text_model", "stablelm"), _LLAMA)
    | dict.fromkeys(("granitemoe", "hunyuan_v1_moe", "phimoe"), _LLAMA_ATTENTION)
    | dict.fromkeys(("granitemoehybrid", "granitemoeshared", "granitemoe_swa"), _GRANITE_SHARED)
    | dict.fromkeys(("bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"), _BART)
    | dict.fromkeys(("bart", "opt", "pegasus", "plbart", "whisper", "xglm"), _BART)
    | dict.fromkeys(("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie"), _BERT)
    | dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), _BERT)
    | dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), _BERT)
    | dict.fromkeys(("mt5", "t5", "umt5"), _T5)
    | dict.fromkeys(("modernbert", "modernbert-decoder"), _MODERN_BERT)
    | dict.fromkeys(("fuyu", "persimmon"), _PERSIMMON)
    | dict.fromkeys(("axk1", "deepseek_v3", "youtu"), _LATENT)
    | dict.fromkeys(("axk2", "cohere2_moe", "exaone_moe", "glm4_moe_lite", "hy_v4", "solar_open"), _SHARED_EXPERTS)
    | {
        "afmoe": {**_LLAMA, "self_attn.gate_proj": "column", **_SHARED_EXPERTS},
        "albert": _ALBERT,
        "bloom": _BLOOM,
        "gpt_neo": _GPT_NEO,
        "gpt_oss": _GPT_OSS,
        "gptj": _GPTJ,
        "lfm2": _LFM,
        "qwen2_moe": {name.replace("experts", "expert"): style for name, style in _SHARED_EXPERTS.items()},
        "inkling2_text": {"mlp.experts.gate_up_proj": "pair-2"},  # its own plan takes gate and up for one
    }
)
"""By family; those with a plan of transformers' are here for what it leaves whole."""

REFUSED = {"doge": "makes its attention mask from the values of all key/value heads"}
"""Families that have a plan which does not do here."""
