from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paceline import registry
from paceline.config import BatchConfig
from paceline.data.loader import Loader
from paceline.data.order import SampleOrder
from paceline.data.partners import partners
from paceline.data.rows import Row
from paceline.errors import PlanError
from paceline.objectives.mixup_check import check_mixup
from paceline.plan.batch import Batches, plan_batch
from tolerances import FP64_EQUAL

CAUSAL = [name for name in registry.OBJECTIVES if hasattr(registry.OBJECTIVES.load(name)(), "mixup")]
objectives = pytest.mark.parametrize("name", CAUSAL)


def objective(name, context, mixup=0.4, **options):
    return registry.OBJECTIVES.load(name)(mixup=mixup, **options).build(context())


@pytest.fixture
def rows(documents, pack):
    """Four rows with partners: one shorter than its row, one longer, one row without targets."""
    made = [pack(documents(*lengths, seed=i), 100 + i) for i, lengths in enumerate([(19, 18), (37,), (14, 13), (22,)])]
    others = [made[i].tokens for i in (2, 0, 1, 3)]
    made[3] = replace(made[3], weight=0.0)
    return [replace(row, partner=other) for row, other in zip(made, others, strict=True)]


def read_backwards(row):
    return replace(row, tokens=row.tokens[::-1], partner=row.partner[::-1])


@objectives
def test_loss_and_gradients_are_those_of_mixed_embeddings(name, rows, context, model):
    net = model("llama", "causal").double().train()
    made = objective(name, context)
    loss = made.loss(net, made.batch(rows, seed=7, step=3))
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    expected = torch.zeros((), dtype=torch.float64)
    for row in rows[:3]:
        row = read_backwards(row) if name == "right_to_left" else row
        stream = np.random.Philox(np.random.SeedSequence(7), counter=[0, 0, row.sequence, 3])
        share = round(np.random.Generator(stream).beta(0.4, 0.4) * 65536) / 65536
        own, other = (torch.from_numpy(tokens.copy()) for tokens in (row.tokens, row.partner[: len(row.tokens)]))
        table, both = net.get_input_embeddings(), len(other) - 1
        embedded = table(own[:-1])
        mixed = torch.cat([share * embedded[:both] + (1 - share) * table(other[:-1]), embedded[both:]])
        logits = net(inputs_embeds=mixed[None], use_cache=False).logits[0]
        first = F.cross_entropy(logits, own[1:], reduction="none")
        second = F.cross_entropy(logits[:both], other[1:], reduction="none")
        expected = expected + (share * first[:both] + (1 - share) * second).sum() + first[both:].sum()
    torch.testing.assert_close(loss, expected, rtol=FP64_EQUAL, atol=0)
    for own, plain in zip(gradients, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-7, atol=1e-10)
    assert "forward" not in vars(net.get_input_embeddings())


@objectives
def test_the_sum_over_micro_batches_is_that_of_the_whole_batch(name, rows, context, model):
    net = model("llama", "causal").double().train()
    made = objective(name, context, label_smoothing=0.1)
    whole = made.batch(rows, seed=7, step=3)
    parts = [made.batch([row], seed=7, step=3) for row in rows]
    assert sum(part.count for part in parts) == whole.count
    total = sum(made.loss(net, part) for part in parts)
    torch.testing.assert_close(total, made.loss(net, whole), rtol=FP64_EQUAL, atol=0)


@objectives
def test_rows_without_a_partner_are_not_mixed(name, rows, context):
    alone = [replace(row, partner=None) for row in rows]
    assert objective(name, context).batch(alone, seed=7, step=3).mixed is None
    assert objective(name, context, mixup=0.0).batch(rows, seed=7, step=3).mixed is None


@objectives
def test_shares_follow_from_seed_step_and_sequence(name, rows, context):
    made = objective(name, context)

    def share(seed=7, step=3, sequence=100):
        row = replace(rows[0], sequence=sequence)
        return made.batch([row], seed=seed, step=step).mixed.shares[0, 0].item()

    assert share() == share() and len({share(), share(seed=8), share(step=4), share(sequence=101)}) == 4


def test_isolated_documents_are_not_mixed(context):
    with pytest.raises(PlanError, match=r"isolate_documents=true does not go with objective.mixup.*Use mixup=0"):
        registry.OBJECTIVES.load("next_token")(mixup=0.1).build(context(isolate_documents=True))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_each_sample_is_the_partner_of_another_one(count):
    found = partners(100, count, seed=5)
    assert sorted(found) == list(range(100, 100 + count))
    assert count == 1 or (found != np.arange(100, 100 + count)).all()
    if count == 64:
        assert not np.array_equal(found, partners(100, count, seed=6))
        assert not np.array_equal(found - 100, partners(164, count, seed=5) - 164)


class Numbered:
    """Rows that say which they are."""

    def __init__(self, source, length):
        self.source, self.length = source, length

    def __len__(self):
        return self.length

    def row(self, index, sequence):
        return Row(sequence, np.array([self.source, index]), np.zeros(0, np.int64))


def dealt(ranks, micro, seed=3, sizes=(7, 7)):
    """Partner by sequence, over steps of these sizes and all ranks."""
    found = {}
    *growing, full = (plan_batch(BatchConfig(sequences=size, micro=micro), ranks) for size in sizes)
    batches = Batches(full=full, growing=tuple(growing))
    for rank in range(ranks):
        order = SampleOrder([11, 5], [2.0, 1.0], 0)
        sources = [Numbered(0, 11), Numbered(1, 5)]
        loader, first = Loader(sources, order, batches, rank=rank, partner_seed=seed), 0
        for step, size in enumerate(sizes, 1):
            for row in (row for part in loader.batch(step, first) for row in part if row.weight):
                found[row.sequence] = (tuple(row.tokens), None if row.partner is None else tuple(row.partner))
            first += size
        loader.close()
    return found


def test_partners_do_not_depend_on_ranks_and_micro_batches():
    whole = dealt(1, None)
    assert whole == dealt(2, 1) == dealt(3, 2) and len(whole) == 14
    for sequence, other in enumerate((*partners(0, 7, 3), *partners(7, 7, 3))):
        assert whole[sequence][1] == whole[int(other)][0], "the partner is the row that the other sample is"
    assert all(partner is None for _, partner in dealt(2, 1, seed=None).values())


def test_while_the_batch_grows_a_partner_is_of_the_same_step():
    sizes = (2, 4, 7)
    whole = dealt(1, None, sizes=sizes)
    assert whole == dealt(2, 1, sizes=sizes) and len(whole) == 13
    for first, size in zip((0, 2, 6), sizes, strict=True):
        for sequence, other in enumerate(partners(first, size, 3), first):
            assert first <= other < first + size and whole[sequence][1] == whole[int(other)][0]


class Untold(nn.Module):
    """Does not say where its ids go."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


class Plain(Untold):
    def get_input_embeddings(self):
        return self.table


class Peeking(Plain):
    """Looks at the ids beside its embedding."""

    def forward(self, input_ids):
        return self.head(self.table(input_ids) + input_ids[..., None] % 7)


def test_a_model_that_cannot_be_mixed_is_refused(rows, context):
    batch = objective("next_token", context).batch(rows[:2], seed=0, step=0)
    batch = replace(batch, inputs={"input_ids": batch.inputs["input_ids"]}, mixed=None)
    check_mixup(Plain(), batch)
    with pytest.raises(PlanError, match="Peeking looks at token ids beside its input embedding"):
        check_mixup(Peeking(), batch)
    with pytest.raises(PlanError, match=r"needs Untold.get_input_embeddings\(\)"):
        check_mixup(Untold(), batch)
