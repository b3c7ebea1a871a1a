"""Rows, contexts and models that are small enough to compare numbers on."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from paceline.data.rows import Row
from paceline.data.tokenizer import SpecialTokens
from paceline.objectives.base import ObjectiveContext

VOCABULARY = 64
EOS, PAD, MASK, CLS, SEP = 1, 0, 2, 3, 4
SENTINELS = tuple(range(60, 50, -1))
WORDS = np.arange(5, 50)  # ids that mean nothing else

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
SHAPES = {
    "albert": {**DECODER, "embedding_size": 16},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
    "bert": DECODER,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": DECODER,
    "gemma": {**GROUPED, "head_dim": 8},
    "gpt2": GPT2,
    "gpt_neox": DECODER,
    "llama": GROUPED,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "mistral": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "olmo": GROUPED,
    "opt": {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3": {**GROUPED, "head_dim": 8},
    "roberta": DECODER,
    "t5": T5,
}
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}


@pytest.fixture
def model():
    """Build a tiny model of a family, always with the same weights, without dropout."""

    def build(family, head="causal", attention=None):
        config = AutoConfig.for_model(family, **COMMON | SHAPES[family])
        if attention is not None:
            config._attn_implementation = attention
        torch.manual_seed(0)
        return CLASSES[head].from_config(config).eval()

    return build


@pytest.fixture
def context():
    """Make a context; keywords replace fields, or special tokens by their name."""

    def make(**changes):
        special = {"vocabulary": VOCABULARY, "end": EOS, "eos": EOS, "pad": PAD, "mask": MASK, "sentinels": SENTINELS}
        special |= {field.name: changes.pop(field.name) for field in fields(SpecialTokens) if field.name in changes}
        return ObjectiveContext(
            special=SpecialTokens(**special), **{"sequence_tokens": 16, "decoder_start": PAD} | changes
        )

    return make


@pytest.fixture
def documents():
    """Make documents of given lengths, end-of-text token included."""

    def make(*lengths, seed=0):
        generator = np.random.default_rng(seed)
        return [np.append(generator.choice(WORDS, length - 1), EOS) for length in lengths]

    return make


@pytest.fixture
def pack():
    """Join documents to one row."""

    def make(documents, sequence=0, **fields):
        starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
        return Row(sequence, np.concatenate(documents), starts, **fields)

    return make
