"""Weights are read from a folder exactly, or the folder is refused by name."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from paceline.config import ModelConfig
from paceline.errors import ModelError
from paceline.models.source import ModelSource
from paceline.models.tiny import TINY
from paceline.parallel.precision import Masters


def tiny(family):
    head, config = TINY[family]
    return ModelSource.of(ModelConfig(config=config), head)


def read(folder, head="causal", seed=7):
    return ModelSource.of(ModelConfig(path=str(folder)), head).build(seed)


def edit(folder, change):
    """Rewrite the weights of ``folder`` after ``change`` was applied to them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    tiny("llama").build(3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", TINY)
def test_weights_come_back_as_they_were_saved(tmp_path, family):
    model = tiny(family).build(3)
    model.save_pretrained(tmp_path)
    loaded = read(tmp_path, TINY[family][0])
    assert same(loaded, model)
    assert loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers(), strict=True))


def test_shards_are_read_as_one_model(tmp_path):
    model = tiny("llama").build(3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(read(tmp_path), model)


def test_half_precision_is_read_into_fp32(tmp_path):
    model = tiny("gpt2").build(3, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = read(tmp_path)
    assert loaded.dtype == torch.float32
    assert all(torch.equal(p, model.get_parameter(name).float()) for name, p in loaded.named_parameters())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_base_model_gets_a_head_from_the_seed_and_says_so(tmp_path, caplog):
    source = tiny("bert")
    base = AutoModel.from_config(source.hugging_face_config())
    base.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="paceline"):
        first, again, other = read(tmp_path, "masked"), read(tmp_path, "masked"), read(tmp_path, "masked", seed=8)
    assert "has no cls.predictions.bias, cls.predictions.transform.LayerNorm.bias" in caplog.text
    assert same(first, again)
    assert torch.equal(first.bert.encoder.layer[1].output.dense.weight, base.encoder.layer[1].output.dense.weight)
    made = "cls.predictions.transform.dense.weight"
    assert torch.equal(first.get_parameter(made), source.build(7).get_parameter(made))
    assert not torch.equal(first.get_parameter(made), other.get_parameter(made))
    assert first.cls.predictions.decoder.weight is first.bert.embeddings.word_embeddings.weight
    assert first.cls.predictions.decoder.bias is first.cls.predictions.bias


def test_a_head_and_a_pooler_that_are_not_used_are_said(tmp_path, caplog):
    whole = AutoModelForPreTraining.from_config(tiny("bert").hugging_face_config())
    whole.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="paceline"):
        loaded = read(tmp_path, "masked")
    assert "also holds bert.pooler.dense.bias, bert.pooler.dense.weight, cls.seq_relationship.bias" in caplog.text
    assert torch.equal(loaded.cls.predictions.transform.dense.weight, whole.cls.predictions.transform.dense.weight)


def test_a_complete_folder_is_read_without_a_word(folder, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        read(folder)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_a_lacking_tensor_is_named(folder):
    edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight\. Its config\.json and its weights"
    ):
        read(folder)


def test_layers_that_the_config_does_not_have_are_named(folder):
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    config.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"holds model\.layers\.1\.input_layernorm\.weight, .* and 3 more, which the model"
    ):
        read(folder)


def test_another_shape_is_named_with_both_shapes(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(
        ModelError, match=r"1 tensors have another shape .* model\.norm\.weight: \[31\] in the file, \[32\]"
    ):
        read(folder)


def test_weights_that_should_be_tied_but_differ_are_refused(tmp_path):
    tiny("gpt2").build(3).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(128, 32)}))
    with pytest.raises(ModelError, match=r"ties lm_head\.weight to transformer\.wte\.weight, but the file holds two"):
        read(tmp_path)


def test_a_damaged_file_is_one_line(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"the weights in .* cannot be read: ") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_head_asked_for_is_refused(folder):
    with pytest.raises(ModelError, match="model family 'llama' has no masked head"):
        read(folder, "masked")


def test_an_encoder_read_as_a_causal_model_does_not_see_ahead(tmp_path):
    tiny("bert").build(3).save_pretrained(tmp_path)
    model = read(tmp_path).eval()
    first, second = torch.arange(9)[None], torch.arange(9)[None].clone()
    second[0, -1] = 50
    with torch.no_grad():
        one, two = model(input_ids=first, use_cache=False).logits, model(input_ids=second, use_cache=False).logits
    assert torch.equal(one[:, :-1], two[:, :-1])


def mapped(tensor):
    """The file that a tensor's memory is mapped from; None for memory of the process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return Path(line[line.index("/") :]) if "/" in line else None
    raise LookupError(tensor.data_ptr())


def as_stored(folder):
    return ModelSource.of(ModelConfig(path=str(folder)), "causal").build(7, dtype=None)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def stored(request, tmp_path):
    """A folder with weights of one dtype, its model in fp32, and the dtype."""
    model = tiny("gemma").build(3).to(request.param)  # computes a scale of its embedding itself
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model.float(), request.param


def test_weights_left_as_stored_are_mapped_and_cast_later_to_the_same_values(stored):
    folder, model, dtype = stored
    left, read_at_once = as_stored(folder), read(folder)
    for name, parameter in left.named_parameters():
        assert parameter.dtype == dtype and mapped(parameter) == folder / "model.safetensors", name
    assert all(torch.equal(a, b) for a, b in zip(left.buffers(), read_at_once.buffers(), strict=True))
    assert {buffer.dtype for buffer in left.buffers()} == {torch.float32}
    assert same(left.float(), model)


def test_a_step_on_mapped_weights_leaves_the_file_as_it_is(stored):
    folder, _, _ = stored
    before = (folder / "model.safetensors").read_bytes()
    model = as_stored(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_learns_is_in_memory_of_its_own(stored, dtype):
    folder, expected, _ = stored
    model = as_stored(folder)
    model.model.norm.weight.requires_grad_(False)
    masters = Masters(model, dtype)
    for parameter in (*model.parameters(), *masters.parameters.values()):
        assert mapped(parameter) is None
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, master in masters.parameters.items():
        assert master.dtype == torch.float32 and torch.equal(master, expected.get_parameter(name))


def test_weights_of_several_dtypes_are_read_into_fp32(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()}))
    assert {p.dtype for p in as_stored(folder).parameters()} == {torch.float32}


def test_experts_stored_one_by_one_come_together_in_the_stored_dtype(tmp_path):
    model = tiny("mixtral").build(3).bfloat16()
    model.save_pretrained(tmp_path)
    assert any(".experts.1." in name for name in load_file(tmp_path / "model.safetensors"))
    left = as_stored(tmp_path)
    assert {p.dtype for p in left.parameters()} == {torch.bfloat16} and same(left, model)
