"""Gossip against its definition, and the pairs it makes."""

import pytest
import torch

from loops import config, distance, run_all
from oracle import Oracle
from paceline.checkpoint import load
from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.errors import ConfigError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.plan.wire import all_reduce_bytes
from paceline.registry import SYNCS
from paceline.sync.base import SyncContext
from paceline.sync.gossip import Gossip, partner_of
from paceline.train.replica import ModuleReplica
from paceline.verify.double import in_double
from parity import tiny_llama, train
from tolerances import FP64_EQUAL

STEPS = 7


def gossiped(replicas, *, every, lr, momentum, pull):
    """NoLoCo's rule, by replicas that take their parts one after the other."""
    oracle = Oracle(replicas, momentum=0.5)
    slow = [dict(part.weights) for part in oracle.parts]
    delta = [{name: torch.zeros_like(w) for name, w in part.weights.items()} for part in oracle.parts]
    turn = 0
    for step in range(1, STEPS + 1):
        oracle.local_step(step, 0.3)
        if step % every and step < STEPS:
            continue
        turn += 1
        learned = [part.targets for part in oracle.parts]
        moved = [{n: part.weights[n] - phi[n] for n in phi} for part, phi in zip(oracle.parts, slow, strict=True)]
        before = [dict(phi) for phi in slow]
        for i in range(replicas):
            pair = {i, partner_of(i, replicas, seed=0, turn=turn)}
            for n in slow[i]:
                mean_moved = sum(learned[j] * moved[j][n] for j in pair) / sum(learned[j] for j in pair)
                mean_slow = sum(before[j][n] for j in pair) / len(pair)
                delta[i][n] = momentum * delta[i][n] + lr * mean_moved - pull * (before[i][n] - mean_slow)
                slow[i][n] = before[i][n] + delta[i][n]
        if step == STEPS:
            slow = [{n: sum(phi[n] for phi in slow) / replicas for n in slow[0]}] * replicas
        for part, phi in zip(oracle.parts, slow, strict=True):
            part.weights, part.targets = dict(phi), 0
    return oracle


CASES = {
    "as in the authors' code": {"every": 2, "lr": 0.7, "momentum": 0.3, "pull": 0.7},
    "another pull": {"every": 3, "lr": 0.5, "momentum": 0.8, "pull": 1.4},
    "without momentum and pull": {"every": 2, "lr": 1.0, "momentum": 0.0, "pull": 0.0},
}


def in_fp64(member, options):
    with in_double():
        return train(member, **options)


@pytest.mark.parametrize(("case", "replicas"), [*((case, 3) for case in CASES), ("another pull", 4)])
def test_replicas_learn_what_the_definition_says(case, replicas, pool):
    """Of three replicas one is left over in each round."""
    with in_double():
        oracle = gossiped(replicas, **CASES[case])
    sync = {"name": "gossip", **CASES[case], "bucket_mib": 0.02}
    many = pool.run(in_fp64, replicas, {"sync": sync, "steps": STEPS, "momentum": 0.5, "micro": 3})
    for own, part in zip(many, oracle.parts, strict=True):
        assert own["losses"] == pytest.approx(part.losses, rel=FP64_EQUAL)
        assert distance(part.weights, own["weights"]) <= FP64_EQUAL


def test_the_pull_is_that_of_lr_where_none_is_given():
    assert Gossip(lr=0.6).pulls == 0.6 and Gossip(lr=0.6, pull=0).pulls == 0
    with pytest.raises(ConfigError, match=r"pull=2\.5 would drive a pair apart"):
        choose(SYNCS, {"name": "gossip", "pull": 2.5})


@pytest.mark.parametrize("replicas", [2, 5, 8])
def test_pairs_are_drawn_from_seed_and_round(replicas):
    met = {i: set() for i in range(replicas)}
    left_over = 0
    for turn in range(200):
        partners = [partner_of(i, replicas, seed=7, turn=turn) for i in range(replicas)]
        assert [partners[j] for j in partners] == list(range(replicas))
        alone = [i for i, j in enumerate(partners) if i == j]
        assert len(alone) == replicas % 2
        left_over += 0 in alone
        for i, j in enumerate(partners):
            met[i].add(j)
    assert all(others | {i} == set(range(replicas)) for i, others in met.items())
    assert replicas % 2 == 0 or abs(left_over / 200 - 1 / replicas) < 4 * (1 / replicas / 200) ** 0.5
    drawn = [[partner_of(i, 8, seed=seed, turn=3) for i in range(8)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


LAYOUTS = {"plain": {}, "tensor": {"tensor": 2}}
GOSSIP = {"name": "gossip", "every": 2, "lr": 0.6, "momentum": 0.7}
DILOCO = {"name": "diloco", "every": 2, "outer": {"lr": 0.6, "momentum": 0.7, "nesterov": False}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_replicas_are_diloco_without_nesterov(layout, pool, tmp_path):
    runs = [
        config(sync, folder=str(tmp_path / sync["name"]), replicas=2, layout=LAYOUTS[layout], train={"steps": 5})
        for sync in (GOSSIP, DILOCO)
    ]
    one, other = run_all(pool, runs)
    for own, same in zip(one.weights, other.weights, strict=True):
        assert distance(own, same) <= FP64_EQUAL


def settings(folder, *, replicas=3, precision="auto", **other):
    return config(
        GOSSIP | {"every": 3},
        folder=str(folder),
        replicas=replicas,
        precision=precision,
        optimizer={"name": "adamw", "lr": 0.01},
        train={"steps": STEPS},
        **other,
    )


@pytest.mark.parametrize("precision", ["auto", "bf16_pure"])
def test_each_replica_keeps_what_is_its_own_and_goes_on_bit_for_bit(precision, pool, tmp_path):
    (whole,) = run_all(pool, [settings(tmp_path / "whole", precision=precision)])
    run = settings(tmp_path / "cut", precision=precision)
    (before,), (after,) = run_all(pool, [run], until=4), run_all(pool, [run])
    for what in ("slow", "slow_momentum"):
        own = [{s: t for s, t in state.items() if s.endswith(f"/{what}")} for state in before.states]
        assert own[0] and max(distance(own[0], other) for other in own[1:]) > 1e-6
        with load(tmp_path / "cut" / "checkpoints", 4) as saved:
            assert {str(saved.entry(slot).kind) for slot in own[0]} == {"per_replica"}
    for replica in range(3):
        assert whole.losses[replica] == before.losses[replica] + after.losses[replica]
        assert distance(whole.states[replica], after.states[replica]) == 0.0
        assert distance(whole.weights[0], whole.weights[replica]) == 0.0


def test_with_another_number_of_replicas_all_go_on_from_the_mean(pool, tmp_path):
    (before,) = run_all(pool, [settings(tmp_path)], until=4)
    (two,) = run_all(pool, [settings(tmp_path, replicas=2)], until=0)
    for state in two.states:
        for slot, value in state.items():
            mean = sum(own[slot] for own in before.states) / 3
            expected = torch.zeros(1) if slot == "sync/window" else mean
            assert torch.allclose(value, expected.to(value), rtol=FP64_EQUAL, atol=1e-15), slot


def test_the_mean_of_the_slow_parameters_is_measured(pool, tmp_path):
    """It changes with a round only, and is what a run that ends there would end with."""
    losses = []
    for step in (3, 4):
        (ran,) = run_all(pool, [settings(tmp_path / "a", evaluate={"every": 1})], until=step)
        assert len(set(ran.evaluations)) == 1
        losses.append(ran.evaluations[0])
    assert losses[0] == losses[1]
    ended = settings(tmp_path / "b", evaluate={"every": 1}).tree()
    (short,) = run_all(pool, [type(settings("c")).parse({**ended, "train": {**ended["train"], "steps": 3}})])
    assert short.evaluations[0] == pytest.approx(losses[0], rel=FP64_EQUAL)


def test_one_is_left_over_and_sends_nothing_in_that_round(pool):
    """Bytes of each replica by the pairs it is in."""
    shapes = {name: p.shape for name, p in tiny_llama().named_parameters()}
    numel = sum(shape.numel() for shape in shapes.values())
    options = Gossip(every=2)
    sent = [
        told["sent_bytes"] for told in pool.run(in_fp64, 3, {"sync": {"name": "gossip", "every": 2}, "steps": STEPS})
    ]
    rounds, mean = 4, all_reduce_bytes(8 * numel, 3)
    for index, own in enumerate(sent):
        met = sum(partner_of(index, 3, seed=0, turn=turn) != index for turn in range(1, rounds + 1))
        assert own == met * (8 + 2 * 8 * numel) + (rounds - 1) * all_reduce_bytes(8, 3) + mean
    assert options.wire_bytes(shapes, 4, STEPS) == rounds * (8 + 8 * numel) + 3 * all_reduce_bytes(8, 4) + (
        all_reduce_bytes(4 * numel, 4)
    )


def asked_to_stop(member):
    """Replica 1 is asked in step 1 and stays asked; rounds are in steps 2, 4 and 6."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    replica = ModuleReplica(Masters(torch.nn.Linear(2, 2).double(), torch.float64), SGD(), mesh=Mesh.alone())
    for shard in replica.shards:
        torch.nn.init.ones_(shard.parameter)
    sync = Gossip(every=2).build(SyncContext(link=between, steps=99))
    sync.start(replica)
    stops = []
    for step in (1, 2, 3, 4):
        sync.begin(step, replica, 1)
        stops.append(sync.reduce(replica, torch.zeros(2, dtype=torch.float64), member.index == 1)[1])
        sync.state()
    return stops


def test_a_request_to_stop_takes_two_rounds(pool):
    assert pool.run(asked_to_stop, 3) == [[False, False, False, True]] * 3
