"""What a config asks for beside the loss, under layouts: verify runs it as it is asked for."""

import pytest

from paceline.config import Config
from paceline.models.tiny import TINY
from paceline.verify.cases import parse
from paceline.verify.run import Trial

STEPS = 6
LAYOUTS = ("replicas=2", "shard=2", "tensor=2", "pipeline=2", "shard=2,tensor=2,sequence=true")


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


@pytest.fixture(scope="module")
def everything(pool):
    """Each of them at work: other values of this model's gradients, rows and blocks are far below the bounds."""
    asked = config(
        "llama",
        train={"steps": 1, "clip_value": 1.0, "clip_block_norm": 1.0},
        regularisation={"l2": 0.02, "l1": 0.003, "momentum": 1.0, "max_norm": 0.12},
    )
    with Trial(asked, pool, steps=STEPS) as trial:
        yield trial


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipping_and_penalties(everything, layout):
    (case,) = parse(layout)
    row = everything.judge(case)
    assert row.verdict == "equal", row.text()


def test_they_are_at_work(pool, everything):
    """Each of them changes what one process learns."""
    for section, key in [
        *(("regularisation", key) for key in ("l2", "l1", "momentum", "max_norm")),
        *(("train", key) for key in ("clip_value", "clip_block_norm")),
    ]:
        tree = everything._config.tree()
        tree[section][key] = None if "clip" in key or key == "max_norm" else 0.0
        with Trial(Config.parse(tree), pool, steps=STEPS) as without:
            assert without._own_run["losses"] != everything._own_run["losses"], key


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
