"""Where a model comes from, and what can be known of it without building it."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from paceline.config import ModelConfig
from paceline.errors import ConfigError, ModelError
from paceline.models.describe import count
from paceline.models.heads import heads_of
from paceline.models.presets import PRESETS
from paceline.models.source import POSITIONS_AFTER_PADDING, ModelSource
from paceline.models.tiny import TINY


def source(head="causal", **config):
    return ModelSource.of(ModelConfig(**config), head)


def saved(folder, family="llama"):
    source(TINY[family][0], config=TINY[family][1]).build(3).save_pretrained(folder)
    return str(folder)


def test_a_source_costs_no_import_of_transformers():
    code = (
        "import sys; from paceline.models.source import ModelSource; from paceline.config import ModelConfig;"
        "s = ModelSource.of(ModelConfig(preset='llama-1m'), 'causal');"
        "assert (s.vocabulary, s.family) == (4096, 'llama');"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def size(word):
    return float(word.rstrip("m")) * 1e6


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_number_of_parameters_its_name_says(name):
    settings = dict(PRESETS[name])
    said = name.rpartition("-")[2]
    if "x" in said:  # 8x5m: 8 experts, of which one alone makes a model of 5m
        experts, _, said = said.partition("x")
        assert settings["num_local_experts"] == int(experts)
        settings.update(num_local_experts=1, num_experts_per_tok=1)
    heads = heads_of(settings["model_type"])
    model = source("masked" if "masked" in heads else heads[0], config=settings).meta()
    assert count(model) == pytest.approx(size(said), rel=0.1)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"model\.preset='lama-1m': unknown name, did you mean 'llama-1m'\?"):
        source(preset="lama-1m")


@pytest.mark.parametrize("family", TINY)
def test_a_model_is_described_without_memory(family):
    head, config = TINY[family]
    made = source(head, config=config)
    model = made.meta()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.training
    assert (made.family, made.vocabulary, made.tokenizer) == (family, 128, None)
    assert made.max_positions == (None if family == "t5" else 64)
    assert model.dtype == torch.float32


def test_a_source_can_be_sent_to_another_process():
    made = source(preset="gpt2-17m").with_vocabulary(100, {"eos": 1})
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize(
    ("family", "head", "has"),
    [
        ("llama", "masked", "causal"),
        ("t5", "causal", "seq2seq"),
        ("albert", "seq2seq", "masked"),
        ("gpt2", "seq2seq", "causal"),
    ],
)
def test_a_head_the_family_does_not_have_is_refused(family, head, has):
    with pytest.raises(ModelError, match=f"model family '{family}' has no {head} head; it has: {has}"):
        source(head, config=TINY[family][1]).meta()


@pytest.mark.parametrize("family", ["xlnet", "xlm", "cpmant"])
def test_a_family_that_would_see_what_it_has_to_predict_is_refused(family):
    with pytest.raises(ModelError, match="it would see the tokens it has to predict"):
        source(config={"model_type": family}).meta()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gemma2"])
def test_a_causal_model_does_not_see_ahead(family):
    model = source("causal", config=TINY[family][1]).build(3).eval()
    first = torch.arange(12)[None]
    second = first.clone()
    second[0, -1] = 77
    with torch.no_grad():
        one, two = (model(input_ids=ids, use_cache=False).logits for ids in (first, second))
    assert torch.equal(one[:, :-1], two[:, :-1])
    assert not torch.equal(one[:, -1], two[:, -1])


def test_the_vocabulary_comes_from_the_tokenizer_where_the_config_leaves_it_open():
    settings = {key: value for key, value in TINY["llama"][1].items() if key != "vocab_size"}
    made = source(config=settings)
    assert made.vocabulary is None
    grown = made.with_vocabulary(300, {"bos": 1, "eos": 2, "pad": 3, "mask": None, "vocabulary": 300})
    config = grown.hugging_face_config()
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (300, 1, 2, 3)
    assert grown.meta().get_input_embeddings().weight.shape == (300, 32)


@pytest.mark.parametrize("size", [0, -5, "100", 1.5, True])
def test_a_vocabulary_that_is_no_count_is_refused_before_data_is_read(size):
    with pytest.raises(ConfigError, match=r"model\.config\.vocab_size=.*: expected a whole number of at least 1"):
        _ = source(config={**TINY["llama"][1], "vocab_size": size}).vocabulary


def test_padding_that_is_also_the_end_is_not_made_a_padding_row():
    made = source(config=TINY["gemma"][1]).with_vocabulary(100, {"eos": 1, "pad": 1})
    assert made.hugging_face_config().pad_token_id is None
    assert made.vocabulary == 128
    assert made.meta().get_input_embeddings().padding_idx is None


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    for made in (source(config=TINY["llama"][1]), source(path=saved(tmp_path / "model"))):
        with pytest.raises(ModelError, match="the tokenizer has 129 entries but the model's vocabulary has 128"):
            made.with_vocabulary(129)


@pytest.mark.parametrize("family", ["roberta", "camembert", "xlm-roberta"])
def test_positions_that_count_from_padding_are_fewer(family):
    assert family in POSITIONS_AFTER_PADDING
    made = source("masked", config={**TINY["bert"][1], "model_type": family})
    model = made.build(3).eval()
    assert made.max_positions == 62
    with torch.no_grad():
        model(input_ids=torch.full((1, made.max_positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, made.max_positions + 1), 5))


def test_parameters_take_the_precision_asked_for_and_buffers_keep_theirs():
    made = source(config=TINY["llama"][1])
    full, rounded = made.build(3), made.build(3, dtype=torch.bfloat16)
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, full.get_parameter(name).to(torch.bfloat16))
    assert {buffer.dtype for buffer in rounded.buffers()} == {torch.float32}


def test_tied_parameters_stay_tied_in_any_precision():
    model = source(config=TINY["gpt2"][1]).build(3, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_attention_is_the_one_asked_for():
    made = source(config=TINY["llama"][1], attention="eager")
    assert made.meta().config._attn_implementation == "eager"
    assert made.build(3).config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"model\.attention='spda': unknown name, did you mean 'sdpa'\?"):
        source(config=TINY["llama"][1], attention="spda").meta()


def test_a_folder_is_known_from_its_config_alone(tmp_path):
    made = source(path=saved(tmp_path / "model"))
    assert (made.family, made.vocabulary, made.tokenizer) == ("llama", 128, None)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert made.tokenizer == str(tmp_path / "model")
    assert made.with_vocabulary(100, {"eos": 1}) == made


def test_a_path_that_is_no_model_says_what_it_lacks(tmp_path):
    with pytest.raises(ModelError, match="does not exist; expected a Hugging Face model folder or hub name"):
        source(path=str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        source(path=str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(ModelError, match=r"is a file; expected a folder"):
        source(path=str(config))
    with pytest.raises(ModelError, match=r"has no model\.safetensors\. To train from random values use model\.config"):
        source(path=str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which paceline does not read"):
        source(path=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="has no model_type"):
        source(path=str(tmp_path))
    config.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        source(path=str(tmp_path))
    config.write_text(json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="holds quantised weights, which cannot be trained"):
        source(path=str(tmp_path))


def test_an_index_whose_shards_are_not_all_there_is_refused(tmp_path):
    folder = tmp_path / "model"
    source(config=TINY["llama"][1]).build(3).save_pretrained(folder, max_shard_size="20KB")
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        source(path=str(folder))


def test_a_hub_name_is_first_looked_up_here_then_fetched(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def fetch(name, allow_patterns, local_files_only=False):
        asked.append((name, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        assert "*.bin" not in allow_patterns
        return saved(tmp_path / "fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert source(path="someone/model").folder == tmp_path / "fetched"
    assert asked == [("someone/model", True), ("someone/model", False)]

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: saved(tmp_path / "fetched"))
    assert source(path="someone/model").folder == tmp_path / "fetched"


def test_a_name_that_cannot_be_reached_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*arguments, **options):
        raise LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match="'some/model' is neither a folder nor a model that can be fetched") as caught:
        source(path="some/model")
    assert "\n" not in str(caught.value)
