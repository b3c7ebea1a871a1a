from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paceline import registry
from paceline.errors import ModelError
from paceline.objectives import head_cross_entropy
from paceline.objectives.base import holds_all_logits, logits_of, token_loss
from paceline.objectives.deferred import DeferredLogits, deferring

VOCABULARY = 64


class MostRows(TorchDispatchMode):
    """The most rows over the vocabulary that the result of any operation has."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, leaf.numel() // VOCABULARY)
        return result


@pytest.fixture
def batch(context, documents, pack):
    def make(objective):
        rows = [pack(documents(35, 27, seed=i), i) for i in range(4)]
        return registry.OBJECTIVES.load(objective)().build(context()).batch(rows, seed=0, step=0)

    return make


@pytest.fixture
def narrow(monkeypatch):
    """Chunks of four rows."""
    monkeypatch.setattr(head_cross_entropy, "LEAST_ROWS", 4)
    monkeypatch.setattr(head_cross_entropy, "CPU_CHUNK", 1)


DEFER = [
    ("llama", "causal", "next_token"),
    ("gpt2", "causal", "next_token"),
    ("opt", "causal", "next_token"),  # calls contiguous() on what its head gives
    ("bert", "masked", "masked"),
    ("t5", "seq2seq", "seq2seq"),
]


def most_rows(net, batch):
    with MostRows() as most:
        token_loss(net, batch).backward()
    return most.rows


@pytest.mark.parametrize(("family", "head", "objective"), DEFER)
def test_all_logits_are_never_there(family, head, objective, model, batch, narrow):
    made = batch(objective)
    width = 32  # rows of the table, transposed
    assert most_rows(model(family, head), made) == width < made.labels.numel()


def test_a_family_that_changes_its_logits_gets_them_whole(model, batch, narrow):
    """Gemma 2 caps them: what it then gives is no longer what the head gave."""
    net, made = capped(), batch("next_token")
    assert most_rows(net, made) == made.labels.numel()
    assert holds_all_logits(net, made) and not holds_all_logits(model("llama"), made)
    capped_logits = logits_of(net, made.inputs)
    expected = F.cross_entropy(capped_logits.flatten(0, 1), made.labels.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(token_loss(net, made), expected)


def capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.1, **sizes)
    ).eval()


@pytest.mark.parametrize(("family", "head", "objective"), DEFER)
def test_gradients_are_those_of_the_whole_logits(family, head, objective, model, batch, narrow):
    net, made = model(family, head).double(), batch(objective)
    token_loss(net, made).backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    logits = logits_of(net, made.inputs)
    F.cross_entropy(logits.flatten(0, 1), made.labels.flatten(), reduction="sum", ignore_index=-100).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.fixture
def deferred():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), nn.Linear(4, 5)
    return DeferredLogits.of(hidden, head.weight, head.bias), head(hidden)


def test_whatever_is_done_with_deferred_logits_is_done_with_the_logits(deferred):
    logits, whole = deferred
    assert logits.shape == whole.shape and logits.requires_grad
    for used in (
        logits * 2,
        2 * logits,
        torch.cat([logits, logits]),
        logits.float(),
        logits[:, -1:],
        logits.softmax(-1),
    ):
        assert type(used) is torch.Tensor
    assert torch.equal(logits.tanh(), whole.tanh()) and torch.equal(logits[:, 1], whole[:, 1])


def test_logits_that_are_used_have_their_gradients():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), nn.Linear(4, 5)
    inputs = (hidden, head.weight, head.bias)
    found = torch.autograd.grad(DeferredLogits.of(*inputs).tanh().sum(), inputs)
    assert all(map(torch.equal, found, torch.autograd.grad(head(hidden).tanh().sum(), inputs)))


def test_a_hook_of_the_output_is_called(deferred):
    """As FSDP2 sets one, to gather weights before the backward pass."""
    logits, _ = deferred
    told = []
    logits.register_hook(told.append)
    head_cross_entropy.head_cross_entropy(*logits.parts(), torch.ones(2, 3, dtype=torch.int64)).backward()
    assert len(told) == 1


def test_the_head_is_itself_again_afterwards(model):
    net, inputs = model("llama"), {"input_ids": torch.arange(6)[None]}
    with deferring(net):
        assert isinstance(logits_of(net, inputs), DeferredLogits)
    with pytest.raises(ModelError), deferring(net):
        raise ModelError
    assert type(logits_of(net, inputs)) is torch.Tensor and "forward" not in vars(net.lm_head)


def test_a_head_that_is_more_than_a_linear_layer_is_left_alone(model):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = model("llama")
    net.lm_head = Scaled(32, VOCABULARY)
    with deferring(net):
        assert type(logits_of(net, {"input_ids": torch.arange(6)[None]})) is torch.Tensor


def test_in_fp16_gradients_ahead_of_the_backward_pass_have_the_scale_of_the_batch(model, batch):
    """2^-30 is nothing in fp16, and neither is a gradient that has been multiplied by it."""

    def gradient(scale):
        net = model("llama").half()
        token_loss(net, replace(batch("next_token"), scale=scale)).backward()
        return net.lm_head.weight.grad

    assert gradient(1.0).any() and not gradient(2.0**-30).any()
