import numpy as np
import pytest
import torch

from paceline.data.rows import Row
from paceline.objectives.next_token import NextToken
from paceline.objectives.right_to_left import RightToLeft, reverse


@pytest.fixture
def row():
    """Three documents: one that began earlier, a whole one, one that goes on."""
    return Row(5, np.array([10, 11, 1, 20, 21, 22, 1, 30]), np.array([3, 7]))


def test_a_reversed_document_begins_at_its_end_of_text_token(row):
    backwards = reverse(row)
    assert backwards.tokens.tolist() == [30, 1, 22, 21, 20, 1, 11, 10]
    assert backwards.starts.tolist() == [1, 5]
    assert backwards.sequence == 5


def test_documents_reversed_twice_are_the_same(documents, pack):
    parts = documents(4, 1, 6)
    row = pack(parts)
    twice = reverse(reverse(row))
    assert twice.tokens.tolist() == row.tokens.tolist()
    assert twice.starts.tolist() == row.starts[row.starts > 0].tolist()


def test_labels_are_the_tokens_before(row, context):
    batch = RightToLeft().build(context()).batch([row], seed=0, step=0)
    assert batch.inputs["input_ids"].tolist() == [[30, 1, 22, 21, 20, 1, 11]]
    assert batch.labels.tolist() == [[1, 22, 21, 20, 1, 11, 10]]


def test_isolated_documents_restart_and_learn_where_a_text_begins(row, context):
    batch = RightToLeft().build(context(isolate_documents=True)).batch([row], seed=0, step=0)
    assert batch.inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3, 0, 1]]
    assert batch.labels.tolist() == [[1, 22, 21, 20, 1, 11, 10]]


def test_what_precedes_an_isolated_document_is_a_target_only_if_it_ends_a_text(context):
    cut = Row(0, np.array([10, 11, 20, 21]), np.array([2]))
    batch = RightToLeft().build(context(isolate_documents=True)).batch([cut], seed=0, step=0)
    assert batch.labels.tolist() == [[20, -100, 10]]


def test_loss_is_that_of_next_token_prediction_on_the_reversed_tokens(documents, pack, context, model):
    net, row = model("llama"), pack(documents(9, 8))
    losses = []
    for options, given in [(RightToLeft(), row), (NextToken(), Row(0, row.tokens[::-1].copy(), row.starts))]:
        objective = options.build(context())
        losses.append(objective.loss(net, objective.batch([given], seed=0, step=0)))
    assert torch.equal(*losses)


def test_loss_of_packed_documents_is_the_sum_of_their_own(documents, pack, context, model):
    net, parts, end = model("llama"), documents(5, 2, 9, 7), np.array([1])
    objective = RightToLeft().build(context(isolate_documents=True))

    def loss(*parts):
        return objective.loss(net, objective.batch([pack([end, *parts])], seed=0, step=0))

    torch.testing.assert_close(loss(*parts), sum(loss(part) for part in parts), rtol=1e-5, atol=0)
