"""Optimizers that look beyond single values, judged by their updates under layouts."""

import pytest

from paceline.config import Config, choose
from paceline.models.tiny import TINY
from paceline.registry import OPTIMIZERS, SYNCS
from paceline.verify.cases import parse
from paceline.verify.run import Row, Table, Trial

STEPS = 6
CASES = [
    ("muon", "llama", ["shard=2,zero=3", "pipeline=2,schedule=1f1b"]),
    ("soap", "llama", ["tensor=2,sequence=true"]),
    ("shampoo", "llama", ["context=2,attention=ring"]),
    ("lamb", "mixtral", ["shard=2,expert=2,tensor=2"]),
    ("adafactor", "mixtral", ["shard=2,expert=2"]),
    ("adamw_8bit", "llama", ["replicas=2,tensor=2"]),
    ("sophia", "llama", ["tensor=2,context=2", "replicas=2"]),
    ("lbfgs", "llama", ["replicas=2"]),
    ("newton_cg", "llama", ["accumulate=3"]),
]

OPTIONS = {"soap": {"every": 2}, "sophia": {"every": 2}, "adamw_8bit": {"small": 0}}
"""Such that what is particular happens within a few steps of a small model."""


def test_all_that_look_further_are_tried():
    assert {name for name, *_ in CASES} == {name for name in OPTIMIZERS if OPTIMIZERS.load(name).sees != "values"}


def config(family, optimizer):
    _, settings = TINY[family]
    return Config.parse(
        {
            "model": {"config": {**settings, "num_hidden_layers": 4, "vocab_size": 131}},
            "data": {"source": "unused"},
            "optimizer": optimizer,
            "batch": {"sequences": 8, "sequence_tokens": 24},
            "train": {"steps": 1},
        }
    )


@pytest.mark.parametrize(("name", "family", "words"), CASES, ids=[name for name, *_ in CASES])
def test_the_update_is_that_of_one_process(pool, name, family, words):
    options = choose(OPTIMIZERS, {"name": name, **OPTIONS.get(name, {})})
    with Trial(config(family, name), pool, steps=STEPS, optimizer=options) as trial:
        for case in parse(";".join(words)):
            row = trial.judge(case)
            assert row.verdict == "equal", row.text()
            assert row.name == f"{case.name} with {name}"


@pytest.mark.parametrize("name", ["soap", "sophia"])
def test_replicas_that_learn_alone_get_their_own_gradients(pool, name):
    """Each the ones of the replica in its place, and it has a state of its own."""
    options = choose(OPTIMIZERS, {"name": name, **OPTIONS[name]})
    update = {"sync": choose(SYNCS, {"name": "slowmo", "every": 2}), "replicas": 2}
    with Trial(config("llama", name).model_copy(update=update), pool, steps=STEPS, optimizer=options) as trial:
        rows = [trial.judge(case) for case in parse("replicas=2,tensor=2; replicas=2,shard=2,zero=3")]
    assert [row.verdict for row in rows] == ["equal"] * 2, rows


def test_layouts_are_counted_once_whatever_was_judged():
    rows = [Row(layout="a", verdict="equal"), Row(layout="b", verdict="equal")]
    rows += [Row(layout="a", optimizer="soap", verdict="DIFFERS"), Row(layout="b", optimizer="soap", verdict="equal")]
    table = Table(rows=tuple(rows), dtype="fp64", model="llama", named=False)
    assert "1 layout(s) equal to one process, 0 refused, 1 wrong" in table.text() and "SGD and of soap" in table.text()
    assert not table.is_good
