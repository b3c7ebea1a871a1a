"""Partial exchange against its definition, and what it is with a threshold of 0."""

import pytest
import torch

from loops import config, distance, loop_of, ranks, run_all, world_of
from oracle import Oracle
from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.plan.wire import all_reduce_bytes
from paceline.sync.base import SyncContext
from paceline.sync.partial import Partial
from paceline.train.replica import ModuleReplica
from paceline.verify.double import in_double
from parity import train
from tolerances import FP64_EQUAL

STEPS = 9


def partly(replicas, *, every, threshold, longest, steps=STEPS):
    """The definition, by replicas that take their parts one after the other; and what was sent at which step."""
    oracle = Oracle(replicas, momentum=0.5)
    sent = dict(oracle.parts[0].weights)
    since = {name: [0] * replicas for name in sent}
    pace, left = dict.fromkeys(sent, 1), dict.fromkeys(sent, 1)
    told = []
    for step in range(1, steps + 1):
        oracle.local_step(step, 0.3)
        is_last = step == steps
        if step % every and not is_last:
            continue
        now = [part.targets for part in oracle.parts]
        chosen = []
        for name in sent:
            left[name] -= 1
            if left[name] > 0 and not is_last:
                continue
            changes = [(part.weights[name] - sent[name]).norm() / sent[name].norm() for part in oracle.parts]
            if is_last or max(changes) >= threshold:
                learned = [n - before for n, before in zip(now, since[name], strict=True)]
                parts = zip(learned, oracle.parts, strict=True)
                sent[name] = sum(n * part.weights[name] for n, part in parts) / sum(learned)
                since[name] = now
                for part in oracle.parts:
                    part.weights[name] = sent[name]
                pace[name] = max(1, pace[name] // 2)
                chosen.append(name)
            else:
                pace[name] = min(longest, 2 * pace[name])
            left[name] = pace[name]
        told.append((step, chosen))
    return oracle, told


def in_fp64(member, options):
    with in_double():
        return train(member, **options)


CASES = {
    "some": {"every": 1, "threshold": 0.1, "longest": 4},
    "few": {"every": 2, "threshold": 0.3, "longest": 2},
    "none but the last": {"every": 3, "threshold": 1e6, "longest": 8},
}


@pytest.mark.parametrize("case", CASES)
def test_replicas_learn_what_the_definition_says(case, pool):
    """Three replicas with unequal numbers of targets and momentum inside."""
    with in_double():
        oracle, told = partly(3, **CASES[case])
    numbers = [len(chosen) for _, chosen in told]
    assert (max(numbers[:-1]) == 0) is (case == "none but the last")
    assert 0 < sum(numbers) < len(numbers) * numbers[-1], "else this proves little"
    sync = {"name": "partial", **CASES[case]}
    many = pool.run(in_fp64, 3, {"sync": sync, "steps": STEPS, "momentum": 0.5, "micro": 3})
    for own, part in zip(many, oracle.parts, strict=True):
        assert own["losses"] == pytest.approx(part.losses, rel=FP64_EQUAL)
        assert distance(part.weights, own["weights"]) <= FP64_EQUAL


def test_what_is_sent_is_what_was_voted_for(pool):
    """Bytes, by the definition's account of what was sent; less than announced, which is the most."""
    case = {"every": 1, "threshold": 0.1, "longest": 4}
    with in_double():
        oracle, told = partly(2, **case)
    shapes = {name: tuple(weight.shape) for name, weight in oracle.parts[0].weights.items()}
    numel = {name: weight.numel() for name, weight in oracle.parts[0].weights.items()}
    many = pool.run(in_fp64, 2, {"sync": {"name": "partial", **case}, "steps": STEPS, "momentum": 0.5, "micro": 3})
    tensors = sum(all_reduce_bytes(8 * sum(numel[name] for name in chosen), 2) for _, chosen in told)
    most = len(told) * all_reduce_bytes(16 * len(shapes) + 8, 2)
    for own in many:
        assert tensors < own["sent_bytes"] <= tensors + most
    announced = Partial(**case).wire_bytes(shapes, 2, STEPS)
    assert tensors / 2 + most < announced < 2 * tensors


@pytest.mark.parametrize("precision", ["auto", "bf16_pure"])
def test_with_a_threshold_of_0_it_is_local_sgd_bit_for_bit(precision, pool, tmp_path):
    """Also what is measured between exchanges; of three replicas, so that the order of sums shows."""
    syncs = [{"name": "local_sgd", "every": 3}, {"name": "partial", "every": 3, "threshold": 0}]
    runs = [
        config(
            sync,
            folder=str(tmp_path / sync["name"]),
            replicas=3,
            precision=precision,
            train={"steps": 5},
            evaluate={"every": 1},
        )
        for sync in syncs
    ]
    for until in (4, 5):
        one, other = run_all(pool, runs, until=until)
        assert one.losses == other.losses and one.evaluations == other.evaluations
        assert all(distance(own, same) == 0.0 for own, same in zip(one.weights, other.weights, strict=True))


SYNC = {"name": "partial", "every": 1, "threshold": 0.02, "longest": 4}
LAYOUTS = {
    "plain": {},
    "shard": {"shard": 2},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "shard and tensor": {"shard": 2, "tensor": 2},
}


def settings(folder, *, replicas=2, layout="plain", precision="auto", sync=SYNC):
    return config(
        sync,
        folder=str(folder),
        replicas=replicas,
        layout=LAYOUTS[layout],
        precision=precision,
        optimizer={"name": "adamw", "lr": 0.01},
        train={"steps": 8},
    )


def paces(ran):
    return {slot: state.tolist() for slot, state in ran.states[0].items() if slot.endswith("/pace")}


@pytest.mark.parametrize("layout", ["shard", "tensor", "pipeline"])
def test_all_ranks_and_replicas_decide_alike_under_every_layout(layout, pool, tmp_path):
    """By full tensors: paces and weights are those of one process a replica, in the middle and at the end."""
    (plain,) = run_all(pool, [settings(tmp_path / "plain")], until=6)
    (cut,) = run_all(pool, [settings(tmp_path / layout, layout=layout)], until=6)
    assert paces(plain) == paces(cut) and len({tuple(pace) for pace in paces(plain).values()}) > 2
    for replica in range(2):
        assert distance(plain.weights[replica], cut.weights[replica]) < 1e-6
    assert distance(cut.weights[0], cut.weights[1]) > 1e-4
    (ended,) = run_all(pool, [settings(tmp_path / layout, layout=layout)])
    assert distance(ended.weights[0], ended.weights[1]) == 0.0


@pytest.mark.parametrize(("layout", "precision"), [("plain", "auto"), ("plain", "bf16_pure"), ("pipeline", "auto")])
def test_it_goes_on_bit_for_bit(layout, precision, pool, tmp_path):
    (whole,) = run_all(pool, [settings(tmp_path / "whole", layout=layout, precision=precision)])
    run = settings(tmp_path / "cut", layout=layout, precision=precision)
    (before,), (after,) = run_all(pool, [run], until=5), run_all(pool, [run])
    for replica in range(2):
        assert whole.losses[replica] == before.losses[replica] + after.losses[replica]
        assert distance(whole.states[replica], after.states[replica]) == 0.0
    assert all(a + b == c for a, b, c in zip(before.sent_bytes, after.sent_bytes, whole.sent_bytes, strict=True))


def test_under_another_layout_and_with_more_replicas(pool, tmp_path):
    (whole,) = run_all(pool, [settings(tmp_path / "whole")])
    run_all(pool, [settings(tmp_path / "cut", layout="pipeline")], until=5)
    (after,) = run_all(pool, [settings(tmp_path / "cut", layout="tensor")])
    assert distance(whole.weights[1], after.weights[1]) < 1e-6
    (before,) = run_all(pool, [settings(tmp_path / "more")], until=5)
    (three,) = run_all(pool, [settings(tmp_path / "more", replicas=3)], until=0)
    for state in three.states:
        for slot, value in state.items():
            one, other = (own[slot] for own in before.states)
            expected = torch.zeros(1) if slot.endswith("/targets") else (one + other) / 2
            assert torch.allclose(value, expected.to(value), rtol=FP64_EQUAL, atol=1e-15), slot
    (learned,) = run_all(pool, [settings(tmp_path / "more", replicas=3)])
    assert distance(learned.weights[0], learned.weights[2]) == 0.0


def one_moves(member):
    """Two tensors, each moved by one replica alone, in turn: what is sent, and what each holds after each step."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    model = torch.nn.ParameterDict({name: torch.ones(4, dtype=torch.float64) for name in "ab"})
    replica = ModuleReplica(Masters(model, torch.float64), SGD(lr=0.1), mesh=Mesh.alone())
    sync = Partial(every=1, threshold=0.15, longest=1).build(SyncContext(link=between, steps=9))
    sync.start(replica)
    seen = []
    for step in (1, 2, 3):
        sync.begin(step, replica, 1)
        for name, mover in (("a", 0), ("b", 1)):
            moves = member.index == mover and (name == "a" or step == 3)
            model[name].grad = torch.full_like(model[name], float(moves))
        sync.reduce(replica, torch.zeros(2, dtype=torch.float64))
        sync.update(replica)
        seen.append([model["a"][0].item(), model["b"][0].item()])
    return seen


def test_one_vote_is_enough_and_what_is_not_sent_is_kept(pool):
    first, second = pool.run(one_moves, 2)
    assert first == [[pytest.approx(0.9), 1], [pytest.approx(0.9), 1], [pytest.approx(0.8), 1]]
    assert second == [[1, 1], [pytest.approx(0.9), 1], [pytest.approx(0.9), pytest.approx(0.9)]]


def norms(member, run):
    with world_of(member, run) as world, loop_of(run, world) as loop:
        replica = loop.parts.built.replica
        return {name: replica.norms({name: t})[name] for name, t in replica.local.items()} | dict(
            replica.norms(replica.local)
        )


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "shard and tensor"])
def test_norms_are_those_of_full_tensors(layout, pool, tmp_path):
    (alone,) = pool.run(norms, 1, settings(tmp_path / "a", replicas=1))
    run = settings(tmp_path / "b", replicas=1, layout=layout)
    told = pool.run(norms, ranks(run), run)
    for name, norm in alone.items():
        held = [own[name] for own in told if name in own]
        assert len(set(held)) == 1 and held[0] == pytest.approx(norm, rel=FP64_EQUAL)
