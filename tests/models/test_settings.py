"""Every mistake in a model's config is found before anything is built."""

import pytest

from paceline.config import ModelConfig
from paceline.errors import ConfigError
from paceline.models.settings import hugging_face_config, known_keys
from paceline.models.source import ModelSource
from paceline.models.tiny import TINY

LLAMA = TINY["llama"][1]


def problems(settings):
    with pytest.raises(ConfigError) as caught:
        hugging_face_config(settings, {})
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "lama"}, "model_type='lama': unknown model family, did you mean 'llama'?"),
        ({"model_type": "llama2"}, "model_type='llama2': unknown model family, did you mean 'llama'?"),
        ({"model_type": "qqqqqqq"}, "model_type='qqqqqqq': unknown model family, for example llama, gpt2, qwen3,"),
        ({"model_type": ["llama"]}, "model_type=['llama']: unknown model family, did you mean 'llama'?"),
        ({"hidden_sise": 64}, "hidden_sise: unknown key, did you mean 'hidden_size'?"),
        ({"hidden_layers": 2}, "hidden_layers: unknown key, did you mean 'num_hidden_layers'?"),
        ({"zzz": 2}, "zzz: unknown key, llama has: attention_bias, "),
        ({"temperature": 0.7}, "temperature: unknown key, "),
        ({"dtype": "bfloat16"}, "dtype: not read here, set precision instead"),
        ({"attn_implementation": "eager"}, "attn_implementation: not read here, set model.attention instead"),
        ({"hidden_size": -32}, "hidden_size=-32: expected at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected at least 1"),
        ({"vocab_size": 0}, "vocab_size=0: expected at least 1"),
        (
            {"num_attention_heads": 3},
            "num_attention_heads=3: does not divide hidden_size=32, use for example 1 or 2 or 4",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide num_attention_heads=4, use for example"),
        (
            {"num_attention_heads": 32},
            "num_attention_heads=32: gives heads of width 1, but rotary positions need an even",
        ),
        ({"head_dim": 7}, "head_dim=7: gives heads of width 7, but rotary positions need an even width"),
        ({"hidden_act": "sillu"}, "hidden_act='sillu': unknown activation, did you mean 'silu'?"),
        ({"hidden_size": "32"}, "hidden_size='32': expected int"),
        ({"hidden_size": 32.0}, "hidden_size=32.0: expected int"),
        (
            {"initializer_range": 3.0},
            "initializer_range: value must be greater or equal to 0.0 and smaller or equal to 1.0",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': expected bool"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_the_way_to_mend_it(changes, expected):
    found = problems({**LLAMA, **changes})
    assert len(found) == 1
    assert found[0].startswith(f"model.config.{expected}")
    assert "\n" not in found[0]


def test_all_problems_are_raised_at_once():
    found = problems({**LLAMA, "hidden_sise": 1, "hidden_size": -1, "vocab_size": 0})
    assert len(found) == 3


def test_a_default_that_does_not_fit_is_called_a_default():
    settings = {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    assert problems(settings)[0].startswith(
        "model.config.num_key_value_heads=32 (the default of qwen3): does not divide"
    )


def test_sizes_are_reported_under_the_names_of_the_family():
    assert problems({**TINY["gpt2"][1], "n_head": 5})[0].startswith("model.config.n_head=5: does not divide n_embd=32")
    assert problems({**TINY["t5"][1], "d_kv": -8}) == ["model.config.d_kv=-8: expected at least 1"]


def test_both_spellings_of_an_attribute_are_known():
    """Qwen3-MoE's field is num_experts; its saved configs say num_local_experts."""
    plain = {key: value for key, value in TINY["qwen3_moe"][1].items() if key != "num_experts"}
    assert [hugging_face_config({**plain, key: 6}, {}).num_experts for key in ("num_experts", "num_local_experts")] == [
        6,
        6,
    ]


def test_more_experts_than_there_are_cannot_be_chosen():
    found = problems({**TINY["mixtral"][1], "num_experts_per_tok": 5})
    assert found == ["model.config.num_experts_per_tok=5: expected at most the number of experts, 4"]


def test_keys_inside_a_part_are_checked_too():
    settings = {"model_type": "gemma3", "text_config": {"hidden_sise": 3}}
    assert problems(settings) == ["model.config.text_config.hidden_sise: unknown key, did you mean 'hidden_size'?"]


def test_other_spellings_of_transformers_are_known():
    config = hugging_face_config({**LLAMA, "rope_theta": 5000.0}, {})
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert hugging_face_config({**TINY["gpt2"][1], "num_hidden_layers": 3}, {}).n_layer == 3


@pytest.mark.parametrize("family", TINY)
def test_what_a_family_saves_it_also_reads(family):
    config = hugging_face_config(TINY[family][1], {})
    own = set(config.to_diff_dict()) - {"model_type", "dtype", "_attn_implementation_internal"}
    assert own <= known_keys(type(config)) | {"transformers_version"}


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "olmo"])
def test_token_ids_of_the_family_are_not_used_with_another_tokenizer(family):
    config = hugging_face_config(TINY[family][1], {})
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    config = hugging_face_config({**TINY[family][1], "eos_token_id": 9}, {"eos_token_id": 1, "pad_token_id": 2})
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 9, 2)


def test_a_decoder_after_an_encoder_knows_where_to_start():
    settings = TINY["t5"][1]
    assert hugging_face_config(settings, {"pad_token_id": 4, "eos_token_id": 1}).decoder_start_token_id == 4
    assert hugging_face_config(settings, {"eos_token_id": 1}).decoder_start_token_id == 1
    assert hugging_face_config({**settings, "decoder_start_token_id": 7}, {}).decoder_start_token_id == 7
    assert problems({**LLAMA, "decoder_start_token_id": 7})[0].startswith(
        "model.config.decoder_start_token_id: unknown"
    )


def test_a_config_that_only_the_model_refuses_is_one_line(caplog):
    settings = {**LLAMA, "rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}
    with pytest.raises(Exception, match="model family 'llama' refuses this config: 'foo'"):
        ModelSource.of(ModelConfig(config=settings), "causal").meta()
