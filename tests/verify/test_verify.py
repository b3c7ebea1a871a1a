"""Layouts learn what one process learns; the whole matrix is ``make verify-all``."""

import pytest

from paceline.config import Config
from paceline.errors import ConfigError
from paceline.models.tiny import TINY
from paceline.verify.cases import MIXTURE, SINGLE, parse
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
        ("shard=2,expert=2", "LlamaForCausalLM has no module of experts"),
        ("shard=2,pipeline=2,schedule=zbv", "Use zero=2"),
        ("tensor=3", "attention heads"),
        ("pipeline=2,schedule=none", "layout.schedule='none'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(llama, words, expected):
    (case,) = parse(words)
    row = llama.judge(case)
    assert row.verdict == "refused" and expected in row.reason


EXPERTS = (
    "context=2,expert=2",
    "shard=2,expert=2,recompute=full,accumulate=3",
    "shard=4,expert=2,zero=1",
    "replicas=2,shard=2,expert=2",
    "shard=2,expert=2,tensor=2,sequence=true",
    "pipeline=2,shard=2,expert=2,schedule=zbv,zero=2",
)


@pytest.fixture(scope="module")
def mixtral(pool):
    with Trial(config("mixtral", num_hidden_layers=4, vocab_size=131), pool) as trial:
        yield trial


@pytest.mark.parametrize("words", EXPERTS)
def test_experts(mixtral, words):
    assert words in MIXTURE
    (case,) = parse(words)
    row = mixtral.judge(case)
    assert row.verdict == "equal", row.text()


@pytest.fixture(scope="module")
def mixture_in_balance(pool):
    with Trial(config("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5), pool) as trial:
        yield trial


@pytest.mark.parametrize(
    "words",
    [
        "accumulate=3",
        "replicas=2,tensor=2",
        "shard=2,expert=2,recompute=full",
        "context=2,tensor=2,sequence=true,expert=2",
    ],
)
def test_the_balance_loss(mixture_in_balance, words):
    (case,) = parse(words)
    row = mixture_in_balance.judge(case)
    assert row.verdict == "equal", row.text()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "bert", "t5"])
def test_other_families(pool, family):
    with Trial(config(family), pool) as trial:
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
