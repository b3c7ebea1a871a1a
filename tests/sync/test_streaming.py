"""Streaming DiLoCo against its definition, and what it is without what is new in it."""

import pytest
import torch

from loops import config, distance, run_all
from oracle import Oracle, torch_sgd
from paceline.checkpoint import load
from paceline.comm import link
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.errors import ConfigError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.plan.wire import all_reduce_bytes
from paceline.registry import REDUCERS, SYNCS
from paceline.sync.base import SyncContext
from paceline.sync.streaming_diloco import StreamingDiLoCo, dealt
from paceline.train.replica import ModuleReplica
from paceline.verify.double import in_double
from parity import tiny_llama, train
from tolerances import FP64_EQUAL

STEPS = 9
PLAIN = {"fragments": 1, "delay": 0, "mixing": 0}


def part_of(name, fragments):
    """Written out for a llama of two blocks."""
    for block in (0, 1):
        if f".layers.{block}." in name:
            return block % fragments
    return fragments - 1


def streamed(replicas, *, every, fragments, delay, mixing, outer, steps=STEPS):
    """The definition, by replicas that take their parts one after the other."""
    oracle = Oracle(replicas, momentum=0.5)
    agreed = dict(oracle.parts[0].weights)
    parts = [[name for name in agreed if part_of(name, fragments) == p] for p in range(fragments)]
    steps_of = [torch_sgd(*outer) if names else lambda *_: {} for names in parts]
    turn = [every * (p + 1) // fragments for p in range(fragments)]
    before = [[0] * replicas for _ in parts]
    flying = {}

    def mean(p):
        learned = [part.targets - seen for part, seen in zip(oracle.parts, before[p], strict=True)]
        before[p] = [part.targets for part in oracle.parts]
        shares = [n / sum(learned) for n in learned]
        return {
            name: sum(w * part.weights[name] for w, part in zip(shares, oracle.parts, strict=True)) for name in parts[p]
        }

    def arrive(p, sums, alpha):
        new = steps_of[p]({name: agreed[name] for name in parts[p]}, sums, 0.0)
        agreed.update(new)
        for part in oracle.parts:
            part.weights |= {name: alpha * part.weights[name] + (1 - alpha) * value for name, value in new.items()}

    for step in range(1, steps + 1):
        oracle.local_step(step, 0.3)
        for p, (sent, sums) in list(flying.items()):
            if step == sent + delay or step == steps:
                arrive(p, sums, mixing)
                del flying[p]
        if step == steps:
            for p, sums in [(p, mean(p)) for p in range(fragments)]:
                arrive(p, sums, 0.0)
            continue
        for p in range(fragments):
            if step >= turn[p] and (step - turn[p]) % every == 0:
                flying[p] = step, mean(p)
                if delay == 0:
                    arrive(p, flying.pop(p)[1], mixing)
    return oracle


CASES = {
    "two fragments": {"every": 4, "fragments": 2, "delay": 1, "mixing": 0.5, "outer": (0.5, 0.8, True)},
    "several on their way": {"every": 4, "fragments": 3, "delay": 3, "mixing": 0.25, "outer": (0.7, 0.6, False)},
    "without mixing": {"every": 3, "fragments": 2, "delay": 2, "mixing": 0.0, "outer": (1.2, 0.0, False)},
    "without delay": {"every": 3, "fragments": 2, "delay": 0, "mixing": 0.5, "outer": (0.5, 0.8, True)},
    "more fragments than blocks": {"every": 5, "fragments": 5, "delay": 1, "mixing": 0.5, "outer": (0.5, 0.8, True)},
}


def in_fp64(member, options):
    with in_double():
        return train(member, **options)


def written(case):
    lr, momentum, nesterov = case["outer"]
    outer = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
    return {"name": "streaming_diloco", **case, "outer": outer}


@pytest.mark.parametrize("case", CASES)
def test_replicas_learn_what_the_definition_says(case, pool):
    """Three replicas with unequal numbers of targets, momentum inside, and fragments on their way at the end."""
    with in_double():
        oracle = streamed(3, **CASES[case])
    many = pool.run(in_fp64, 3, {"sync": written(CASES[case]), "steps": STEPS, "momentum": 0.5, "micro": 3})
    for own, part in zip(many, oracle.parts, strict=True):
        assert own["losses"] == pytest.approx(part.losses, rel=FP64_EQUAL)
        assert distance(part.weights, own["weights"]) <= FP64_EQUAL


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
def test_one_fragment_without_delay_and_mixing_is_diloco_bit_for_bit(precision, pool, tmp_path):
    outer = {"lr": 0.6, "momentum": 0.7}
    syncs = {
        "diloco": {"name": "diloco", "every": 2, "outer": outer},
        "streaming": {"name": "streaming_diloco", "every": 2, "outer": outer, **PLAIN},
    }
    runs = [
        config(sync, folder=str(tmp_path / name), replicas=3, precision=precision, train={"steps": 5})
        for name, sync in syncs.items()
    ]
    one, other = run_all(pool, runs)
    assert one.losses == other.losses and one.sent_bytes == other.sent_bytes
    assert all(distance(own, same) == 0.0 for own, same in zip(one.weights, other.weights, strict=True))
    slots = [slot for slot in one.states[0] if slot.endswith(("agreed", "momentum"))]
    assert slots and all(torch.equal(one.states[0][slot], other.states[0][slot]) for slot in slots)


def test_a_fragment_is_every_so_many_blocks_and_the_last_one_what_is_in_none():
    names = [f"model.layers.{i}.mlp.weight" for i in range(7)]
    first, second, third = dealt(["model.embed_tokens.weight", *names, "lm_head.weight"], 3)
    assert [first, second] == [[names[0], names[3], names[6]], [names[1], names[4]]]
    assert third == ["model.embed_tokens.weight", names[2], names[5], "lm_head.weight"]
    assert dealt(["h.0.experts.5.w", "layers.w2.1x"], 4) == [["h.0.experts.5.w"], [], [], ["layers.w2.1x"]]


def test_fragments_take_turns():
    options = StreamingDiLoCo(every=10, fragments=3)
    sync = options.build(SyncContext(link=LocalLink(), steps=25))
    sent = {step: sync._turns(step) for step in range(1, 25) if sync._turns(step)}
    assert sent == {3: [0], 6: [1], 10: [2], 13: [0], 16: [1], 20: [2], 23: [0]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 5, "delay": 5}, "delay=5 is not below every=5"),
        ({"every": 3, "delay": 0}, "fragments=4 is above every=3"),
    ],
)
def test_what_does_not_fit_into_a_period_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        choose(SYNCS, {"name": "streaming_diloco", **options})


def ahead(member, delay):
    """Replica 0 takes all steps up to the arrival before replica 1 has sent anything."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(model.weight)
    replica = ModuleReplica(Masters(model, torch.float64), SGD(lr=0.1), mesh=Mesh.alone())
    outer = {"lr": 1.0, "momentum": 0.0}
    options = StreamingDiLoCo(every=delay + 1, fragments=1, delay=delay, mixing=0.0, outer=outer)
    sync = options.build(SyncContext(link=between, steps=100))
    sync.start(replica)
    seen = []
    for step in range(1, 2 * delay + 2):
        if member.index == 1 and step == delay + 1:
            member.store.wait(["ahead"])
        if member.index == 0 and step == 2 * delay + 1:
            member.store.set("ahead", b"yes")
        sync.begin(step, replica, 1)
        model.weight.grad = torch.full_like(model.weight, member.index + 1.0)
        sync.reduce(replica, torch.zeros(2, dtype=torch.float64))
        sync.update(replica)
        seen.append(model.weight.item())
    return seen


def test_nobody_waits_before_the_fragment_is_due(pool):
    """If sending waited for the other replica, replica 0 would never say that it is ahead."""
    delay = 3
    first, second = pool.run(ahead, 2, delay)
    sent = delay + 1
    mean = 1 - sum(0.1 * sent * (index + 1) for index in range(2)) / 2
    assert first[-1] == second[-1] == pytest.approx(mean, rel=FP64_EQUAL)
    assert first[-2] == pytest.approx(1 - 0.1 * (2 * delay), rel=FP64_EQUAL)


SYNC = {"name": "streaming_diloco", "every": 4, "fragments": 2, "delay": 3, "mixing": 0.5}
LAYOUTS = {"plain": {}, "shard": {"shard": 2}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


def settings(folder, *, replicas=2, layout="plain", precision="auto", sync=SYNC):
    return config(
        sync,
        folder=str(folder),
        replicas=replicas,
        layout=LAYOUTS[layout],
        precision=precision,
        optimizer={"name": "adamw", "lr": 0.01},
        train={"steps": STEPS},
    )


@pytest.mark.parametrize(("precision", "stops"), [("auto", (4, 5, 6)), ("bf16_pure", (4,))])
def test_a_run_stopped_while_fragments_are_on_their_way_goes_on_bit_for_bit(precision, stops, pool, tmp_path):
    """Fragments are sent in steps 2, 4, 6, 8 and arrive three later."""
    (whole,) = run_all(pool, [settings(tmp_path / "whole", precision=precision)])
    for until in stops:
        run = settings(tmp_path / str(until), precision=precision)
        (before,), (after,) = run_all(pool, [run], until=until), run_all(pool, [run])
        assert before.states[0]["sync/sent"].tolist() == {4: [2, 4], 5: [0, 4], 6: [6, 4]}[until]
        for replica in range(2):
            assert whole.losses[replica] == before.losses[replica] + after.losses[replica]
            assert distance(whole.states[replica], after.states[replica]) == 0.0
        assert all(a + b == c for a, b, c in zip(before.sent_bytes, after.sent_bytes, whole.sent_bytes, strict=True))


@pytest.mark.parametrize("reducer", list(REDUCERS))
def test_with_every_reducer_it_goes_on_bit_for_bit(reducer, pool, tmp_path):
    sync = {**SYNC, "delay": 1, "reducer": reducer}
    (whole,) = run_all(pool, [settings(tmp_path / "whole", precision="fp32", sync=sync)])
    run = settings(tmp_path / "cut", precision="fp32", sync=sync)
    (before,), (after,) = run_all(pool, [run], until=4), run_all(pool, [run])
    assert distance(whole.weights[0], whole.weights[1]) == 0.0
    for replica in range(2):
        assert whole.losses[replica] == before.losses[replica] + after.losses[replica]
        assert distance(whole.states[replica], after.states[replica]) == 0.0
    shapes = {name: tuple(weight.shape) for name, weight in whole.weights[0].items()}
    evaluation = all_reduce_bytes(16, 2)
    assert whole.sent_bytes == [choose(SYNCS, sync).wire_bytes(shapes, 2, STEPS) + evaluation] * 2


def test_what_a_reducer_leaves_out_counts_for_what_it_is_in_windows_of_any_length(pool, tmp_path):
    """The last one is shorter than the others: weights stay near those of exact sums, by what was learned."""
    runs = [
        settings(tmp_path / name, precision="fp32", sync={**SYNC, "delay": 1, "reducer": name}) for name in REDUCERS
    ]
    (start,) = run_all(pool, [settings(tmp_path / "start", precision="fp32")], until=0)
    ended = dict(zip(REDUCERS, run_all(pool, runs), strict=True))
    learned = distance(start.weights[0], ended["mean"].weights[0])
    off = {name: distance(run.weights[0], ended["mean"].weights[0]) / learned for name, run in ended.items()}
    assert max(off.values()) < 2, off
    assert max(off[name] for name in ("bf16", "fp16", "int8", "int4")) < 0.3, off


def test_under_another_layout_and_with_more_replicas_while_fragments_are_on_their_way(pool, tmp_path):
    (whole,) = run_all(pool, [settings(tmp_path / "whole")])
    run_all(pool, [settings(tmp_path / "cut", layout="shard")], until=5)
    (after,) = run_all(pool, [settings(tmp_path / "cut", layout="pipeline")])
    for replica in range(2):
        assert distance(whole.weights[replica], after.weights[replica]) < 1e-6
    (before,) = run_all(pool, [settings(tmp_path / "more")], until=5)
    (three,) = run_all(pool, [settings(tmp_path / "more", replicas=3)], until=0)
    for state in three.states:
        assert state["sync/windows"].tolist() == [0, 0] and state["sync/sent"].tolist() == [0, 4]
        for name in before.weights[0]:
            slot = f"sync/{name}/agreed"
            assert torch.equal(state[slot], before.states[0][slot])
            mean = (before.weights[0][name] + before.weights[1][name]) / 2
            assert torch.allclose(state[f"model/{name}"], mean, rtol=FP64_EQUAL, atol=0)
    (learned,) = run_all(pool, [settings(tmp_path / "more", replicas=3)])
    assert distance(learned.weights[0], learned.weights[2]) == 0.0


def test_measuring_while_fragments_are_on_their_way_changes_nothing(pool, tmp_path):
    quiet = settings(tmp_path / "a").tree()
    measured = {**settings(tmp_path / "b").tree(), "evaluate": {"every": 1}}
    (one,) = run_all(pool, [type(settings("c")).parse(quiet)])
    (other,) = run_all(pool, [type(settings("c")).parse(measured)])
    assert one.losses == other.losses and distance(one.states[1], other.states[1]) == 0.0


def test_the_best_weights_are_taken_back_while_fragments_are_on_their_way(pool, tmp_path):
    """A rate so high that the first measurement stays the best: the run ends early, with its weights and state."""
    run = settings(tmp_path / "a").tree()
    stops = {"evaluate": {"every": 2}, "early_stop": {"patience": 1}, "optimizer": {"name": "sgd", "lr": 30.0}}
    (ended,) = run_all(pool, [type(settings("c")).parse({**run, **stops})])
    assert len(ended.losses[0]) < STEPS
    with load(tmp_path / "a" / "checkpoints", 2) as saved:
        assert saved.tensor("sync/sent").tolist() == ended.states[1]["sync/sent"].tolist() == [2, 0]
        for name, own in ended.weights[1].items():
            assert torch.equal(saved.tensor(f"model/{name}")[1], own)
            assert torch.equal(saved.tensor(f"sync/{name}/agreed"), ended.states[1][f"sync/{name}/agreed"])


def asked_to_stop(member):
    """Replica 1 is asked in step 2, in which a fragment is sent that arrives two steps later."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    replica = ModuleReplica(Masters(tiny_llama(), torch.float64), SGD(), mesh=Mesh.alone())
    sync = StreamingDiLoCo(every=4, fragments=2, delay=2).build(SyncContext(link=between, steps=99))
    sync.start(replica)
    stops = []
    for step in (1, 2, 3, 4):
        sync.begin(step, replica, 1)
        for shard in replica.shards:
            shard.set_gradient(torch.zeros_like(shard.local))
        replica.end_backward()
        is_asked = member.index == 1 and step >= 2
        stops.append(sync.reduce(replica, torch.zeros(2, dtype=torch.float64), is_asked)[1])
        sync.update(replica)
        sync.state()  # a checkpoint does not lose it
    return stops


def test_a_request_to_stop_arrives_with_a_fragment(pool):
    assert pool.run(asked_to_stop, 2) == [[False, False, False, True]] * 2
