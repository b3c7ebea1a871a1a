import pytest
import torch
from torch import nn

from paceline.errors import ModelError
from paceline.objectives.base import Batch, logits_of, token_loss
from paceline.objectives.next_token import NextToken


class Own(nn.Module):
    """A user's own module: token ids in, logits out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 64)

    def forward(self, input_ids):
        return self.table(input_ids)


@pytest.fixture
def ids():
    return torch.arange(6).reshape(2, 3)


def test_own_module_that_takes_input_ids_and_returns_logits(context, documents, pack):
    torch.manual_seed(0)
    module = Own()
    objective = NextToken().build(context())
    batch = objective.batch([pack(documents(5, 7))], seed=0, step=0)
    log_p = module.table.weight.log_softmax(-1)
    tokens = torch.cat([torch.from_numpy(document) for document in documents(5, 7)])
    torch.testing.assert_close(objective.loss(module, batch), -log_p[tokens[:-1], tokens[1:]].sum())


def test_own_module_that_lacks_a_needed_keyword_is_refused(context, documents, pack):
    objective = NextToken().build(context(isolate_documents=True))
    batch = objective.batch([pack(documents(5, 7))], seed=0, step=0)
    with pytest.raises(ModelError, match=r"Own.forward takes \(input_ids\), but this batch needs position_ids"):
        objective.loss(Own(), batch)


def test_a_mask_is_left_out_only_if_it_masks_nothing(ids):
    module, mask = Own(), torch.ones(2, 3, dtype=torch.int64)
    assert torch.equal(logits_of(module, {"input_ids": ids, "attention_mask": mask}), module(ids))
    mask[1, 2] = 0
    with pytest.raises(ModelError, match="needs attention_mask"):
        logits_of(module, {"input_ids": ids, "attention_mask": mask})


def test_a_mask_of_truth_values_reaches_the_model_as_one_to_add_in_its_dtype(ids):
    class Seen(Own):
        def forward(self, input_ids, attention_mask):
            self.seen = attention_mask
            return super().forward(input_ids)

    module = Seen().bfloat16()
    logits_of(module, {"input_ids": ids, "attention_mask": torch.tensor([[True, False, True]])})
    assert module.seen.dtype == torch.bfloat16
    assert module.seen.tolist() == [[0.0, float("-inf"), 0.0]]


def test_an_output_without_logits_is_refused(ids):
    class Pair(Own):
        def forward(self, input_ids):
            return super().forward(input_ids), None

    with pytest.raises(ModelError, match=r"Pair gave tuple; expected logits or an object with \.logits"):
        logits_of(Pair(), {"input_ids": ids})


def test_logits_of_another_shape_are_refused(ids):
    class Last(Own):
        def forward(self, input_ids):
            return super().forward(input_ids)[:, -1:]

    with pytest.raises(ModelError, match=r"shape \(2, 1, 64\); expected \(2, 3, vocabulary\)"):
        token_loss(Last(), Batch(inputs={"input_ids": ids}, labels=ids, count=6, sequences=(0, 1)))


def test_a_batch_moves_as_a_whole(ids):
    batch = Batch(inputs={"input_ids": ids, "use_cache": False}, labels=ids, count=6, sequences=(3, 5))
    moved = batch.to(torch.device("meta"))
    assert moved.inputs["input_ids"].device.type == moved.labels.device.type == "meta"
    assert (moved.inputs["use_cache"], moved.count, moved.sequences) == (False, 6, (3, 5))
