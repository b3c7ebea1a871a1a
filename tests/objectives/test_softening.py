"""Label smoothing, z-loss and two labels at once, against torch's own functions, in both forms of the loss."""

import pytest
import torch
from torch.nn import functional as F

from meshes import replica
from paceline.objectives import cross_entropy, head_cross_entropy
from paceline.objectives.softening import CERTAIN, Second, Softening
from paceline.objectives.vocabulary import VocabularyCut
from paceline.plan.layout import Grid
from tolerances import FP64_EQUAL

KINDS = {
    "smoothing": (Softening(label_smoothing=0.1), False),
    "z": (Softening(z_loss=0.01), False),
    "second": (CERTAIN, True),
    "all": (Softening(label_smoothing=0.2, z_loss=0.05), True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def case(vocabulary, dtype=torch.float64):
    """Hidden states, weight, bias, labels and second labels: some positions have none of them, some no second."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 4, generator=generator).to(dtype).requires_grad_()
    weight, bias = (2 * torch.randn(*s, generator=generator).to(dtype) for s in ((vocabulary, 4), (vocabulary,)))
    labels, others = torch.randint(vocabulary, (2, 2, 7), generator=generator)
    labels[:, ::3] = -100
    others[0, 2:4] = -100
    shares = torch.rand(2, 7, generator=generator)
    return hidden, weight.requires_grad_(), bias.requires_grad_(), labels, Second(labels=others, shares=shares)


def expected(logits, labels, softening, second):
    """By torch's ``cross_entropy`` and ``logsumexp``, position by position."""
    logits, labels = logits.flatten(0, 1), labels.flatten()
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=softening.label_smoothing)
    if second is not None:
        others = second.labels.flatten()
        mixed = F.cross_entropy(logits, others, reduction="none", label_smoothing=softening.label_smoothing)
        share = second.shares.flatten().where(others != -100, 1.0)
        losses = share * losses + (1 - share) * mixed
    losses = losses + softening.z_loss * logits.logsumexp(1) ** 2
    return losses[labels != -100].sum()


@kinds
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, FP64_EQUAL), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_whole_vocabulary(monkeypatch, kind, dtype, rtol):
    softening, has_second = KINDS[kind]
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 30)
    monkeypatch.setattr(head_cross_entropy, "CPU_CHUNK", 1)
    monkeypatch.setattr(head_cross_entropy, "LEAST_ROWS", 3)
    hidden, weight, bias, labels, second = case(11, dtype)
    second = second if has_second else None
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    plain = expected(F.linear(*exact), labels, softening, second)
    gradients = torch.autograd.grad(plain * 0.37, exact)
    for loss in (
        head_cross_entropy.head_cross_entropy(hidden, weight, bias, labels, None, softening, second),
        cross_entropy.summed_cross_entropy(F.linear(hidden, weight, bias), labels, None, softening, second),
    ):
        torch.testing.assert_close(loss.double(), plain, rtol=rtol, atol=0)
        for own, exactly in zip(torch.autograd.grad(loss * 0.37, (hidden, weight, bias)), gradients, strict=True):
            assert (own.double() - exactly).norm() <= rtol * exactly.norm()


@kinds
def test_the_form_that_can_be_differentiated_twice(kind):
    """As a search along curvature needs it: value, gradient, and the product of the Hessian with a vector."""
    softening, has_second = KINDS[kind]
    hidden, weight, bias, labels, second = case(11)
    second = second if has_second else None
    logits, along = F.linear(hidden, weight, bias).detach().requires_grad_(), torch.randn(2, 7, 11).double()
    found = []
    for loss in (
        cross_entropy.plain_cross_entropy(logits, labels, softening, second),
        expected(logits, labels, softening, second),
    ):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (product,) = torch.autograd.grad((gradient * along).sum(), logits)
        found.append((loss, gradient, product))
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=FP64_EQUAL, atol=1e-12)


def over_ranks(member, vocabulary, kind):
    """This rank's losses, its part of the gradient of hidden states, and its rows of that of the weight."""
    softening, has_second = KINDS[kind]
    hidden, weight, bias, labels, second = case(vocabulary)
    second = second if has_second else None
    cross_entropy.CPU_CHUNK = 8
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=vocabulary)
        own, padding = slice(cut.start, cut.start + cut.entries), cut.rows - cut.entries
        own_weight = F.pad(weight.detach()[own], (0, 0, 0, padding), value=9.0).requires_grad_()
        own_bias = F.pad(bias.detach()[own], (0, padding), value=9.0)
        found = []
        for loss in (
            head_cross_entropy.head_cross_entropy(hidden, own_weight, own_bias, labels, cut, softening, second),
            cross_entropy.summed_cross_entropy(F.linear(hidden, own_weight, own_bias), labels, cut, softening, second),
        ):
            of_hidden, of_weight = torch.autograd.grad(loss, (hidden, own_weight))
            assert not of_weight[cut.entries :].any()
            found.append((loss.detach(), of_hidden, of_weight[: cut.entries]))
        return found


@kinds
@pytest.mark.parametrize("vocabulary", [11, 3])
def test_vocabulary_cut_over_ranks(pool, kind, vocabulary):
    """Four ranks: with 3 entries one of them has none."""
    softening, has_second = KINDS[kind]
    hidden, weight, bias, labels, second = case(vocabulary)
    plain = expected(F.linear(hidden, weight, bias), labels, softening, second if has_second else None)
    of_hidden, of_weight = torch.autograd.grad(plain, (hidden, weight))
    for form in zip(*pool.run(over_ranks, 4, vocabulary, kind), strict=True):
        losses, hiddens, weights = zip(*form, strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        torch.testing.assert_close(losses[0], plain.detach(), rtol=FP64_EQUAL, atol=0)
        torch.testing.assert_close(sum(hiddens), of_hidden, rtol=FP64_EQUAL, atol=1e-12)
        torch.testing.assert_close(torch.cat(weights), of_weight, rtol=FP64_EQUAL, atol=1e-12)
