"""Reducers inside the strategies that take one: whole runs, under layouts, stopped and gone on."""

import pytest
import torch

from loops import config, distance, run_all
from paceline.config import choose
from paceline.registry import REDUCERS, SYNCS
from tolerances import FP64_EQUAL

LAYOUTS = {"plain": {}, "shard": {"shard": 2}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}
RUNS = {
    "bf16": {"name": "local_sgd", "every": 2, "reducer": "bf16"},
    "fp16": {"name": "slowmo", "every": 2, "reducer": "fp16"},
    "int8": {"name": "diloco", "every": 2, "reducer": "int8"},
    "int4": {"name": "all_reduce", "reducer": "int4"},
    "sign": {"name": "all_reduce", "reducer": "sign"},
    "topk": {"name": "all_reduce", "reducer": {"name": "topk", "share": 0.05}},
    "randomk": {"name": "diloco", "every": 2, "reducer": {"name": "randomk", "share": 0.2}},
    "dct_topk": {"name": "all_reduce", "reducer": {"name": "dct_topk", "number": 8}},
    "powersgd": {"name": "all_reduce", "reducer": {"name": "powersgd", "rank": 2}},
}


def settings(sync, folder, *, layout="plain", replicas=2, steps=4):
    return config(
        sync,
        folder=str(folder),
        replicas=replicas,
        layout=LAYOUTS[layout],
        optimizer={"momentum": 0.5},
        train={"steps": steps, "clip_norm": 1.0},
    )


def test_every_reducer_is_tried():
    assert {"mean", *RUNS} == set(REDUCERS)


@pytest.fixture(scope="module")
def learned(pool, tmp_path_factory):
    """What comes of each under every layout."""
    kept = {}

    def run(layout):
        if layout not in kept:
            folder = tmp_path_factory.mktemp(layout)
            runs = [settings(sync, folder / name, layout=layout) for name, sync in RUNS.items()]
            kept[layout] = dict(zip(RUNS, run_all(pool, runs), strict=True))
        return kept[layout]

    return run


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "plain"])
def test_how_a_replica_is_cut_changes_nothing(layout, learned):
    """Neither what is learned nor what is left over to be sent."""
    plain, cut = learned("plain"), learned(layout)
    for name in RUNS:
        for one, other in zip(plain[name].states, cut[name].states, strict=True):
            assert distance(one, other) <= FP64_EQUAL, name
        for one, other in zip(plain[name].losses, cut[name].losses, strict=True):
            assert one == pytest.approx(other, rel=FP64_EQUAL), name


def test_a_run_stopped_goes_on_as_if_never_stopped(pool, tmp_path):
    """Every loss, byte and state of every replica, what is left over too."""
    names = ["int4", "topk", "randomk", "powersgd"]
    whole = run_all(pool, [settings(RUNS[name], tmp_path / name / "whole", steps=5) for name in names])
    cut = [settings(RUNS[name], tmp_path / name / "cut", steps=5) for name in names]
    first, then = run_all(pool, cut, until=3), run_all(pool, cut)
    for name, one, before, after in zip(names, whole, first, then, strict=True):
        for replica in range(2):
            assert one.losses[replica] == before.losses[replica] + after.losses[replica], name
            assert distance(one.states[replica], after.states[replica]) == 0.0, name
        assert all(a + b == c for a, b, c in zip(before.sent_bytes, after.sent_bytes, one.sent_bytes, strict=True))
        left = [slot for slot in one.states[0] if slot.endswith("/residual")]
        assert left and any(not torch.equal(one.states[0][slot], one.states[1][slot]) for slot in left)


@pytest.mark.parametrize("name", ["powersgd", "int4"])
def test_under_another_layout(name, pool, tmp_path):
    (whole,) = run_all(pool, [settings(RUNS[name], tmp_path / "whole")])
    run_all(pool, [settings(RUNS[name], tmp_path / "cut", layout="shard")], until=2)
    (after,) = run_all(pool, [settings(RUNS[name], tmp_path / "cut", layout="tensor")])
    for one, other in zip(whole.states, after.states, strict=True):
        assert distance(one, other) <= FP64_EQUAL


def test_with_another_number_of_replicas_all_that_is_left_over_stays(pool, tmp_path):
    (stopped,) = run_all(pool, [settings(RUNS["topk"], tmp_path)], until=2)
    (resumed,) = run_all(pool, [settings(RUNS["topk"], tmp_path, replicas=3)], until=0)
    for slot in stopped.states[0]:
        before, after = ([state[slot] for state in ran.states] for ran in (stopped, resumed))
        if slot.endswith("/residual"):  # held times the number of replicas
            assert torch.allclose(sum(before) / 2, sum(after) / 3, rtol=1e-12, atol=0)
        assert torch.allclose(sum(before) / 2, after[0], rtol=1e-12, atol=0)


ALL = {"name": "topk", "share": 1.0}


def test_with_all_of_the_values_every_strategy_is_what_it_is_with_the_mean(pool, tmp_path):
    """So each gives a reducer what it should: differences from what was agreed on last, or gradients."""
    syncs = {name: choose(SYNCS, name) for name in SYNCS}
    names = [name for name, sync in syncs.items() if "reducer" in type(sync).model_fields and not sync.in_rounds]
    short = {"start": 2, "every": 2, "fragments": 2, "delay": 0}

    def of(name, reducer):
        fields = SYNCS.load(name).model_fields
        own = {key: value for key, value in short.items() if key in fields}
        return settings({"name": name, "reducer": reducer, **own}, tmp_path / f"{name}-{reducer}", steps=5)

    mean = run_all(pool, [of(name, "mean") for name in names])
    lossy = run_all(pool, [of(name, ALL) for name in names])
    for name, one, other in zip(names, mean, lossy, strict=True):
        for replica in range(2):
            assert distance(one.weights[replica], other.weights[replica]) <= FP64_EQUAL, name
            assert one.losses[replica] == pytest.approx(other.losses[replica], rel=FP64_EQUAL), name


def test_levels_each_with_a_reducer(pool, tmp_path):
    """Groups of two: gradients in four bits inside, signs or differences between; stopped in between."""
    levels = {
        "gradients": [RUNS["int4"], RUNS["sign"]],
        "differences": [RUNS["topk"], {"name": "diloco", "every": 2, "reducer": "int4"}],
    }
    runs = [settings(sync, tmp_path / name / "whole", replicas=[2, 2], steps=5) for name, sync in levels.items()]
    cut = [settings(sync, tmp_path / name / "cut", replicas=[2, 2], steps=5) for name, sync in levels.items()]
    whole, _, then = run_all(pool, runs), run_all(pool, cut, until=3), run_all(pool, cut)
    for one, other in zip(whole, then, strict=True):
        assert all(distance(a, b) == 0.0 for a, b in zip(one.states, other.states, strict=True))
        assert all(distance(one.weights[0], weights) == 0.0 for weights in one.weights)
        keys = {slot.rpartition("/")[2] for slot in one.states[0] if slot.endswith("residual")}
        assert keys == {"inner.residual", "outer.residual"}


def test_1_bit_adam_under_another_layout_and_resumed(pool, tmp_path):
    """Stopped when its averages are already summed in place of gradients, and gone on by shards."""

    def run(folder, layout):
        return config(
            {"name": "all_reduce", "reducer": "sign", "exact_steps": 2},
            folder=str(tmp_path / folder),
            replicas=2,
            layout=LAYOUTS[layout],
            optimizer={"name": "onebit_adam", "lr": 0.01},
            train={"steps": 6},
        )

    (whole,) = run_all(pool, [run("whole", "plain")])
    run_all(pool, [run("cut", "plain")], until=4)
    (after,) = run_all(pool, [run("cut", "shard")])
    for one, other in zip(whole.states, after.states, strict=True):
        assert distance(one, other) < 1e-6  # steps are divided by the gradient's own size
    assert distance(whole.weights[0], whole.weights[1]) == 0.0
