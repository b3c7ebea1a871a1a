import numpy as np
import pytest
import torch

from paceline.data.rows import Row
from paceline.objectives.next_token import NextToken


def labels_of(batch):
    return batch.labels.tolist()


@pytest.fixture
def row():
    """A row of three documents, of which the first began earlier and the last goes on."""
    return Row(5, np.array([10, 11, 1, 20, 21, 22, 1, 30]), np.array([3, 7]))


def test_labels_are_the_following_tokens(row, context):
    batch = NextToken().build(context()).batch([row], seed=0, step=0)
    assert batch.inputs.keys() == {"input_ids", "use_cache"}
    assert batch.inputs["use_cache"] is False
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 1, 20, 21, 22, 1]]
    assert labels_of(batch) == [[11, 1, 20, 21, 22, 1, 30]]


def test_isolated_documents_restart_and_their_first_token_is_no_target(row, context):
    batch = NextToken().build(context(isolate_documents=True)).batch([row], seed=0, step=0)
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert labels_of(batch) == [[11, 1, -100, 21, 22, 1, -100]]
    assert "attention_mask" not in batch.inputs, "transformers would no longer look for documents"


def test_short_rows_are_padded_on_the_right(row, context):
    short = Row(6, np.array([40, 41, 1]), np.array([0]))
    batch = NextToken().build(context(isolate_documents=True)).batch([row, short], seed=0, step=0)
    assert batch.inputs["input_ids"][1].tolist() == [40, 41, 0, 0, 0, 0, 0]
    assert batch.inputs["position_ids"][1].tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert labels_of(batch)[1] == [41, 1, -100, -100, -100, -100, -100]


def test_the_row_itself_is_not_changed(row, context):
    NextToken().build(context(isolate_documents=True)).batch([row], seed=0, step=0)
    assert row.tokens.tolist() == [10, 11, 1, 20, 21, 22, 1, 30]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_loss_is_that_of_the_model_itself(family, documents, pack, context, model):
    net = model(family)
    row = pack(documents(9, 8))
    objective = NextToken().build(context())
    batch = objective.batch([row], seed=0, step=0)
    ids = torch.from_numpy(row.tokens)[None]
    mean = net(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(objective.loss(net, batch) / batch.count, mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "gemma", "gpt_neox", "mixtral", "olmo"])
def test_loss_of_packed_documents_is_the_sum_of_their_own(family, documents, pack, context, model):
    net, parts = model(family), documents(5, 2, 9, 7)
    objective = NextToken().build(context(isolate_documents=True))

    def loss(*rows):
        return objective.loss(net, objective.batch(rows, seed=0, step=0))

    packed = loss(pack(parts), pack(parts[::-1]))
    torch.testing.assert_close(packed, 2 * sum(loss(pack([part])) for part in parts), rtol=1e-5, atol=0)
    plain = NextToken().build(context())
    crossing = plain.loss(net, plain.batch([pack(parts), pack(parts[::-1])], seed=0, step=0))
    assert abs(crossing - packed) > 1e-3 * packed
