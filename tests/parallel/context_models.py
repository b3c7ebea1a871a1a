"""Tiny models whose attention has all that attention over ranks must get right, and batches for them."""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from paceline.data.rows import Row
from paceline.data.tokenizer import SpecialTokens
from paceline.models.attention import MATMUL, register
from paceline.objectives.base import ObjectiveContext
from paceline.objectives.masked import Masked
from paceline.objectives.next_token import NextToken

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
# Caps near the scores, which bend them, and windows of a few positions, in every layer or in some.
GEMMA2 = {**GROUPED, "sliding_window": 7, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
NO_DROPOUT = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
)
FAMILIES = {
    "llama": {**SHAPE, "model_type": "llama"},
    "llama-2": {**GROUPED, "model_type": "llama"},
    "llama-1": {**GROUPED, "model_type": "llama", "num_key_value_heads": 1},
    "mistral": {**GROUPED, "model_type": "mistral", "sliding_window": 5},
    "gemma2": {**GEMMA2, "model_type": "gemma2"},
    "gemma3": {
        **GROUPED,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "layer_types": LAYER_TYPES,
    },
    "qwen3": {**GROUPED, "model_type": "qwen3"},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
    },
    "opt": {**SHAPE, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 32},
    "bert": {**SHAPE, "model_type": "bert"},
    "roberta": {**SHAPE, "model_type": "roberta", "is_decoder": True},
    "gpt_oss": {
        **GROUPED,
        "model_type": "gpt_oss",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 7,
    },
}


def build(family, overrides=None):
    """An fp64 model whose every parameter is at a random value that matters."""
    options = dict(FAMILIES[family]) | (overrides or {})
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    for name in NO_DROPOUT:
        if hasattr(config, name) and name not in (overrides or {}):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    register()
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the others lack sinks, or fp64
    model = auto.from_config(config, **(eager if family == "gpt_oss" else {"attn_implementation": MATMUL})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model.train()


def make_batch(family, kind, tokens):
    """Two rows, of documents that begin inside of pieces; with ``padding`` the second row is shorter."""
    rng = np.random.default_rng(3)
    special = SpecialTokens(end=1, vocabulary=VOCABULARY, mask=2, pad=0)
    context = ObjectiveContext(special=special, sequence_tokens=tokens, isolate_documents=kind == "documents")
    options = Masked(probability=0.3) if family == "bert" else NextToken()
    length = options.row_tokens(context)
    starts = [np.array([0, 4, length // 2 + 3, length - 2]), np.array([1, length // 2 + 2])]
    lengths = [length, length - 5 if kind == "padding" else length]
    rows = [
        Row(i, rng.integers(3, VOCABULARY, n), s[s < n]) for i, (n, s) in enumerate(zip(lengths, starts, strict=True))
    ]
    batch = options.build(context).batch(rows, seed=0, step=1)
    if kind == "masked":  # all targets are in the first quarter
        batch.labels[:, tokens // 4 :] = -100
        batch = replace(batch, count=int((batch.labels != -100).sum()))
    return batch
