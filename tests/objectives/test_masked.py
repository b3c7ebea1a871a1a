import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paceline.config import choose
from paceline.data.rows import Row
from paceline.errors import ConfigError, PlanError
from paceline.objectives.masked import Masked
from paceline.registry import OBJECTIVES


@pytest.fixture
def long_row():
    return Row(0, np.random.default_rng(0).integers(5, 4000, 200_000), np.array([0]))


def test_shares_of_hidden_tokens_are_those_asked_for(long_row, context):
    batch = Masked().build(context(vocabulary=4000)).batch([long_row], seed=0, step=0)
    seen, tokens = batch.inputs["input_ids"][0].numpy(), long_row.tokens
    chosen = (batch.labels[0] != -100).numpy()
    assert np.array_equal(batch.labels[0].numpy()[chosen], tokens[chosen])
    assert np.array_equal(seen[~chosen], tokens[~chosen])
    masked, kept = seen[chosen] == 2, seen[chosen] == tokens[chosen]
    shares = [chosen.mean(), masked.mean(), kept.mean()]
    assert shares == pytest.approx([0.15, 0.8, 0.1], abs=0.01)  # 0.004 is three deviations of the least certain
    random = seen[chosen][~masked & ~kept]
    assert (random.min(), random.max()) < (20, 4000) and random.max() > 3980


def test_shares_can_be_set(long_row, context):
    options = Masked(probability=1.0, mask_share=0.0, random_share=1.0)
    batch = options.build(context(vocabulary=4000)).batch([long_row], seed=0, step=0)
    assert batch.count == len(long_row.tokens)
    assert (batch.inputs["input_ids"][0].numpy() == long_row.tokens).mean() < 0.001


def test_special_tokens_are_never_hidden(context):
    special = {"bos": 5, "cls": 3, "sep": 4, "unk": 6}
    row = Row(0, np.tile([0, 1, 2, 3, 4, 5, 6, 7], 50), np.array([0]))
    options = Masked(probability=1.0, mask_share=1.0, random_share=0.0)
    batch = options.build(context(**special)).batch([row], seed=0, step=0)
    assert batch.inputs["input_ids"][0].tolist() == [3, *([0, 1, 2, 3, 4, 5, 6, 2] * 50), 4]
    assert set(batch.labels[0].tolist()) == {-100, 7}


def test_rows_stand_between_cls_and_sep_and_padding_is_masked(documents, pack, context):
    given = context(cls=3, sep=4, sequence_tokens=10)
    rows = [pack(documents(8)), pack(documents(5), 1)]
    batch = Masked().build(given).batch(rows, seed=0, step=0)
    ids = batch.inputs["input_ids"]
    assert Masked().row_tokens(given) == 8
    assert (ids[:, 0] == 3).all()
    assert (ids[0, 9], ids[1, 6]) == (4, 4)
    assert batch.inputs["attention_mask"].tolist() == [[1] * 10, [1] * 7 + [0] * 3]
    assert ids[1, 7:].tolist() == [0, 0, 0]


def test_padding_does_not_change_the_loss(documents, pack, context, model):
    net, objective = model("bert", "masked"), Masked(probability=0.5).build(context())
    rows = [pack(documents(30)), pack(documents(9), 1)]
    together = objective.loss(net, objective.batch(rows, seed=0, step=0))
    alone = [objective.loss(net, objective.batch([row], seed=0, step=0)) for row in rows]
    torch.testing.assert_close(together, sum(alone), rtol=1e-6, atol=0)


def test_a_row_without_a_hidden_token_has_no_target(documents, pack, context):
    batch = Masked(probability=1e-9).build(context()).batch([pack(documents(8))], seed=0, step=0)
    assert batch.count == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_loss_of_packed_documents_is_the_sum_of_their_own(family, attention, documents, pack, context, model):
    net, lengths = model(family, "masked", attention), (5, 12, 9)
    objective = Masked(probability=0.5).build(context(isolate_documents=True))
    rows = [pack(documents(*lengths)), pack(documents(8), 1)]
    batch = objective.batch(rows, seed=0, step=0)
    expected = 0.0
    for row, begin, length in [(0, 0, 5), (0, 5, 12), (0, 17, 9), (1, 0, 8)]:
        here = slice(begin, begin + length)
        logits = net(input_ids=batch.inputs["input_ids"][row : row + 1, here]).logits[0]
        expected += F.cross_entropy(logits, batch.labels[row, here], reduction="sum", ignore_index=-100)
    torch.testing.assert_close(objective.loss(net, batch), expected, rtol=1e-5, atol=0)


def test_cls_is_of_the_first_document_and_sep_of_the_last(documents, pack, context):
    objective = Masked().build(context(isolate_documents=True, cls=3, sep=4))
    inputs = objective.batch([pack(documents(2, 3)), pack(documents(2), 1)], seed=0, step=0).inputs
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2]]
    blocks = [torch.block_diag(torch.ones(a, a), torch.ones(b, b)) for a, b in [(3, 4), (4, 3)]]
    assert torch.equal(inputs["attention_mask"], torch.stack(blocks)[:, None].bool())


def test_a_tokenizer_trained_on_the_data_reserves_the_mask_token():
    assert Masked().special_tokens(512) == ("<mask>",)


def test_without_a_mask_token_it_is_refused(context):
    with pytest.raises(PlanError, match="the tokenizer has no mask token"):
        Masked().build(context(mask=None))


def test_a_sequence_of_cls_and_sep_alone_is_refused(context):
    with pytest.raises(PlanError, match=r"batch\.sequence_tokens=2 leaves no room"):
        Masked().row_tokens(context(cls=3, sep=4, sequence_tokens=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_share": 0.9, "random_share": 0.2}, "mask_share=0.9 and random_share=0.2 add up to more than 1"),
        ({"probability": 0}, "objective.probability=0: "),
        ({"probability": 1.5}, r"objective.probability=1\.5: "),
        ({"random_share": -0.1}, r"objective.random_share=-0\.1: "),
    ],
)
def test_options_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        choose(OBJECTIVES, {"name": "masked", **values})
