"""An exported folder is the trained model, for transformers and for whatever else reads such folders."""

import json
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from paceline.config import ModelConfig
from paceline.errors import ModelError
from paceline.export.hugging_face import write
from paceline.models.heads import auto_class
from paceline.models.source import ModelSource
from paceline.models.tiny import TINY


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a byte-level tokenizer of 259 entries; the first two are special."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def source(family, **changes):
    head, config = TINY[family]
    made = ModelSource.of(ModelConfig(config={**config, "vocab_size": 260, **changes}), head)
    return made.with_vocabulary(258, {"eos": 0, "pad": 1})


def logits(model, head):
    ids = torch.arange(2, 34).reshape(2, 16)
    more = {"decoder_input_ids": ids[:, :9]} if head == "seq2seq" else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


def load(folder, head):
    return auto_class(head).from_pretrained(folder)


@pytest.mark.parametrize("family", TINY)
def test_the_export_loads_and_gives_the_same_logits_to_the_bit(family, tmp_path, tokenizer):
    made = source(family)
    model = made.build(3)
    write(tmp_path / "export", model.state_dict(), made, tokenizer)
    loaded = load(tmp_path / "export", made.head)
    assert type(loaded) is type(model)
    assert torch.equal(logits(model, made.head), logits(loaded, made.head))
    assert AutoTokenizer.from_pretrained(tmp_path / "export").decode([70, 71]) == AutoTokenizer.from_pretrained(
        tokenizer
    ).decode([70, 71])
    again = ModelSource.of(ModelConfig(path=str(tmp_path / "export")), made.head)
    assert again.tokenizer == str(tmp_path / "export")
    assert torch.equal(logits(again.build(0), made.head), logits(model, made.head))


@pytest.mark.parametrize(
    "family", [family for family in TINY if family not in ("llama", "mistral", "qwen3", "mixtral", "qwen3_moe")]
)
def test_tied_weights_are_stored_once(family, tmp_path, tokenizer):
    made = source(family, tie_word_embeddings=True)
    model = made.build(3)
    write(tmp_path / "export", model.state_dict(), made, tokenizer)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    assert len(stored) < len(model.state_dict())


def test_one_name_of_a_tied_parameter_is_enough(tmp_path, tokenizer):
    made = source("gpt2")
    model = made.build(3)
    write(tmp_path / "once", dict(model.named_parameters()), made, tokenizer)
    tensors = model.state_dict()
    del tensors["transformer.wte.weight"]  # the other name, lm_head.weight, is left
    write(tmp_path / "other", tensors, made, tokenizer)
    for name in ("once", "other"):
        assert torch.equal(logits(load(tmp_path / name, "causal"), "causal"), logits(model, "causal"))


def test_experts_are_stored_as_the_family_publishes_them(tmp_path, tokenizer):
    made = source("mixtral")
    write(tmp_path / "export", made.build(3).state_dict(), made, tokenizer)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert stored["model.layers.1.block_sparse_moe.experts.3.w2.weight"].shape == (32, 48)
    assert not any("gate_up_proj" in name for name in stored)


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_shards_load_as_one_model(family, tmp_path, tokenizer):
    made = source(family)
    model = made.build(3)
    write(tmp_path / "export", model.state_dict(), made, tokenizer, shard_bytes=30_000)
    files = sorted((tmp_path / "export").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 60_000 for file in files)
    assert torch.equal(logits(load(tmp_path / "export", made.head), made.head), logits(model, made.head))


def test_half_precision_is_what_rounding_gives(tmp_path, tokenizer):
    made = source("llama")
    model = made.build(3)
    write(tmp_path / "export", model.state_dict(), made, tokenizer, torch.bfloat16)
    loaded = load(tmp_path / "export", "causal")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(p, model.get_parameter(name).to(torch.bfloat16)) for name, p in loaded.named_parameters())


class Fetched(Mapping):
    """Tensors made when asked for, as from ranks that each hold a part."""

    def __init__(self, tensors):
        self.tensors, self.asked = tensors, []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.tensors[name].clone()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __contains__(self, name):
        return name in self.tensors


def test_each_tensor_is_fetched_once_and_block_by_block(tmp_path, tokenizer):
    made = source("mixtral")
    fetched = Fetched(made.build(3).state_dict())
    write(tmp_path / "export", fetched, made, tokenizer)
    assert sorted(fetched.asked) == sorted(fetched.tensors)
    blocks = [name.split(".")[2] for name in fetched.asked if name.startswith("model.layers.")]
    assert blocks == sorted(blocks)


def test_what_stands_beside_the_weights(tmp_path, tokenizer):
    made = source("llama")
    write(tmp_path / "export", made.build(3).state_dict(), made, tokenizer)
    assert {file.name for file in (tmp_path / "export").iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (0, 1, None)
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"] == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| parameters | 32,160 |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_generation_knows_where_a_decoder_starts(tmp_path, tokenizer):
    made = source("t5")
    write(tmp_path / "export", made.build(3).state_dict(), made, tokenizer)
    model = load(tmp_path / "export", "seq2seq")
    assert model.generation_config.decoder_start_token_id == 1
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 4)


def test_the_generation_config_of_the_model_it_started_from_is_kept(tmp_path, tokenizer):
    source("llama").build(3).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    made = ModelSource.of(ModelConfig(path=str(tmp_path / "start")), "causal")
    write(tmp_path / "export", made.build(3).state_dict(), made, tokenizer)
    assert load(tmp_path / "export", "causal").generation_config.temperature == 0.6


def test_an_older_export_is_replaced_whole(tmp_path, tokenizer):
    folder = tmp_path / "export"
    made = source("llama")
    write(folder, made.build(3).state_dict(), made, tokenizer, shard_bytes=30_000)
    newer = made.build(4)
    write(folder, newer.state_dict(), made, tokenizer)
    assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(load(folder, "causal"), "causal"), logits(newer, "causal"))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_that_fails_leaves_the_older_one(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "export"
    made = source("llama")
    model = made.build(3)
    write(folder, model.state_dict(), made, tokenizer)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paceline.export.hugging_face.write_weights", full)
    with pytest.raises(ModelError, match=r"the export cannot be written to .*: No space left on device"):
        write(folder, made.build(4).state_dict(), made, tokenizer)
    assert torch.equal(logits(load(folder, "causal"), "causal"), logits(model, "causal"))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_interrupted_by_a_kill_does_not_stand_in_the_way(tmp_path, tokenizer):
    made = source("llama")
    (tmp_path / ".export.new").mkdir()
    (tmp_path / ".export.new" / "model.safetensors").write_bytes(b"half")
    write(tmp_path / "export", made.build(3).state_dict(), made, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"not those of LlamaForCausalLM: model\.norm\.weight is missing\."),
        (lambda t: t.update(extra=torch.ones(1)), r"extra is not a tensor of the model\."),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight has the shape \[3\]; .* \[32\]\.",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, tokenizer, change, message):
    made = source("llama")
    tensors = made.build(3).state_dict()
    change(tensors)
    with pytest.raises(ModelError, match=message):
        write(tmp_path / "export", tensors, made, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_content_is_not_replaced(tmp_path, tokenizer):
    (tmp_path / "notes.txt").write_text("keep me")
    made = source("llama")
    with pytest.raises(ModelError, match="exists and is not a model folder"):
        write(tmp_path, made.build(3).state_dict(), made, tokenizer)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    made = source("llama")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty holds no tokenizer; expected tokenizer\.json"):
        write(tmp_path / "export", made.build(3).state_dict(), made, tmp_path / "empty")
