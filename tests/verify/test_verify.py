"""What is tried, how it is judged, and what is refused. That layouts are equal: test_matrix.py."""

import pytest
import torch

from paceline.checkpoint import Checkpointer, LocalExchange, tensor_state
from paceline.config import Config, choose
from paceline.errors import ConfigError
from paceline.models.tiny import DROPOUTS, TINY
from paceline.registry import SYNCS
from paceline.verify.cases import MIXTURE, parse
from paceline.verify.compare import bounds_of, compare_saved
from paceline.verify.routing import compare_routes, narrowest
from paceline.verify.run import Row, Table, Trial

OBJECTIVES = {"causal": "next_token", "masked": "masked", "seq2seq": "seq2seq"}


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
    with Trial(config("llama", num_hidden_layers=5, tie_word_embeddings=True, vocab_size=131), pool) as trial:
        yield trial


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


@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("bf16", ("shard=2", "tensor=2")),
        ("bf16_pure", ("shard=2,tensor=2", "pipeline=2")),
        ("fp16", ("shard=2,tensor=2", "replicas=2,pipeline=2")),
    ],
)
def test_16_bits_are_judged_by_a_bound_that_can_fail(pool, dtype, layouts):
    with Trial(config("llama"), pool, dtype=dtype) as trial:
        for words in layouts:
            (case,) = parse(words)
            row = trial.judge(case)
            assert row.verdict == "equal", row.text()
            assert row.difference.gradient.error > 2.0**-17  # it did compute in 16 bits


def test_late_states_in_16_bits_are_judged_by_how_far_one_process_is_from_itself(pool):
    """Of a T5 in fp16 the momentum is off by more after some steps than what its depth says of a gradient."""
    with Trial(config("t5"), pool, dtype="fp16") as trial:
        bounds = bounds_of("fp16", trial._own_run["blocks"])
        assert bounds.saved == bounds.gradient < trial._bounds.saved == 3 * trial._drift()
        row = trial.judge(*parse("tensor=2"))
        assert row.verdict == "equal", row.text()


def test_near_ties_in_routing_are_judged_in_fp64(pool):
    (case,) = parse("tensor=2")
    with Trial(config("mixtral"), pool, dtype="fp32") as trial:
        assert trial._own_run["routes"].keys() == {f"model.layers.{i}.mlp.experts" for i in range(2)}
        trial._own_run["narrowest"] = 1e-9
        row = trial.judge(case)
    assert row.verdict == "equal" and "judged in fp64" in row.reason, row.text()
    assert row.difference.gradient.error < 1e-12


def test_patterns_of_the_user_cut_what_has_no_plan(pool):
    tree = config("llama").tree()
    tree["model"]["config"] = {
        "model_type": "ctrl",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "dff": 48,
        "n_positions": 64,
    }
    refused = Config.parse(tree)
    tree["layout"] = {"tensor": 2, "tensor_patterns": {"ffn.0": "column", "ffn.2": "row"}}
    (case,) = parse("tensor=2")
    for words, verdict in ((refused, "refused"), (Config.parse(tree), "equal")):
        with Trial(words, pool, steps=4) as trial:
            row = trial.judge(case)
            assert row.verdict == verdict, row.text()


def test_a_layout_that_chooses_other_experts_is_found():
    reference = {"a": [3, 1], "b": [2, 2]}
    halves = [{"routes": {"a": [2], "b": [1, 1]}}, {"routes": {"a": [1, 1], "b": [1, 1]}}]
    assert compare_routes(reference, halves) == []
    halves[1]["routes"]["a"] = [2]
    (sentence,) = compare_routes(reference, halves)
    assert "experts of a got [4] tokens, expected [3, 1]" in sentence


def test_the_narrowest_choice_is_seen():
    with narrowest() as found:
        torch.topk(torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.4375, 0.0]]), 1)
    assert found == [0.0625]


def test_a_checkpoint_that_differs_is_found(tmp_path):
    def saved(name, **tensors):
        with Checkpointer(tmp_path / name, rank=0, ranks=1, exchange=LocalExchange(), layout={}) as writer:
            writer.save(1, {key: tensor_state(value) for key, value in tensors.items()}, {"sequences_seen": 15})
        return tmp_path / name

    bounds = bounds_of("fp64", 2)
    whole = {"model/a": torch.randn(3, 2), "optimizer/a/momentum_buffer": torch.randn(3, 2)}
    one = saved("one", **whole)
    assert compare_saved(one, saved("same", **whole), 1, bounds) == []
    (sentence,) = compare_saved(one, saved("other", **whole | {"model/a": whole["model/a"] + 1e-3}), 1, bounds)
    assert sentence.startswith("model/a was saved with a difference")
    (sentence,) = compare_saved(one, saved("less", **{"model/a": whole["model/a"]}), 1, bounds)
    assert "momentum_buffer" in sentence


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


def dropping(family, probability):
    return dict.fromkeys(DROPOUTS[family], probability)


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
    assert abs(losses[0] - losses[1]) > 1e-6


def test_what_is_drawn_by_micro_batch_is_seen_to_differ(pool):
    opt = {**TINY["llama"][1], "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5}
    del opt["intermediate_size"], opt["num_key_value_heads"]
    with Trial(Config.parse({**config("llama").tree(), "model": {"config": opt}}), pool) as trial:
        drawn = trial.judge(*parse("replicas=2"))
        assert drawn.verdict == "by chance" and not drawn.is_good, drawn.text()
        assert "model.decoder draws random numbers" in drawn.reason
        refused = trial.judge(*parse("pipeline=2"))
        assert refused.verdict == "refused" and "model.decoder draws random numbers" in refused.reason


@pytest.mark.parametrize(
    ("verdicts", "named", "good"),
    [
        (["equal", "equal"], True, True),
        (["equal", "refused"], True, False),
        (["equal", "refused"], False, True),
        (["equal", "DIFFERS"], False, False),
        (["equal", "failed"], False, False),
    ],
)
def test_what_was_asked_for_by_name_and_refused_is_not_proven(verdicts, named, good):
    rows = tuple(Row(layout=str(i), verdict=verdict) for i, verdict in enumerate(verdicts))
    assert Table(rows=rows, dtype="fp64", model="llama", named=named).is_good is good


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("words", ["compile=true", "compile=true,recompute=selective,shard=2"])
def test_compiled_blocks(llama, words):
    (case,) = parse(words)
    row = llama.judge(case)
    assert row.verdict == "equal", row.text()


def test_replicas_that_differ_are_judged_by_as_many_of_one_process(pool):
    """Saved between exchanges under one layout, continued under the next; and what levels cannot be judged by."""
    llama = config("llama", tie_word_embeddings=True)
    update = {"sync": choose(SYNCS, "diloco"), "replicas": 2}
    with Trial(llama.model_copy(update=update), pool, steps=8) as trial:
        rows = [trial.judge(case) for case in parse("replicas=2,tensor=2; replicas=2,shard=2; replicas=1,context=2")]
    assert [row.verdict for row in rows] == ["equal"] * 3, rows
    assert rows[0].sent_bytes > 0
    levels = {"sync": (choose(SYNCS, "all_reduce"), choose(SYNCS, "diloco")), "replicas": (2, 2)}
    with Trial(llama.model_copy(update=levels), pool, steps=8) as trial:
        four, three = (trial.judge(case) for case in parse("replicas=4; replicas=3"))
    assert four.verdict == "equal", four
    assert three.verdict == "refused" and "are not the levels of replicas=[2, 2]" in three.reason
