from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline.config import DataConfig, choose
from paceline.data.rows import Row
from paceline.errors import ConfigError, PlanError
from paceline.objectives.seq2seq import Seq2Seq
from paceline.registry import OBJECTIVES

PAIRS = Seq2Seq(source="en", target="de")


@pytest.fixture
def pairs():
    none = np.zeros(1, np.int64)
    return [
        Row(0, np.array([10, 11, 12, 1]), none, np.array([20, 21, 1])),
        Row(1, np.array([13, 1]), none, np.array([22, 23, 24, 25, 1])),
    ]


def test_pairs_are_source_and_shifted_target(pairs, context):
    batch = PAIRS.build(context(decoder_start=7)).batch(pairs, seed=0, step=0)
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12, 1], [13, 1, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[7, 20, 21, 0, 0], [7, 22, 23, 24, 25]]
    assert batch.labels.tolist() == [[20, 21, 1, -100, -100], [22, 23, 24, 25, 1]]
    assert batch.count == 8


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_loss_is_that_of_the_model_itself(family, pairs, context, model):
    net = model(family, "seq2seq")
    objective = PAIRS.build(context(decoder_start=net.config.decoder_start_token_id))
    batch = objective.batch(pairs, seed=0, step=0)
    mask = batch.inputs["attention_mask"]
    mean = net(input_ids=batch.inputs["input_ids"], attention_mask=mask, labels=batch.labels).loss
    torch.testing.assert_close(objective.loss(net, batch) / batch.count, mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_loss_of_a_batch_of_pairs_is_the_sum_of_their_own(family, pairs, context, model):
    net, objective = model(family, "seq2seq"), PAIRS.build(context())
    together = objective.loss(net, objective.batch(pairs, seed=0, step=0))
    alone = [objective.loss(net, objective.batch([pair], seed=0, step=0)) for pair in pairs]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=0)


def test_spans_of_a_text_become_its_target(documents, pack, context):
    given = context(sequence_tokens=32)
    row = pack(documents(Seq2Seq().row_tokens(given)))
    batch = Seq2Seq().build(given).batch([row], seed=0, step=0)
    source, target = batch.inputs["input_ids"][0].tolist(), batch.labels[0].tolist()
    assert (len(source), len(target)) == (32, Seq2Seq().sizes(len(row.tokens)).target_tokens)
    assert [token for token in source if token > 50] == [token for token in target if token > 50] == [60, 59]
    assert sorted(source + target) == sorted([*row.tokens.tolist(), *[60, 59] * 2, 1, 1])
    assert batch.inputs["decoder_input_ids"][0].tolist() == [0, *target[:-1]]


def test_the_tail_of_a_text_is_corrupted_in_proportion(documents, pack, context):
    given = context(sequence_tokens=32)
    rows = [pack(documents(Seq2Seq().row_tokens(given))), pack(documents(11), 1), Row(2, np.array([9]), np.array([0]))]
    batch = Seq2Seq().build(given).batch(rows, seed=0, step=0)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [32, 11 - 2 + 1 + 1, 2]
    assert (batch.labels != -100).sum(dim=1).tolist() == [5 + 2 + 1, 2 + 1 + 1, 1]


def test_columns_are_those_of_the_pair_or_the_text():
    data = DataConfig(source="texts")
    assert PAIRS.columns(data) == ("en", "de")
    assert Seq2Seq().columns(data) == ("text",)


def test_a_tokenizer_trained_on_the_data_reserves_a_sentinel_for_each_span():
    assert Seq2Seq().special_tokens(512) == tuple(f"<extra_id_{k}>" for k in range(28))
    assert PAIRS.special_tokens(512) == ()


def test_pairs_need_no_sentinels_and_may_be_isolated(pairs, context):
    given = context(sentinels=(), isolate_documents=True)
    assert PAIRS.build(given).batch(pairs, seed=0, step=0).count == 8
    assert PAIRS.row_tokens(given) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_start": None}, "has no decoder_start_token_id"),
        ({"sentinels": (60,), "sequence_tokens": 64}, r"needs 3 sentinels .* but the tokenizer has 1"),
        ({"isolate_documents": True}, r"data\.isolate_documents=true does not go with span corruption"),
        ({"sequence_tokens": 2}, r"batch\.sequence_tokens=2 is too short"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, context):
    with pytest.raises(PlanError, match=message):
        Seq2Seq().build(context(**changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "en"}, "source='en' without target"),
        ({"target": "de"}, "target='de' without source"),
        ({"noise_density": 0}, "objective.noise_density=0: "),
        ({"noise_density": 0.95}, r"objective.noise_density=0\.95: "),
        ({"mean_span_tokens": 0.5}, r"objective.mean_span_tokens=0\.5: "),
    ],
)
def test_options_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        choose(OBJECTIVES, {"name": "seq2seq", **values})


def test_a_pair_that_fills_up_has_no_target(pairs, context):
    batch = PAIRS.build(context()).batch([pairs[0], replace(pairs[1], weight=0.0)], seed=0, step=0)
    assert batch.count == 3
