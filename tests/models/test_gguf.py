"""A GGUF file becomes a plain model folder."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from paceline.config import ModelConfig
from paceline.errors import MissingExtraError, ModelError
from paceline.models.gguf import import_gguf
from paceline.models.source import ModelSource

WIDTH, FEED_FORWARD, LAYERS, HEADS = 32, 64, 2, 4
TOKENS = ["<eos>", "a", "b", "ab", "c", "Ġ"]


def tensors():
    """A llama of two layers under the names of llama.cpp."""
    random = np.random.default_rng(3)

    def matrix(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    result = {"token_embd.weight": matrix(len(TOKENS), WIDTH), "output_norm.weight": matrix(WIDTH)}
    for layer in range(LAYERS):
        parts = {"attn_q": WIDTH, "attn_k": WIDTH, "attn_v": WIDTH, "attn_output": WIDTH}
        result |= {f"blk.{layer}.{name}.weight": matrix(rows, WIDTH) for name, rows in parts.items()}
        result |= {f"blk.{layer}.{name}.weight": matrix(FEED_FORWARD, WIDTH) for name in ("ffn_gate", "ffn_up")}
        result[f"blk.{layer}.ffn_down.weight"] = matrix(WIDTH, FEED_FORWARD)
        result |= {f"blk.{layer}.{name}.weight": matrix(WIDTH) for name in ("attn_norm", "ffn_norm")}
    return result


def write(file, weights):
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b"])
    for name in ("bos", "eos", "unk"):
        getattr(writer, f"add_{name}_token_id")(0)
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_becomes_a_folder_with_the_same_weights_and_tokenizer(tmp_path):
    weights = tensors()
    write(tmp_path / "tiny.gguf", weights)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "model", torch.float32)
    source = ModelSource.of(ModelConfig(path=str(tmp_path / "model")), "causal")
    model = source.build(0)
    assert (source.family, source.vocabulary, source.max_positions) == ("llama", len(TOKENS), 64)
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    }.items():
        assert torch.equal(model.get_parameter(f"{ours}.weight"), torch.from_numpy(weights[f"{theirs}.weight"])), ours
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # llama.cpp pairs neighbouring rows of a head for rotary positions, transformers its two halves
    rows = torch.from_numpy(weights["blk.0.attn_q.weight"]).reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, rows.transpose(1, 2).reshape(WIDTH, WIDTH))
    assert AutoTokenizer.from_pretrained(source.tokenizer)("abc", add_special_tokens=False)["input_ids"] == [3, 4]
    assert not (tmp_path / ".model.new").exists()


def test_a_file_that_lacks_a_weight_is_refused_and_leaves_nothing(tmp_path):
    weights = tensors()
    del weights["blk.1.ffn_up.weight"]
    write(tmp_path / "tiny.gguf", weights)
    with pytest.raises(
        ModelError, match=r"lacks 1 weights of its model, among them model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_what_is_no_gguf_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"absent\.gguf does not exist; expected a GGUF file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "model")
    (tmp_path / "text.gguf").write_text("hello " * 100)
    with pytest.raises(ModelError, match=r"text\.gguf cannot be imported to .*") as caught:
        import_gguf(tmp_path / "text.gguf", tmp_path / "model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="exists already"):
        import_gguf(tmp_path / "text.gguf", tmp_path)


def test_without_the_extra_the_message_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'paceline\[gguf\]'"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "model")
