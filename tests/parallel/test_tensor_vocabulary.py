"""The tables over the vocabulary, and the loss of logits that stay where they were computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshes import replica
from paceline.comm.mesh import Axis
from paceline.errors import PlanError
from paceline.objectives import cross_entropy
from paceline.objectives.cross_entropy import summed_cross_entropy
from paceline.objectives.vocabulary import VocabularyCut, gather_logits, vocabulary_cut
from paceline.parallel.held import cut_runs, take
from paceline.parallel.vocabulary import cut_head, cut_lookup, is_plain_lookup
from paceline.plan.layout import Grid

VOCABULARY = 11
SHAPE = (2, 5)


def rows_of(table, cut):
    return take(table, 0, cut_runs([VOCABULARY], cut.axis.size, cut.axis.index), cut.rows)


def case(dtype, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*SHAPE, VOCABULARY, generator=generator) * scale).to(dtype)
    labels = torch.randint(VOCABULARY, SHAPE, generator=generator)
    labels[0, ::3] = -100
    return logits, labels


@pytest.mark.parametrize(
    ("vocabulary", "size", "entries"), [(8, 2, [4, 4]), (11, 4, [3, 3, 3, 2]), (5, 4, [2, 2, 1, 0]), (4, 3, [2, 2, 0])]
)
def test_entries_of_the_ranks(vocabulary, size, entries):
    cuts = [VocabularyCut(axis=Axis(name="tensor", index=i, size=size), vocabulary=vocabulary) for i in range(size)]
    assert [cut.entries for cut in cuts] == entries
    assert [cut.start for cut in cuts] == [sum(entries[:i]) for i in range(size)]
    assert {cut.rows for cut in cuts} == {entries[0]}


def losses(member, dtype, scale, spoil):
    cross_entropy.CPU_CHUNK = 8  # a row or two at a time
    logits, labels = case(dtype, scale)
    if spoil:
        logits[labels == -100] = float("nan")
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=VOCABULARY)
        own = rows_of(logits.movedim(-1, 0), cut).movedim(0, -1).contiguous()
        own[..., cut.entries :] = 1e4  # padding, whatever it is, takes no part
        own.requires_grad_()
        total = summed_cross_entropy(own, labels, cut)
        (gradient,) = torch.autograd.grad(total * 0.37, own)
        model = nn.Module()
        model.vocabulary_cut = cut
        return total.detach(), gather_logits(model, gradient), gradient[..., cut.entries :]


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_loss_and_gradient_are_those_of_whole_logits(pool, dtype, rtol, ranks, spoil):
    """Also where a rank's logits are far below those of another, or some stand where there is no target."""
    for scale in (3.0, 300.0):
        logits, labels = case(dtype, scale)
        exact = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        (expected_gradient,) = torch.autograd.grad(expected * 0.37, exact)
        results = pool.run(losses, ranks, dtype, scale, spoil)
        for total, gradient, padding in results:
            assert torch.equal(total, results[0][0])
            torch.testing.assert_close(total, expected.detach(), rtol=min(rtol, 1e-6), atol=0)
            assert gradient.dtype == dtype and torch.count_nonzero(padding) == 0
            torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=rtol, atol=1e-7)


def bad_label(member, label):
    logits, labels = case(torch.float32)
    labels[1, 2] = label
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=VOCABULARY)
        with pytest.raises(RuntimeError, match="out of bounds"):
            summed_cross_entropy(logits[..., : cut.rows], labels, cut)


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_a_label_outside_the_vocabulary_is_an_error(pool, label):
    """Also one that is a column of padding."""
    pool.run(bad_label, 2, label)


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 3.0


def lookups(member, kind, ids):
    torch.manual_seed(0)
    whole = kind(VOCABULARY, 4, padding_idx=2).double()
    nn.init.normal_(whole.weight)
    own = kind(VOCABULARY, 4, padding_idx=2).double()
    weights = torch.randn(*ids.shape, 4, dtype=torch.float64)
    (whole(ids) * weights).sum().backward()
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=VOCABULARY)
        own.weight = nn.Parameter(rows_of(whole.weight.detach(), cut))
        cut_lookup(own, cut, "table")
        found = own(ids)
        (found * weights).sum().backward()
        assert torch.equal(own.weight.grad, rows_of(whole.weight.grad, cut))
        return bool(torch.equal(found, whole(ids))), int(torch.count_nonzero(own.weight.grad))


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_lookup_is_that_of_the_whole_table(pool, ranks, kind):
    """The row of the padding token (2) has no gradient, on whichever rank it is; and only that row."""
    ids = torch.tensor([[0, 2, 10, 2], [5, 0, 6, 8]])
    results = pool.run(lookups, ranks, kind, ids)
    assert all(equal for equal, _ in results)
    assert sum(count for _, count in results) == 5 * 4


def bad_id(member, token):
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=VOCABULARY)
        own = nn.Embedding(cut.rows, 4)
        cut_lookup(own, cut, "table")
        with pytest.raises(RuntimeError, match="out of bounds"):
            own(torch.tensor([[0, token]]))


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_token_outside_the_vocabulary_is_an_error(pool, token):
    pool.run(bad_id, 2, token)


class Normalised(nn.Embedding):
    def forward(self, input_ids):
        return F.normalize(super().forward(input_ids), dim=-1)


class WithNorm(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])


@pytest.mark.parametrize("embedding", [Normalised(4, 4), nn.Embedding(4, 4, max_norm=1.0)])
def test_a_lookup_that_does_more_is_refused(embedding):
    cut = VocabularyCut(axis=Axis(name="tensor", size=2), vocabulary=8)
    before = embedding.weight.clone()
    with pytest.raises(PlanError, match=r"layout.tensor=2: model.embed normalises its rows.* Use tensor=1"):
        cut_lookup(embedding, cut, "model.embed")
    assert torch.equal(embedding.weight, before)


def test_plain_lookups():
    assert is_plain_lookup(nn.Embedding(4, 4)) and is_plain_lookup(Scaled(4, 4))
    assert not is_plain_lookup(WithNorm(4, 4)) and not is_plain_lookup(nn.Linear(4, 4)) and not is_plain_lookup(None)


def heads(member):
    torch.manual_seed(0)
    whole = nn.Linear(4, VOCABULARY).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, VOCABULARY, dtype=torch.float64)
    expected = whole(x)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=VOCABULARY)
        own = nn.Linear(4, cut.rows).double()
        own.weight, own.bias = (nn.Parameter(rows_of(p.detach(), cut)) for p in (whole.weight, whole.bias))
        cut_head(own, cut, "head")
        logits = own(x)
        (gradient,) = torch.autograd.grad((logits * rows_of(weights.T, cut).T).sum(), x)
        model = nn.Module()
        assert vocabulary_cut(model) is None and gather_logits(model, logits) is logits
        model.vocabulary_cut = cut
        torch.testing.assert_close(gather_logits(model, logits), expected)
        torch.testing.assert_close(gradient, expected_gradient)
        return own.out_features


def test_a_head_gives_its_own_logits_and_the_whole_gradient(pool):
    assert pool.run(heads, 4) == [3] * 4
