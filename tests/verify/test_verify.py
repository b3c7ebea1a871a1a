"""Layouts learn what one process learns; the whole matrix is ``make verify-all``."""

import pytest

from paceline.config import Config
from paceline.errors import ConfigError
from paceline.models.tiny import DROPOUTS, TINY
from paceline.verify.cases import SINGLE, parse
from paceline.verify.run import Trial

OBJECTIVES = {"causal": "next_token", "masked": "masked", "seq2seq": "seq2seq"}

TOGETHER = (
    "shard=2,tensor=2",
    "shard=2,zero=2,pipeline=2",
    "context=2,tensor=2",
    "replicas=2,tensor=2,sequence=true,recompute=full",
    "replicas=2,pipeline=2,schedule=zbv",
    "tensor=2,pipeline=2",
    "tensor=4",
    "context=4",
    "pipeline=4",
    "shard=4,accumulate=2",
)


def config(family, **model):
    head, settings = TINY[family]
    return Config.parse(
        {
            "model": {"config": {**settings, **model}},
            "data": {"source": "unused"},
            "objective": OBJECTIVES[head],
            "batch": {"sequences": 8, "sequence_tokens": 24},
            "train": {"steps": 1},
        }
    )


@pytest.fixture(scope="module")
def llama(pool):
    with Trial(config("llama", num_hidden_layers=4, tie_word_embeddings=True, vocab_size=131), pool) as trial:
        yield trial


@pytest.mark.parametrize("words", [*SINGLE, *TOGETHER])
def test_llama(llama, words):
    (case,) = parse(words)
    row = llama.judge(case)
    assert row.verdict == "equal", row.text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("expert=2", "layout.expert=2"),
        ("shard=2,pipeline=2,schedule=zbv", "Use zero=2"),
        ("tensor=3", "attention heads"),
        ("pipeline=2,schedule=none", "layout.schedule='none'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(llama, words, expected):
    (case,) = parse(words)
    row = llama.judge(case)
    assert row.verdict == "refused" and expected in row.reason


def dropping(family, probability):
    return dict.fromkeys(DROPOUTS[family], probability)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "bert", "t5"])
def test_other_families(pool, family):
    with Trial(config(family, **(dropping(family, 0.1) if family in DROPOUTS else {})), pool) as trial:
        for words in ("shard=2", "tensor=2", "context=2", "pipeline=2"):
            (case,) = parse(words)
            row = trial.judge(case)
            assert row.is_good, row.text()
            assert row.verdict == "equal" or (family, words) in REFUSED, row.text()


REFUSED = {("t5", "context=2")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("shard", "expected key=value"),
        ("shards=2", "shards"),
        ("shard=0", "shard"),
        ("zero=4", "zero"),
        ("replicas=none", "replicas"),
    ],
)
def test_words_that_name_no_layout(words, expected):
    with pytest.raises(ConfigError, match=expected):
        parse(words)


def test_pairs_do_not_set_one_thing_twice():
    cases = parse("pairs")
    assert len(cases) > 60 and len({case.name for case in cases}) == len(cases)
    assert max(case.ranks for case in cases) == 4


@pytest.fixture(scope="module")
def gpt2(pool):
    """With dropout of everything."""
    with Trial(config("gpt2", n_layer=4, vocab_size=131, **dropping("gpt2", 0.1)), pool) as trial:
        yield trial


@pytest.mark.parametrize(
    "words",
    [
        "replicas=2",
        "accumulate=3",
        "tensor=2,sequence=true,recompute=full",
        "context=2,attention=ring",
        "context=2,attention=ulysses,tensor=2",
        "pipeline=2,schedule=zbv,zero=2,recompute=full",
    ],
)
def test_dropout_is_that_of_one_process(gpt2, words):
    (case,) = parse(words)
    row = gpt2.judge(case)
    assert row.verdict == "equal", row.text()


@pytest.mark.parametrize("words", ["pipeline=2,schedule=zbv,zero=2", "tensor=2,pipeline=2"])
def test_a_block_that_every_stage_calls(pool, words):
    """ALBERT has one: it drops out by the number of the call, and its gradient is counted by one rank."""
    with Trial(config("albert", num_hidden_layers=4, **dropping("albert", 0.1)), pool) as trial:
        (case,) = parse(words)
        row = trial.judge(case)
        assert row.verdict == "equal", row.text()


def test_dropout_is_not_switched_off_in_the_trial(pool):
    losses = []
    for probability in (0.0, 0.5):
        with Trial(config("gpt2", **dropping("gpt2", probability)), pool) as trial:
            losses.append(trial._own_run["losses"][0])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_what_is_drawn_by_micro_batch_is_seen_to_differ(pool):
    opt = {**TINY["llama"][1], "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5}
    del opt["intermediate_size"], opt["num_key_value_heads"]
    with Trial(Config.parse({**config("llama").tree(), "model": {"config": opt}}), pool) as trial:
        assert trial.judge(*parse("replicas=2")).verdict == "DIFFERS"
        refused = trial.judge(*parse("pipeline=2"))
        assert refused.verdict == "refused" and "model.decoder draws random numbers" in refused.reason
