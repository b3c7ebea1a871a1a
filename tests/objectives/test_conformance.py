"""What holds for every objective of the table."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paceline import registry
from paceline.config import DataConfig

FAMILY = {"causal": "llama", "masked": "bert", "seq2seq": "t5"}
RANDOM = {"masked", "seq2seq"}

objectives = pytest.mark.parametrize("name", tuple(registry.OBJECTIVES))


@pytest.fixture
def rows(documents, pack):
    """Six rows, of which two are short and one only fills up."""
    rows = []
    for sequence, lengths in enumerate([(19, 18), (15, 22), (37,), (14, 13), (12, 2, 23), (26,)]):
        rows.append(pack(documents(*lengths, seed=sequence), 100 + sequence))
    return [*rows[:4], replace(rows[4], weight=0.0), rows[5]]


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal_gradients(actual, expected):
    """To 1e-6 of the whole gradient's norm: some parts of it, such as a key's bias, are zero but for rounding."""
    assert actual.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    differences = {name: ((actual[name] - gradient).norm() / norm).item() for name, gradient in expected.items()}
    assert max(differences.values()) < 1e-6, differences


@objectives
@pytest.mark.parametrize("sizes", [(1, 2, 3), (4, 1, 1), (1,) * 6])
def test_the_sum_over_micro_batches_is_that_of_the_whole_batch(name, sizes, rows, context, model):
    options = registry.OBJECTIVES.load(name)()
    objective, net = options.build(context()), model(FAMILY[options.head], options.head)
    whole = objective.batch(rows, seed=7, step=3)
    bounds = np.cumsum([0, *sizes])
    parts = [objective.batch(rows[a:b], seed=7, step=3) for a, b in pairwise(bounds)]
    assert sum(part.count for part in parts) == whole.count > 0
    assert len({part.count for part in parts}) > 1
    losses = [objective.loss(net, part) for part in parts]
    loss = objective.loss(net, whole)
    torch.testing.assert_close(sum(losses), loss, rtol=1e-6, atol=0)
    assert_equal_gradients(gradients_of(sum(losses), net), gradients_of(loss, net))


@objectives
def test_what_softens_the_loss_is_a_sum_too_and_not_part_of_evaluation(name, rows, context, model):
    cls = registry.OBJECTIVES.load(name)
    soft, plain = (o.build(context()) for o in (cls(label_smoothing=0.1, z_loss=0.01), cls()))
    net = model(FAMILY[cls.head], cls.head)
    net.training = True  # the model as a whole, so that its dropouts stay off
    whole = soft.batch(rows, seed=7, step=3)
    loss = soft.loss(net, whole)
    parts = [soft.loss(net, soft.batch([row], seed=7, step=3)) for row in rows]
    torch.testing.assert_close(sum(parts), loss, rtol=1e-6, atol=0)
    assert loss > plain.loss(net, whole) + 0.01
    net.eval()
    assert torch.equal(soft.loss(net, whole), plain.loss(net, whole))


@objectives
def test_loss_and_gradient_equal_the_plain_form(name, rows, context, model):
    options = registry.OBJECTIVES.load(name)()
    objective, net = options.build(context()), model(FAMILY[options.head], options.head)
    batch = objective.batch(rows, seed=7, step=3)
    loss = objective.loss(net, batch)
    logits = net(**batch.inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_equal_gradients(gradients_of(loss, net), gradients_of(expected, net))


@objectives
def test_a_row_is_the_same_in_any_company(name, rows, context):
    objective = registry.OBJECTIVES.load(name)().build(context())
    whole = objective.batch(rows[::-1], seed=7, step=3)
    for place, row in enumerate(rows[::-1]):
        alone = objective.batch([row], seed=7, step=3)
        for label, value in {**alone.inputs, "labels": alone.labels}.items():
            if label != "use_cache":
                among = whole.labels if label == "labels" else whole.inputs[label]
                assert torch.equal(among[place, : value.shape[1]], value[0]), label
        assert (whole.labels[place, alone.labels.shape[1] :] == -100).all()


@objectives
def test_what_is_random_is_keyed_by_seed_step_and_sequence(name, rows, context):
    objective = registry.OBJECTIVES.load(name)().build(context())

    def inputs(seed=7, step=3, sequence=2):
        return objective.batch([replace(rows[2], sequence=sequence)], seed=seed, step=step).inputs["input_ids"].tolist()

    others = [inputs(seed=8), inputs(step=4), inputs(sequence=3), inputs(seed=2**70)]
    assert inputs() == inputs()
    assert [other != inputs() for other in others] == [name in RANDOM] * 4


@objectives
def test_a_row_that_fills_up_has_no_target(name, rows, context, model):
    options = registry.OBJECTIVES.load(name)()
    objective = options.build(context())
    batch = objective.batch([replace(row, weight=0.0) for row in rows], seed=7, step=3)
    loss = objective.loss(model(FAMILY[options.head], options.head), batch)
    assert (batch.count, loss.item(), loss.requires_grad) == (0, 0.0, True)


@objectives
def test_count_and_sequences_are_known_with_the_batch(name, rows, context):
    batch = registry.OBJECTIVES.load(name)().build(context()).batch(rows, seed=7, step=3)
    assert batch.count == int((batch.labels != -100).sum())
    assert batch.sequences == tuple(row.sequence for row in rows)


@objectives
def test_a_full_row_makes_a_sequence(name, documents, pack, context):
    options = registry.OBJECTIVES.load(name)()
    for tokens in (16, 23, 40):
        given = context(sequence_tokens=tokens)
        row = pack(documents(options.row_tokens(given)))
        inputs = options.build(given).batch([row], seed=7, step=3).inputs
        assert inputs["input_ids"].shape == (1, tokens)


@objectives
def test_reads_the_text_column_by_default(name):
    options = registry.OBJECTIVES.load(name)()
    assert options.columns(DataConfig(source="texts", field="body")) == ("body",)
