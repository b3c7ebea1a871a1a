"""Runs whose replicas differ are stopped and go on: as if never stopped, or with another number of replicas."""

import pytest
import torch

from loops import config, distance, run_all
from paceline.checkpoint import load
from paceline.config import choose
from paceline.registry import SYNCS
from tolerances import FP64_EQUAL


def small(name):
    """A strategy whose periods do not end with the run."""
    fields = SYNCS.load(name).model_fields
    short = {"start": 1, "every": 3, "fragments": 2, "delay": 2}
    return {"name": name} | {key: value for key, value in short.items() if key in fields}


NAMES = [name for name in SYNCS if not (choose(SYNCS, name).in_rounds or choose(SYNCS, name).claims)]
"""Those of which a checkpoint may fall anywhere: test_federated.py and test_async_local_sgd.py have the others."""
STEPS = 7
LAYOUTS = {"plain": {}, "shard": {"shard": 2}, "tensor": {"tensor": 2}}


def settings(name, folder, *, replicas=2, layout="plain"):
    """AdamW, whose moments go through the checkpoint, and a rate that changes from step to step."""
    return config(
        small(name),
        folder=str(folder),
        replicas=replicas,
        layout=LAYOUTS[layout],
        optimizer={"name": "adamw", "lr": 0.01},
        schedule={"name": "linear", "warmup_steps": 2},
        train={"steps": STEPS, "clip_norm": 1.0},
    )


@pytest.mark.parametrize(("layout", "names"), [("plain", NAMES), ("shard", ["diloco"])])
def test_a_run_stopped_anywhere_goes_on_as_if_never_stopped(layout, names, pool, tmp_path):
    """Every loss, byte and state of every replica; step 5 is in the middle of a period."""
    whole = run_all(pool, [settings(name, tmp_path / name / "whole", layout=layout) for name in names])
    cut = [settings(name, tmp_path / name / "cut", layout=layout) for name in names]
    first, then = run_all(pool, cut, until=5), run_all(pool, cut)
    for name, one, before, after in zip(names, whole, first, then, strict=True):
        for replica in range(2):
            assert one.losses[replica] == before.losses[replica] + after.losses[replica], name
            assert distance(one.states[replica], after.states[replica]) == 0.0, name
        assert all(a + b == c for a, b, c in zip(before.sent_bytes, after.sent_bytes, one.sent_bytes, strict=True))
        differ = distance(before.weights[0], before.weights[1]) > 1e-6
        assert differ is not choose(SYNCS, name).keeps_equal, name


def test_what_is_saved_between_exchanges(pool, tmp_path):
    """Each replica's own parameters and moments; what they agreed on once."""
    run = settings("diloco", tmp_path)
    (stopped,) = run_all(pool, [run], until=5)
    with load(tmp_path / "checkpoints", 5) as saved:
        names = saved.names
        kinds = {name: str(saved.entry(name).kind) for name in names}
        for name, own in stopped.weights[1].items():
            assert torch.equal(saved.tensor(f"model/{name}")[1], own)
            mean = torch.stack([weights[name] for weights in stopped.weights]).mean(0)
            assert torch.allclose(saved.common(f"model/{name}"), mean, rtol=1e-12, atol=0)
        name = "model.embed_tokens.weight"
        assert saved.tensor("sync/window").shape == (2, 3) and saved.tensor("sync/window")[0, 2] == 2
        assert {kinds[f"model/{name}"], kinds[f"optimizer/{name}/exp_avg"]} == {"per_replica"}
        assert kinds[f"sync/{name}/agreed"] == kinds[f"sync/{name}/outer_momentum"] == "parameter"


@pytest.mark.parametrize("then", [1, 3])
def test_with_another_number_of_replicas_all_go_on_from_the_mean(then, pool, tmp_path):
    """Of parameters and moments; what was agreed on stays, and the period begins anew."""
    (stopped,) = run_all(pool, [settings("diloco", tmp_path)], until=5)
    (resumed,) = run_all(pool, [settings("diloco", tmp_path, replicas=then)], until=0)
    one, other = stopped.states
    for state in resumed.states:
        assert state.keys() == one.keys()
        for slot, value in state.items():
            expected = torch.zeros(3) if slot == "sync/window" else (one[slot] + other[slot]) / 2
            assert torch.allclose(value, expected.to(value), rtol=FP64_EQUAL, atol=0), slot
            assert not slot.endswith("agreed") or torch.equal(value, one[slot])
    (learned,) = run_all(pool, [settings("diloco", tmp_path, replicas=then)])
    assert distance(learned.weights[0], learned.weights[-1]) == 0.0


def test_replicas_that_were_equal_and_then_differ(pool, tmp_path):
    """A single replica's checkpoint is the start of three."""
    (stopped,) = run_all(pool, [settings("local_sgd", tmp_path, replicas=1)], until=5)
    (resumed,) = run_all(pool, [settings("local_sgd", tmp_path, replicas=3)], until=0)
    for state in resumed.states:
        assert distance(stopped.states[0] | {"sync/window": torch.zeros(3)}, state) == 0.0


def test_under_another_layout(pool, tmp_path):
    """Saved by sharded replicas between exchanges, continued by replicas of tensor ranks, against never stopped."""
    (whole,) = run_all(pool, [settings("slowmo", tmp_path / "whole")])
    run_all(pool, [settings("slowmo", tmp_path / "cut", layout="shard")], until=4)
    (after,) = run_all(pool, [settings("slowmo", tmp_path / "cut", layout="tensor")])
    for replica in range(2):
        assert distance(whole.weights[replica], after.weights[replica]) < 1e-6
        assert whole.losses[replica][4:] == pytest.approx(after.losses[replica], rel=1e-6)
