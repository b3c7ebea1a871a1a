"""What a config asks for beside the loss, under layouts: verify runs it as it is asked for."""

import pytest

from paceline.checkpoint import load
from paceline.config import Config
from paceline.models.tiny import TINY
from paceline.verify.cases import parse
from paceline.verify.run import Trial

STEPS = 6
LAYOUTS = ("replicas=2", "shard=2", "tensor=2", "pipeline=2", "shard=2,tensor=2,sequence=true")
OTHERS = {
    "llama": ("shard=2,zero=1", "tensor=4", "context=2", "pipeline=2,tensor=2"),
    "gpt2": ("shard=2,tensor=2", "pipeline=2"),
    "mixtral": ("shard=2,expert=2", "tensor=2"),
}
"""Cuts of other kinds: heads that do not divide, matrices with the inputs first, fused ones, stacks of experts."""


def config(family, objective="next_token", **sections):
    _, settings = TINY[family]
    tree = {
        "model": {"config": {**settings, "num_hidden_layers": 4, "vocab_size": 131}},
        "data": {"source": "unused"},
        "objective": objective,
        "batch": {"sequences": 8, "sequence_tokens": 24},
        "train": {"steps": 1},
    }
    return Config.parse(tree | sections)


EVERYTHING = {
    "train": {"steps": 1, "clip_value": 1.0, "clip_block_norm": 1.0},
    "regularisation": {"l2": 0.02, "l1": 0.003, "momentum": 1.0, "max_norm": 0.12},
}


@pytest.fixture(scope="module")
def everything(pool):
    """Each of them at work: other values of this model's gradients, rows and blocks are far below the bounds."""
    with Trial(config("llama", **EVERYTHING), pool, steps=STEPS) as trial:
        yield trial


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipping_and_penalties(everything, layout):
    (case,) = parse(layout)
    row = everything.judge(case)
    assert row.verdict == "equal", row.text()


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_clipping_and_penalties_of_other_cuts(pool, family):
    with Trial(config(family, **EVERYTHING), pool, steps=STEPS) as trial:
        rows = [trial.judge(case) for case in parse("; ".join(OTHERS[family]))]
    assert [row.verdict for row in rows] == ["equal"] * len(rows), "\n".join(row.text() for row in rows)


def test_an_optimizer_on_trial_gets_equal_gradients(pool):
    """What is asked for beside the loss is left out where an optimizer is judged by its updates on equal gradients."""
    asked = config("llama", optimizer="muon", **EVERYTHING)
    with Trial(asked, pool, steps=2, optimizer=asked.optimizer) as trial:
        (case,) = parse("shard=2")
        row = trial.judge(case)
        assert row.verdict == "equal", row.text()


def test_they_are_at_work(pool, everything):
    """Each of them changes what one process learns."""
    for section, key in [(section, key) for section, keys in EVERYTHING.items() for key in keys if key != "steps"]:
        others = {name: value for name, value in EVERYTHING[section].items() if name != key}
        with Trial(config("llama", **EVERYTHING | {section: others}), pool, steps=STEPS) as without:
            assert without._own_run["losses"] != everything._own_run["losses"], key


def test_what_a_penalty_on_momentum_keeps_is_saved(pool):
    """With every other state, by name: a resume may not forget the last update."""
    asked = config("llama", regularisation={"momentum": 1.0})
    with Trial(asked, pool, steps=2) as trial, load(trial._own_saved, 1) as saved:
        kept = {name.removeprefix("adjustment/") for name in saved.names if name.startswith("adjustment/")}
        matrices = {n for n in saved.names if n.startswith("model/") and len(saved.entry(n).shape) == 2}
        assert kept == {name.removeprefix("model/") for name in matrices}
        assert saved.values["a penalty on momentum"] is True


@pytest.fixture(scope="module")
def softened(pool):
    options = {"name": "next_token", "label_smoothing": 0.1, "z_loss": 0.01, "mixup": 0.4}
    with Trial(config("llama", objective=options), pool, steps=STEPS) as trial:
        yield trial


@pytest.mark.parametrize("layout", [*LAYOUTS, "context=2", "pipeline=2,tensor=2"])
def test_smoothing_z_loss_and_mixup(softened, layout):
    (case,) = parse(layout)
    row = softened.judge(case)
    assert row.verdict == "equal", row.text()


def test_smoothing_of_an_encoder_and_decoder(pool):
    options = {"name": "seq2seq", "label_smoothing": 0.1, "z_loss": 0.01}
    with Trial(config("t5", objective=options), pool, steps=2) as trial:
        (case,) = parse("tensor=2")
        row = trial.judge(case)
        assert row.verdict == "equal", row.text()
