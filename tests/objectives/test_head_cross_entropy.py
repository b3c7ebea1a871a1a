import math

import pytest
import torch
from torch.nn import functional as F

from meshes import replica
from paceline.objectives import head_cross_entropy as module
from paceline.objectives.head_cross_entropy import head_cross_entropy
from paceline.objectives.vocabulary import VocabularyCut
from paceline.plan.layout import Grid
from tolerances import FP64_EQUAL

ROWS = 8
"""Of a chunk; 37 of the 45 x 2 positions or so are left over for the last one."""


@pytest.fixture
def case(monkeypatch):
    """Hidden states, weight, bias and labels of several chunks, the last one short; a third has no target."""
    monkeypatch.setattr(module, "LEAST_ROWS", 1)

    def make(dtype, vocabulary=96, width=16):
        monkeypatch.setattr(module, "CPU_CHUNK", ROWS * vocabulary)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 45, width, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
        bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (2, 45), generator=generator)
        labels[:, ::3] = -100
        assert int((labels != -100).sum()) % ROWS
        return hidden, weight, bias, labels

    return make


def plain(hidden, weight, bias, labels):
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, FP64_EQUAL), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_value_and_gradients_equal_the_plain_form(case, dtype, rtol):
    hidden, weight, bias, labels = case(dtype)
    total = head_cross_entropy(hidden, weight, bias, labels)
    gradients = torch.autograd.grad(total * 0.37, (hidden, weight, bias))
    expected = plain(hidden, weight, bias, labels)
    expected_gradients = torch.autograd.grad(expected * 0.37, (hidden, weight, bias))
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(total.double(), expected, rtol=min(rtol, 1e-3), atol=0)
    for gradient, plain_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - plain_gradient.double()).norm() < rtol * plain_gradient.double().norm()


def test_sums_over_chunks_do_not_lose_what_bf16_cannot_hold(case, monkeypatch):
    """More chunks, the same gradient of the weight: they are added up in fp32."""
    hidden, weight, bias, labels = case(torch.bfloat16)
    (expected,) = torch.autograd.grad(plain(hidden, weight, bias, labels), weight)
    errors = []
    for rows in (labels.numel(), 1):
        monkeypatch.setattr(module, "CPU_CHUNK", rows * len(weight))
        (gradient,) = torch.autograd.grad(head_cross_entropy(hidden, weight, bias, labels), weight)
        errors.append(float((gradient.double() - expected.double()).norm()))
    assert errors[1] < 1.1 * errors[0]


def test_only_what_learns_has_a_gradient(case):
    hidden, weight, _, labels = case(torch.float64)
    expected_hidden, expected_weight = torch.autograd.grad(plain(hidden, weight, None, labels), (hidden, weight))
    of_hidden = head_cross_entropy(hidden, weight.detach(), None, labels)
    of_weight = head_cross_entropy(hidden.detach(), weight, None, labels)
    torch.testing.assert_close(torch.autograd.grad(of_hidden, hidden)[0], expected_hidden)
    torch.testing.assert_close(torch.autograd.grad(of_weight, weight)[0], expected_weight)


def test_evaluation_is_the_same_loss_without_the_work_for_gradients(case, monkeypatch):
    hidden, weight, bias, labels = case(torch.float64)
    total = head_cross_entropy(hidden, weight, bias, labels)
    monkeypatch.setattr(module._Gradients, "add", None)
    with torch.no_grad():
        assert torch.equal(head_cross_entropy(hidden, weight, bias, labels), total)


def test_backward_twice_gives_the_same_gradients(case):
    hidden, weight, bias, labels = case(torch.float64)
    total = head_cross_entropy(hidden, weight, bias, labels)
    first, second = (torch.autograd.grad(total * 0.5, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_without_targets_it_is_exactly_zero_with_gradients_of_zeros(case):
    hidden, weight, bias, labels = case(torch.float32)
    total = head_cross_entropy(hidden, weight, bias, torch.full_like(labels, -100))
    assert total.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, (hidden, weight, bias)))


def test_what_stands_where_there_is_no_target_does_not_matter(case):
    hidden, weight, bias, labels = case(torch.float64)
    spoilt = hidden.detach().clone()
    spoilt[labels == -100] = torch.nan
    total = head_cross_entropy(spoilt.requires_grad_(), weight, bias, labels)
    assert torch.equal(total, head_cross_entropy(hidden, weight, bias, labels))
    of_hidden, of_weight = torch.autograd.grad(total, (spoilt, weight))
    assert of_weight.isfinite().all() and not of_hidden[labels == -100].any()


def in_fp16(logit, scale):
    """Gradients of a sum that is scaled by 2^12; all entries but one have a probability near exp(-logit)."""
    hidden = torch.ones(4, 8, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(6, 8, dtype=torch.float16)
    weight[0] = logit / 8
    weight.requires_grad_()
    total = head_cross_entropy(hidden, weight, None, torch.zeros(4, dtype=torch.int64), scale=scale)
    return torch.autograd.grad(total * 2.0**12, (hidden, weight))


def test_small_gradients_in_fp16_are_scaled_before_they_are_held():
    """exp(-17.5) = 2.5e-8 is nothing in fp16; times the scale it is a number of it."""
    probability = math.exp(-17.5) / (1 + 5 * math.exp(-17.5))
    _, of_weight = in_fp16(17.5, scale=2.0**12)
    expected = torch.full((5, 8), 4 * probability * 2.0**12)
    assert torch.allclose(of_weight[1:].float(), expected, rtol=2.0**-10, atol=0.0)
    assert not in_fp16(17.5, scale=1.0)[1][1:].any()


@pytest.mark.parametrize("scale", [1.0, 2.0**12, 2.0**12 / 3])
def test_what_the_scale_was_expected_to_be_does_not_change_gradients(scale):
    ahead, after = in_fp16(2.0, scale), in_fp16(2.0, 1.0)
    assert all(torch.allclose(a, b, rtol=2.0**-9, atol=1e-2) for a, b in zip(ahead, after, strict=True))


def test_a_label_outside_the_vocabulary_is_an_error(case):
    hidden, weight, bias, labels = case(torch.float32)
    labels[0, 1] = len(weight)
    with pytest.raises((RuntimeError, IndexError)):
        head_cross_entropy(hidden, weight, bias, labels)


def cut_over_ranks(member, vocabulary):
    """This rank's loss and gradients under a cut vocabulary, and how many messages they took."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((vocabulary, 4), (vocabulary,)))
    labels = torch.randint(vocabulary, (2, 7), generator=generator)
    labels[0, 2] = -100
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=vocabulary)
        own = slice(cut.start, cut.start + cut.entries)
        padding = cut.rows - cut.entries
        own_weight = F.pad(weight[own], (0, 0, 0, padding), value=9.0).requires_grad_()
        own_bias = F.pad(bias[own], (0, padding), value=9.0).requires_grad_()
        module.LEAST_ROWS, module.CPU_CHUNK = 3, 1
        try:
            total = head_cross_entropy(hidden, own_weight, own_bias, labels, cut)
        finally:
            module.LEAST_ROWS, module.CPU_CHUNK = 128, 1 << 22
        of_hidden, of_weight, of_bias = torch.autograd.grad(total, (hidden, own_weight, own_bias))
        assert not of_weight[cut.entries :].any() and not of_bias[cut.entries :].any()
        calls = mesh.tally.calls["all_gather", "tensor", "cross_entropy"]
        return total.detach(), of_hidden, of_weight[: cut.entries], of_bias[: cut.entries], calls


@pytest.mark.parametrize("vocabulary", [11, 3])
def test_a_cut_vocabulary_gives_every_rank_the_loss_and_its_part_of_the_gradients(pool, vocabulary):
    """Four ranks: with 3 entries one of them has none."""
    found = pool.run(cut_over_ranks, 4, vocabulary)
    totals, of_hidden, of_weight, of_bias, calls = zip(*found, strict=True)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((vocabulary, 4), (vocabulary,)))
    labels = torch.randint(vocabulary, (2, 7), generator=generator)
    labels[0, 2] = -100
    expected = plain(hidden, weight.requires_grad_(), bias.requires_grad_(), labels)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight, bias))
    for total in totals:
        torch.testing.assert_close(total, expected)
    for gradient, plain_gradient in zip(
        (sum(of_hidden), torch.cat(of_weight), torch.cat(of_bias)), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, plain_gradient)
    assert set(calls) == {-(-13 // 3)}
