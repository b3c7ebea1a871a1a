"""``sync: auto``: a function of the config that takes the best row, or says why it cannot."""

import math

import pytest

import sync_table
from paceline.config import Config, choose, schema, strategy_name
from paceline.errors import ConfigError, PlanError
from paceline.plan.network import Network
from paceline.recipes.explain import explain
from paceline.registry import SYNCS
from paceline.sync import measured
from paceline.sync.auto import Auto, words
from paceline.sync.base import Load, step_s
from paceline.sync.measured import YARDSTICKS, interpolate, worth
from paceline.sync.rows import PRESETS, ROWS
from paceline.train.settle import settle
from parity import tiny_llama

AUTO = {"name": "auto", "link": "1mbit/50ms", "compute_ms": 10}
SHAPES = {"a": (400, 1000), "b": (1000, 1200)}
"""1.6 M parameters."""


def runs(**losses):
    """What might have been measured: all-reduce at 3.0, 2.5, 2.0 and others, each with one seed."""
    known = dict(zip(YARDSTICKS, (3.0, 2.5, 2.0), strict=True)) | losses
    return {name: {"0": {"loss": loss}} for name, loss in known.items()}


def load(steps=1000, members=2, compute_s=0.03):
    return Load(shapes=SHAPES, members=members, steps=steps, value_bytes=4, compute_s=compute_s)


def best(link, known, **of):
    return Auto(link=link).candidates(load(**of), lambda _: True, known)[0].name


def tree(sync, **other):
    model = {"config": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}}
    return {"model": model, "data": {"source": "x"}, "train": {"steps": 1000}, "replicas": 4, "sync": sync, **other}


def test_worth_is_the_share_of_steps_in_which_all_reduce_gets_as_far():
    """Halves of the steps are half a nat apart, so a quarter of a nat more is worth 2 ** -0.5."""
    known = runs(**{"diloco 30": 2.25, "diloco 100": 3.25, "slowmo 10": 1.9})
    assert worth("diloco 30", known) == pytest.approx(math.sqrt(0.5))
    assert worth("diloco 100", known) == pytest.approx(0.25 * math.sqrt(0.5))
    assert worth("slowmo 10", known) == 1.0
    assert worth("local_sgd 10", known) is None
    for name, share in YARDSTICKS.items():
        assert worth(name, known) == pytest.approx(share)


def test_worth_is_of_the_seeds_that_all_have():
    known = runs(**{"diloco 30": 2.25})
    known["diloco 30"]["1"] = {"loss": 9.0}
    assert worth("diloco 30", known) == pytest.approx(math.sqrt(0.5))


def test_interpolation_goes_on_beyond_both_ends():
    assert interpolate(4.0, [3.0, 2.5, 2.0], [0.25, 0.5, 1.0]) == pytest.approx(0.0625)


def test_the_choice_follows_the_link():
    """Quick links are for all-reduce, slow ones for the longest period whose worth is not too low."""
    known = runs(**{"diloco 10": 2.2, "diloco 100": 2.4})
    assert best("100gbit/1us", known) == "all_reduce"
    assert best("10gbit/0.1ms", known) == "all_reduce"
    assert best("1gbit/5ms", known) == "diloco 10"
    assert best("1mbit/50ms", known) == "diloco 100"
    assert best("1mbit/50ms", known, steps=399) == "diloco 10", "of a hundred steps there would be no 4 exchanges"


def test_the_choice_has_the_least_time_for_what_is_learned_by_formulas_of_their_own():
    """All-reduce of 1.6 M fp32 values between two replicas: 6.4 MB a step, and five delays."""
    known = runs(**{"diloco 100": 2.4})
    found = Auto(link="100mbit/25ms").candidates(load(), lambda _: True, known)
    diloco, all_reduce = found
    assert (diloco.name, all_reduce.name) == ("diloco 100", "all_reduce")
    auto = Auto(link="100mbit/25ms", compute_ms=30)
    assert words(auto, load(), found) == (
        "auto on 100mbit/25ms, 30 ms of computation a step: diloco 100, 36.37 ms a step worth 57% rather than "
        "all_reduce, 667 ms a step"
    )
    assert all_reduce.step_s == pytest.approx(0.03 + 0.512 + 0.125, rel=1e-4)
    assert diloco.step_s == pytest.approx(0.03 + (0.512 + 0.125) / 100, rel=1e-4)
    assert diloco.cost_s == pytest.approx(diloco.step_s * 2**0.8)


def test_what_encoding_takes_counts():
    """On a quick link values are sooner sent as they are than in 8 bits: 29 ns each against 3 bytes at 10 Gbit/s."""
    known = runs(**{"all_reduce int8": 2.0})
    assert best("10gbit/0.1ms", known) == "all_reduce"
    assert best("100mbit/0.1ms", known) == "all_reduce int8"


def test_a_config_of_auto_becomes_one_of_a_strategy_and_stays_it():
    config = Config.parse(tree({"name": "auto", "link": "1mbit/50ms"}))
    assert Config.parse(config.tree()) == config
    said = []
    settled = settle(config, say=said.append)
    assert "auto on 1mbit/50ms" in said[0] and "assumed (sync.compute_ms sets it)" in said[0]
    assert settled.sync in [choose(SYNCS, row) for row in ROWS.values()]
    assert settle(settled) is settled
    assert settle(config) == settled, "nothing is timed"
    fast = settle(Config.parse(tree({"name": "auto", "link": "100gbit/1us", "compute_ms": 1000})))
    assert strategy_name(fast.sync) == "all_reduce"


def test_levels_are_chosen_one_by_one_and_groups_stay_equal():
    settled = settle(Config.parse(tree([AUTO, AUTO], replicas=[2, 2])))
    assert strategy_name(settled.syncs[0]) == "all_reduce", "a level below another keeps its replicas equal"
    assert not settled.syncs[1].keeps_equal
    below = settle(Config.parse(tree(["all_reduce", AUTO], replicas=[2, 2])))
    assert below.syncs[1] == settled.syncs[1]


def test_only_what_goes_with_the_rest_of_the_config_is_chosen():
    settled = settle(Config.parse(tree(AUTO, optimizer={"name": "ftrl"})))
    assert strategy_name(settled.sync) == "all_reduce"
    with pytest.raises(PlanError, match="sync=auto finds nothing that this config allows"):
        Auto(link="1mbit/1ms").candidates(load(), lambda _: False)


@pytest.mark.parametrize(
    ("sync", "said"),
    [
        ("auto", "sync.link is missing"),
        ({"name": "auto", "link": "quick"}, "sync.link='quick': expected a link such as 100mbit/25ms"),
        ({"name": "auto", "link": "1mbit/1ms", "compute_ms": 0}, "sync.compute_ms=0"),
    ],
)
def test_what_auto_is_not(sync, said):
    with pytest.raises(ConfigError, match=said):
        Config.parse(tree(sync))


def test_editors_are_told_of_auto():
    names = [form["properties"]["name"].get("const") for form in schema()["properties"]["sync"]["anyOf"][1:-1]]
    assert names == [*SYNCS, "auto"]


def test_rows_and_presets_are_what_a_config_takes():
    for row in ROWS.values():
        choose(SYNCS, row)
    assert all(name in ROWS for names in PRESETS.values() for name in names)


WAITS = {
    "all_reduce": 800 * 13,
    **dict.fromkeys((f"all_reduce {code}" for code in ("bf16", "int8", "int4", "sign")), 800 * 3),
    **dict.fromkeys((f"all_reduce {code}" for code in ("topk", "dct_topk")), 800),
    "all_reduce powersgd": 800 * 13,
    "local_sgd 10": 80 * 13,
    "local_sgd 100": 8 * 13,
    "slowmo 10": 80 * 13,
    "diloco 10": 80 * 13,
    "diloco 30": 27 * 13,
    "diloco 30 int8": 27 * 4,
    "diloco 30 int4": 27 * 4,
    "diloco 100": 8 * 13,
    "diloco 100 int8": 8 * 4,
    "diloco 100 int4": 8 * 4,
    "gossip 30": 27 * 4 + 12,
    "gossip 100": 8 * 4 + 12,
    "partial 10": 80 * 14,
}
"""For how many delays one of four replicas waits in 800 steps: 12 round a ring, there and back at each of 6 places; 1
for a few numbers; 2 + 1 for codes, 12 + 1 for PowerSGD's factors, the second of which are small. By hand."""
CODED_NS = {"bf16": 10, "int8": 29, "int4": 39, "sign": 25, "topk": 23, "dct_topk": 28, "powersgd": 19}
"""Of a value, of which the table's model has 0.23 million (benchmarks/reducers.py)."""
GRID = [
    f"{rate}/{delay}"
    for rate in ("10mbit", "30mbit", "100mbit", "300mbit", "1gbit", "10gbit")
    for delay in ("1ms", "3ms", "10ms", "30ms", "100ms")
]


@pytest.mark.parametrize("compute_s", [0.01, 0.3])
def test_the_choice_is_within_a_tenth_of_the_best_row_that_was_measured(compute_s):
    """On every link, by the worth of every row and the bytes that it was seen to send, and the waits above.

    Of those whose exchanges wait otherwise (fragments beside steps, servers) the time is taken from the product.
    """
    known = measured.read()
    given = Load(shapes=sync_table._shapes(), members=4, steps=800, value_bytes=4, compute_s=compute_s)
    timed = {name for name in ROWS if name.startswith(("streaming", "parameter_server", "async_local_sgd"))}
    assert set(ROWS) - set(WAITS) - timed == {"post_local_sgd 10"}, "its start means nothing in another run"
    for text in GRID:
        link, costs = Network.parse(text), {}
        for name in (name for name in ROWS if name in known and name != "post_local_sgd 10"):
            step = step_s(choose(SYNCS, ROWS[name]), link, given)
            if name in WAITS:
                sent, every = known[name]["0"]["sent_bytes"], ROWS[name].get("every", 1) if name != "all_reduce" else 1
                coded_s = CODED_NS.get(name.split()[-1], 0) * 1e-9 * 0.23e6 / every
                step = compute_s + coded_s + 8 * sent / link.bits_per_s + WAITS[name] * link.delay_s / 800
            costs[name] = step / worth(name, known)
        chosen = Auto(link=text).candidates(given, lambda _: True)[0].name
        assert costs[chosen] <= 1.1 * min(costs.values()), (text, chosen, min(costs, key=costs.get))


def test_a_module_of_ones_own_is_measured_itself():
    config = Config.parse({key: value for key, value in tree(AUTO).items() if key != "model"})
    assert settle(config, tiny_llama()).sync == settle(config, tiny_llama(seed=1)).sync
    assert settle(config) is config, "without a model what needs one will say so"


def test_the_plan_says_what_was_chosen_and_why():
    plan = explain(Config.parse(tree(AUTO)))
    assert strategy_name(plan.config.sync) in SYNCS
    assert plan.chosen[0].startswith("auto on 1mbit/50ms, 10 ms of computation a step: ")
    assert plan.chosen[0] in plan.text() and plan.values()["chosen"] == list(plan.chosen)
    assert explain(plan.config).chosen == ()
