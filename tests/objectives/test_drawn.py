"""Labels that a model draws: by its probabilities, the same for a position wherever and however it is computed."""

from dataclasses import replace

import pytest
import torch

from meshes import replica
from paceline.objectives.base import token_loss
from paceline.objectives.deferred import DeferredLogits
from paceline.objectives.drawn import Draw, drawn_labels
from paceline.objectives.mixup import Mixed, mixing
from paceline.objectives.softening import NO_TARGET, Softening
from paceline.objectives.vocabulary import VocabularyCut
from paceline.plan.layout import Grid
from parity import objective, rows, tiny_llama

DRAW = Draw(seed=3, step=5)
B, S, V = 4, 6, 7


def logits(rows=B, positions=S, entries=V):
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(rows, positions, entries, generator=generator, dtype=torch.float64)


def draw(of, labels=None, **changes):
    labels = torch.zeros(of.shape[:2], dtype=torch.int64) if labels is None else labels
    options = {"sequences": tuple(range(len(of))), "columns": None, "cut": None, **changes}
    return drawn_labels(of, labels, options.pop("draw", DRAW), **options)


def test_each_label_is_drawn_as_often_as_its_probability_says():
    number = 40_000
    made = draw(logits(1, 1).expand(number, 1, V))
    often = torch.bincount(made.flatten(), minlength=V) / number
    expected = logits(1, 1)[0, 0].softmax(0)
    assert (often - expected).abs().max() < 4 * 0.5 / number**0.5


def test_it_follows_from_seed_step_sequence_and_position():
    made = draw(logits())
    assert made.equal(draw(logits()))
    assert not made.equal(draw(logits(), draw=Draw(seed=4, step=5)))
    assert not made.equal(draw(logits(), draw=Draw(seed=3, step=6)))
    order, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 2])
    part = draw(logits()[order][:, columns], sequences=tuple(order.tolist()), columns=columns)
    assert part.equal(made[order][:, columns])


def test_only_targets_are_drawn():
    labels = torch.zeros(B, S, dtype=torch.int64)
    labels[1] = labels[:, 3] = NO_TARGET
    made = draw(logits(), labels)
    assert (made == NO_TARGET).equal(labels == NO_TARGET)
    assert made[labels != NO_TARGET].equal(draw(logits())[labels != NO_TARGET])


def test_logits_that_are_not_there_yet_give_the_same():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(B, S, 5, generator=generator), torch.randn(V, 5, generator=generator)
    assert draw(DeferredLogits.of(hidden, weight, None)).equal(draw(hidden @ weight.T))


def over_ranks(member, entries):
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut = VocabularyCut(axis=mesh.tensor, vocabulary=entries)
        whole = logits(entries=entries)
        own = torch.full((B, S, cut.rows), 99.0, dtype=torch.float64)  # padding is never drawn
        own[..., : cut.entries] = whole[..., cut.start : cut.start + cut.entries]
        return draw(own, cut=cut).equal(draw(whole))


@pytest.mark.parametrize("entries", [7, 3])
def test_ranks_that_have_parts_of_the_vocabulary_draw_the_same(pool, entries):
    assert all(pool.run(over_ranks, 4, entries))


def test_a_batch_that_draws_its_labels_has_the_loss_of_these():
    model, goal = tiny_llama(), objective()
    batch = goal.batch(rows(0, 3), seed=0, step=0)
    with torch.no_grad():
        labels = draw(model(batch.inputs["input_ids"]).logits, batch.labels, sequences=batch.sequences)
    assert not labels.equal(batch.labels)
    drawn, given = (token_loss(model, replace(batch, **c)) for c in ({"draw": DRAW}, {"labels": labels}))
    torch.testing.assert_close(drawn, given, rtol=0, atol=0)


def test_drawn_labels_are_certain_whatever_softens_those_of_the_text():
    """The curvature is that of the model's own distribution, at the embeddings that are mixed."""
    model, goal, soft = tiny_llama().train(), objective(), Softening(label_smoothing=0.2, z_loss=0.1)
    batch = goal.batch(rows(0, 3), seed=0, step=0)
    others = Mixed(
        ids=batch.inputs["input_ids"].flip(0), labels=batch.labels.flip(0), shares=torch.full(batch.labels.shape, 0.75)
    )
    mixed = replace(batch, mixed=others, draw=DRAW)
    with torch.no_grad(), mixing(model, others):
        labels = draw(model(batch.inputs["input_ids"]).logits, batch.labels, sequences=batch.sequences)
        plain = token_loss(model, replace(batch, labels=labels))
    torch.testing.assert_close(token_loss(model, mixed, soft), plain, rtol=0, atol=0)
    assert not torch.equal(token_loss(model, replace(mixed, draw=None), soft), plain)
