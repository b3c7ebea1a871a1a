"""Levels: groups of replicas that are one replica to the level above."""

import pytest

from loops import config, distance, run_all
from paceline.comm.link import LocalLink
from paceline.config import Config
from paceline.errors import ConfigError, PlanError
from paceline.plan.layout import data_rank
from paceline.plan.wire import all_reduce_bytes
from paceline.sync.all_reduce import AllReduce
from paceline.sync.hierarchy import build_sync
from paceline.sync.local_sgd import LocalSGD
from tolerances import FP64_EQUAL

DILOCO = {"name": "diloco", "every": 2}
STREAMING = {"name": "streaming_diloco", "every": 3, "fragments": 2, "delay": 2}  # of step 3, on its way at the stop
GOSSIP = {"name": "gossip", "every": 2}
ALL = {"name": "topk", "share": 1.0}
PARTIAL = {"name": "partial", "every": 1, "threshold": 0.1}


@pytest.mark.parametrize("reducer", ["mean", ALL], ids=["mean", "all of the values"])
def test_two_levels_of_all_reduce_are_one(reducer, pool, tmp_path):
    runs = {
        replicas: config(
            ["all_reduce" if len(replicas) == 1 else {"name": "all_reduce", "reducer": reducer}] * len(replicas),
            folder=str(tmp_path / str(replicas)),
            replicas=list(replicas),
            train={"steps": 3, "clip_norm": 1.0},
            optimizer={"momentum": 0.5},
        )
        for replicas in [(4,), (2, 2), (2, 1, 2)]
    }
    flat, *others = [run_all(pool, [run])[0] for run in runs.values()]
    for levels in others:
        for replica in range(4):
            assert levels.losses[replica] == pytest.approx(flat.losses[replica], rel=FP64_EQUAL)
            states = {key: tensor for key, tensor in levels.states[replica].items() if not key.endswith("residual")}
            assert distance(flat.states[replica], states) <= FP64_EQUAL
            assert distance(levels.states[0], levels.states[replica]) == 0.0


@pytest.mark.parametrize("outer", [DILOCO, STREAMING, GOSSIP, PARTIAL], ids=lambda outer: outer["name"])
def test_a_group_of_replicas_learns_what_one_in_its_place_does(outer, pool, tmp_path):
    """Two groups of two, stopped between exchanges, as two replicas; one of a group saves for it."""
    told = {}
    for name, sync, replicas in [("two", outer, 2), ("groups", ["all_reduce", outer], [2, 2])]:
        run = config(sync, folder=str(tmp_path / name), replicas=replicas, optimizer={"momentum": 0.5})
        first, then = run_all(pool, [run], until=3)[0], run_all(pool, [run])[0]
        told[name] = first, then
    for two, groups in zip(told["two"], told["groups"], strict=True):
        assert groups.losses[0] == pytest.approx(two.losses[0], rel=FP64_EQUAL)
        assert distance(groups.weights[0], groups.weights[1]) == 0.0  # neighbours are a group
        for group in range(2):
            assert distance(two.weights[group], groups.weights[2 * group]) <= FP64_EQUAL
    before, _ = told["groups"]
    assert distance(before.weights[0], before.weights[2]) > 1e-4


def test_bytes_of_levels_are_the_sum_of_theirs(pool, tmp_path):
    run = config(["all_reduce", DILOCO], folder=str(tmp_path), replicas=[2, 2], train={"steps": 3})
    (ran,) = run_all(pool, [run])
    numel = sum(tensor.numel() for tensor in ran.weights[0].values())
    names = len(ran.weights[0])
    inner = all_reduce_bytes(8 * (numel + names), 2) + all_reduce_bytes(8, 2) + all_reduce_bytes(24, 2)
    outer = all_reduce_bytes(8 * numel, 2) + all_reduce_bytes(16, 2)
    evaluation = all_reduce_bytes(16, 4)
    assert ran.sent_bytes == [3 * inner + 2 * outer + evaluation] * 4


def test_what_levels_cannot_be_is_refused():
    with pytest.raises(PlanError, match="LocalSGD below another level is not built"):
        build_sync([LocalSGD(), AllReduce()], [LocalLink(), LocalLink()], steps=1, seed=0)
    tree = {"model": {"preset": "llama-5m"}, "data": {"source": "x"}, "train": {"steps": 1}}
    for sync, replicas in [(["all_reduce", "diloco"], 4), ("diloco", [2, 2]), (["diloco"], [2, 2])]:
        with pytest.raises(ConfigError, match=r"replicas has \d level\(s\) and sync \d"):
            Config.parse({**tree, "sync": sync, "replicas": replicas})
    with pytest.raises(ConfigError, match="did you mean 'diloco'"):
        Config.parse({**tree, "sync": ["all_reduce", "dilocco"], "replicas": [2, 2]})


def test_a_config_of_levels_reads_back():
    tree = {"model": {"preset": "llama-5m"}, "data": {"source": "x"}, "train": {"steps": 1}}
    written = Config.parse({**tree, "sync": ["all_reduce", {**DILOCO, "outer": {"momentum": 0}}], "replicas": [4, 2]})
    assert written.all_replicas == 8 and written.group_sizes == (4, 2)
    assert Config.parse(written.tree()) == written
    assert written.tree()["sync"][1]["reducer"] == {"name": "mean", "bucket_mib": 2.0}


def test_rows_of_a_group_are_those_of_one_replica_and_do_not_depend_on_shards():
    """Of 24 rows: replica r of two has the rows r modulo 2, however it is cut or made of smaller ones."""

    def rows(replica, sizes, shard, shards):
        ranks = shards
        for size in sizes:
            ranks *= size
        return set(range(data_rank(replica, sizes, shard), 24, ranks))

    halves = [set(range(0, 24, 2)), set(range(1, 24, 2))]
    for half in (0, 1):
        assert rows(half, (2,), 0, 1) == halves[half]
        assert rows(half, (2,), 0, 3) | rows(half, (2,), 1, 3) | rows(half, (2,), 2, 3) == halves[half]
        assert rows(2 * half, (2, 2), 0, 1) | rows(2 * half + 1, (2, 2), 0, 1) == halves[half]
