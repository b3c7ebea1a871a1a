import inspect

import pytest
import torch

from paceline.errors import PlanError
from paceline.parallel.compiled import compile_blocks
from parity import tiny_llama


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_share_a_graph_and_give_the_same_gradients(ids):
    model = tiny_llama().float()
    expected = gradients(model, ids)
    torch._dynamo.utils.counters.clear()
    assert compile_blocks(model) == 2
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.fixture
def called(monkeypatch):
    """The forwards that were called as compiled ones."""
    names = []
    monkeypatch.setattr(
        torch, "compile", lambda forward: lambda *args, **kw: names.append(forward.__qualname__) or forward(*args, **kw)
    )
    return names


def test_only_training_is_compiled(ids, called):
    model = tiny_llama()
    compile_blocks(model)
    model.eval()(input_ids=ids)
    assert not called
    model.train()(input_ids=ids)
    assert called == ["LlamaDecoderLayer.forward"] * 2


def test_a_model_without_blocks_is_compiled_whole_and_keeps_its_signature(called):
    class Plain(torch.nn.Linear):
        def forward(self, input_ids):
            return torch.nn.functional.linear(input_ids, self.weight, self.bias)

    model = Plain(3, 3)
    assert compile_blocks(model) == 1
    assert list(inspect.signature(model.forward).parameters) == ["input_ids"]
    model(input_ids=torch.zeros(3))
    assert len(called) == 1


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PlanError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        compile_blocks(tiny_llama())


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(PlanError, match=rf"needs the headers of Python, and there is no {tmp_path}/Python.h"):
        compile_blocks(tiny_llama())
