"""The loss of a compiled model as one kernel."""

import shutil

import pytest
import torch
from torch import nn

from paceline.config import ModelConfig
from paceline.models.kernels import library
from paceline.models.source import ModelSource
from paceline.objectives.base import make_batch, token_loss
from paceline.objectives.fused_cross_entropy import SOURCE, fuse_loss, fused_cross_entropy, fuses_loss

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel is compiled here: no g++")


@pytest.fixture(autouse=True)
def compiled():
    library(SOURCE, "a test")


def rows(count, vocabulary, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(count, vocabulary, generator=generator)).bfloat16()
    return logits, torch.randint(vocabulary, (count,), generator=generator)


def expected(logits, labels):
    """In fp64 from the same bf16 logits."""
    log = torch.log_softmax(logits.double(), 1)
    gradient = log.exp()
    gradient[torch.arange(len(labels)), labels] -= 1.0
    return -log.gather(1, labels.unsqueeze(1)), gradient


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (3, 7), (33, 129), (5, 8192), (2, 128_257)])
@pytest.mark.parametrize("spread", [0.01, 3.0, 40.0])
def test_losses_and_gradients_are_those_of_fp64_rounded_once(count, vocabulary, spread):
    logits, labels = rows(count, vocabulary, spread)
    losses, gradient = expected(logits, labels)
    made = logits.clone()
    found = fused_cross_entropy(made, labels, learns=True)
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6)
    apart = (made.double() - gradient).abs()
    assert bool((apart <= 1.001 * 2.0**-8 * gradient.abs() + 1e-6).all())


def test_without_learning_logits_are_left_as_they_are():
    logits, labels = rows(9, 50)
    before = logits.clone()
    losses = fused_cross_entropy(logits, labels, learns=False)
    assert logits.equal(before)
    assert losses.equal(fused_cross_entropy(before, labels, learns=True)) and not before.equal(logits)


def test_threads_change_nothing(monkeypatch):
    logits, labels = rows(37, 300)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made = logits.clone()
        results.append((fused_cross_entropy(made, labels, learns=True), made))
    assert all(one.equal(results[0][0]) and other.equal(results[0][1]) for one, other in results)


def test_great_logits_do_not_overflow_and_what_is_no_number_stays_so():
    logits = torch.tensor([[3e38, -3e38, 1.0], [torch.nan, 0.0, 1.0], [0.0, 0.0, 0.0]]).bfloat16()
    losses = fused_cross_entropy(logits, torch.tensor([0, 1, 2]), learns=True)
    assert losses[0] == 0.0 and logits[0].abs().max() < 1e-37
    assert losses[1].isnan() and bool(logits[1].isnan().all())
    torch.testing.assert_close(losses[2], torch.tensor([3.0]).log())


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_outside_of_the_vocabulary_is_an_error(label):
    logits, labels = rows(3, 7)
    labels[1] = label
    with pytest.raises(IndexError, match="outside of the vocabulary of 7 entries"):
        fused_cross_entropy(logits, labels, learns=True)


def test_only_bf16_on_a_cpu_has_it():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    fuse_loss(one, dtype=torch.float32, device=CPU)
    fuse_loss(other, dtype=torch.bfloat16, device=CPU)
    assert not fuses_loss(one) and fuses_loss(other)


def test_a_models_loss_and_gradients_are_those_without_it():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": 71, "num_key_value_heads": 2, **sizes}
    model = ModelSource.of(ModelConfig(config=config), "causal").build(0).bfloat16().train()
    labels = torch.randint(71, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = make_batch([], {"input_ids": labels.numpy(), "use_cache": False}, labels.where(labels > 9, -100).numpy())
    results = []
    for fused in (False, True):
        if fused:
            fuse_loss(model, dtype=torch.bfloat16, device=CPU)
        total = token_loss(model, batch)
        results.append([total, *torch.autograd.grad(total, list(model.parameters()))])
    (plain, *gradients), (fused_total, *fused_gradients) = results
    torch.testing.assert_close(fused_total, plain, rtol=1e-6, atol=0)
    for one, other in zip(fused_gradients, gradients, strict=True):
        assert (one - other).norm() <= 2.0**-7 * other.norm()
