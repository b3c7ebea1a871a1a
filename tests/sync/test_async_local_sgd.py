"""Asynchronous local SGD against its definition in fp64, against DiLoCo, and in runs that stop, die and go on."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from loops import config, distance, loop_of, run_all, world_of
from oracle import Oracle
from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.errors import ConfigError, PlanError, TrainError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.plan.run import plan_run
from paceline.registry import SYNCS
from paceline.schedule.accumulate import Accumulate
from paceline.sync.async_local_sgd import AsyncLocalSGD
from paceline.sync.base import SyncContext
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from paceline.verify.double import in_double
from paceline.verify.run import verify
from parity import CPU, assert_equal_training, objective, on_pool, share, shares_of, tiny_llama, train
from servers import children, processes
from tolerances import FP64_EQUAL

ORDERED = {"name": "async_local_sgd", "order": "replicas", "dynamic_steps": False}
"""Runs that give the same bits again."""
LAYOUTS = {"plain": {}, "shard": {"shard": 2}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


class DelayedNesterov:
    """The rule as a sum over whole windows: what went in at once is only where they are open."""

    def __init__(self, theta, *, lr, mu, delay):
        self.start, self.lr, self.mu, self.delay = dict(theta), lr, mu, delay
        self.momentum = {name: torch.zeros_like(value) for name, value in theta.items()}
        self.pushes, self.usual = [], None

    def push(self, delta, targets, usual):
        self.pushes.append((delta, targets))
        self.usual = self.usual or usual
        if len(self.pushes) < self.delay:
            at_once = {n: sum(t / self.usual / self.delay * d[n] for d, t in self.pushes) for n in self.start}
            return {n: self.start[n] - self.lr * at_once[n] for n in self.start}
        total = sum(t for _, t in self.pushes)
        mean = {n: sum(t / total * d[n] for d, t in self.pushes) for n in self.start}
        self.momentum = {n: self.mu * self.momentum[n] + mean[n] for n in self.start}
        self.start = {n: self.start[n] - self.lr * (mean[n] + self.mu * self.momentum[n]) for n in self.start}
        self.usual, self.pushes = None, []
        return dict(self.start)


def played(replicas, *, steps, every, lr, mu, delay):
    """Replicas in turns: each pushes what it has learned from the weights it read after its own last push."""
    oracle = Oracle(replicas, lr=0.3, momentum=0.5)
    theta = dict(oracle.parts[0].weights)
    rule = DelayedNesterov(theta, lr=lr, mu=mu, delay=delay)
    base = [theta] * replicas
    for first in range(1, steps + 1, every):
        for part in range(replicas):
            own = oracle.parts[part]
            own.weights, own.targets = dict(base[part]), 0
            for step in range(first, min(first + every, steps + 1)):
                gradient, loss, targets = oracle.gradient(part, step)
                oracle.move(part, {name: g / targets for name, g in gradient.items()}, lr=0.3)
                own.targets += targets
                own.losses.append(loss / targets)
            moved = {name: base[part][name] - own.weights[name] for name in theta}
            length = min(every, steps + 1 - first)
            theta = base[part] = rule.push(moved, own.targets, own.targets / length * every)
    return theta, [part.losses for part in oracle.parts]


def doubled(member, options):
    """Also what of a Llama is computed in fp32 otherwise: weights come about in another way here and there."""
    with in_double():
        return train(member if member.size > 1 else None, **options)


@pytest.mark.parametrize(
    ("replicas", "outer"),
    [
        (2, {"lr": 0.5, "momentum": 0.8}),
        (3, {"lr": 0.7, "momentum": 0.9, "delay": 2}),
        (2, {"lr": 0.6, "momentum": 0, "delay": 3}),
        (1, {"lr": 0.5, "momentum": 0.8, "delay": 2}),
    ],
)
def test_it_is_its_definition(replicas, outer, pool):
    """Windows end neither with rounds nor with the run, and replicas have unequal numbers of targets."""
    steps, every = 5, 2
    sync = {**ORDERED, "every": every, "outer": outer}
    options = {"sync": sync, "steps": steps, "momentum": 0.5}
    told = pool.run(doubled, replicas, options)
    delay = outer.get("delay", replicas)
    with in_double():
        theta, losses = played(replicas, steps=steps, every=every, lr=outer["lr"], mu=outer["momentum"], delay=delay)
    for replica, own in enumerate(told):
        assert own["losses"] == pytest.approx(losses[replica], rel=FP64_EQUAL)
        assert distance(own["weights"], theta) <= FP64_EQUAL


def test_one_replica_that_does_not_delay_is_diloco_in_every_bit():
    outer = {"lr": 0.6, "momentum": 0.8}
    one = train(None, steps=5, momentum=0.5, sync={**ORDERED, "every": 2, "outer": outer})
    other = train(None, steps=5, momentum=0.5, sync={"name": "diloco", "every": 2, "outer": outer})
    assert_equal_training(one, other, 0.0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_all_meet_after_each_push_it_is_diloco(layout, dynamic, pool, tmp_path):
    """A window then is one push of each replica, all from the same weights. With dynamic steps of as many."""
    outer = {"lr": 0.6, "momentum": 0.8}
    own = {"name": "async_local_sgd", "every": 2, "least": 2, "dynamic_steps": dynamic, "outer": outer}
    other = {
        "train": {"steps": 6, "clip_norm": 1.0},
        "schedule": {"name": "linear", "warmup_steps": 2},
        "checkpoint": {"every": 2},
        "optimizer": {"momentum": 0.5},
        "replicas": 2,
        "layout": LAYOUTS[layout],
    }
    runs = [
        config(own, folder=str(tmp_path / "async"), **other),
        config({"name": "diloco", "every": 2, "outer": outer}, folder=str(tmp_path / "diloco"), **other),
    ]
    asynchronous, diloco = run_all(pool, runs)
    assert distance(asynchronous.weights[0], asynchronous.weights[1]) == 0.0
    if not dynamic:  # else a replica learns from neighbouring shares
        assert distance(asynchronous.weights[0], diloco.weights[0]) <= FP64_EQUAL
        for one, same in zip(asynchronous.losses, diloco.losses, strict=True):
            assert one == pytest.approx(same, rel=FP64_EQUAL)


def test_the_first_order_of_pushes_with_plain_sgd_is_a_sum_of_gradients(pool):
    """Two replicas, one step a push, rate 1, no momentum: the window takes the mean of two gradients of old weights."""
    sync = {**ORDERED, "every": 1, "outer": {"lr": 1, "momentum": 0}}
    told = pool.run(doubled, 2, {"sync": sync, "steps": 1})
    (whole,) = pool.run(doubled, 1, {"steps": 1})
    assert distance(told[0]["weights"], whole["weights"]) <= FP64_EQUAL


# Runs.


def run(folder, *, replicas=2, steps=8, **other):
    sync = {**ORDERED, "every": 3, "outer": {"lr": 0.6, "momentum": 0.8, "delay": 3}, **other.pop("sync", {})}
    return config(
        sync,
        folder=str(folder),
        replicas=replicas,
        **{
            "optimizer": {"name": "adamw", "lr": 0.01},
            "schedule": {"name": "linear", "warmup_steps": 2},
            "train": {"steps": steps, "clip_norm": 1.0},
            "checkpoint": {"every": 4},
            **other,
        },
    )


@pytest.mark.parametrize("layout", ["plain", "shard", "tensor"])
def test_a_run_goes_on_in_every_bit_from_where_all_met(layout, pool, tmp_path):
    """The window of the outer rule is open there; its numbers, sums and momentum go on, and so does the histogram."""
    runs = {key: run(tmp_path / key, layout=LAYOUTS[layout]) for key in ("whole", "cut")}
    (whole,) = run_all(pool, [runs["whole"]])
    (first,), (then,) = run_all(pool, [runs["cut"]], until=4), run_all(pool, [runs["cut"]])
    for replica in range(2):
        assert whole.losses[replica] == first.losses[replica] + then.losses[replica]
        assert distance(whole.states[replica], then.states[replica]) == 0.0
    at_the_cut, end = first.states[0], whole.states[0]
    assert at_the_cut["sync/outer_window"][0] == 1.0, "the window is open"
    assert any(t.norm() > 0 for slot, t in at_the_cut.items() if slot.endswith("/buffer"))
    assert end["sync/staleness"].sum() == 8 and end["sync/local_steps"].tolist() == [8.0]


def test_another_number_of_replicas_goes_on(pool, tmp_path):
    (two,) = run_all(pool, [run(tmp_path)], until=4)
    (three,) = run_all(pool, [run(tmp_path, replicas=3)], until=8)
    (one,) = run_all(pool, [run(tmp_path, replicas=1, steps=10)])
    assert len(three.losses[0]) == 4 and len(one.losses[0]) == 2
    assert one.losses[0][-1] < two.losses[0][0]
    assert distance(three.weights[0], three.weights[2]) == 0.0


def claimed(member, given, slow):
    """A run in which some replica waits before each step: what each learned from, the events, and the words."""
    with world_of(member, given) as world, loop_of(given, world) as loop:
        sync, taken, events = loop.parts.sync, [], []
        claim = sync.claim

        def noted(done, replica):
            if member.index == slow:
                torch.randn(400, 400) @ torch.randn(400, 400)
            shares = claim(done, replica)
            taken.append(tuple(shares[0]))
            return shares

        sync.claim = noted
        for event in loop.steps():
            events.append(event)
        loop.finish_saving()
        return {
            "taken": taken,
            "steps": [event.step for event in events],
            "seen": (loop.step, loop.sequences_seen, loop.tokens_seen),
            "told": events[-1].tokens_seen,
            "rates": [event.lr for event in events],
            "tokens": sum(event.tokens for event in events),
            "words": sync.words(),
            "weights": {shard.name: shard.local.clone() for shard in loop.parts.built.replica.shards},
            "kept": sync.state()["local_steps"].tensor.item(),
        }


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_share_is_learned_from_once_whoever_is_quick(dynamic, pool, tmp_path):
    """Of a batch that grows, too; the rate is that of the share's step, and tokens are those of any other sync."""
    given = run(
        tmp_path,
        replicas=3,
        steps=20,
        sync={"order": "arrival", "dynamic_steps": dynamic, "least": 1},
        batch={"sequences": 7, "warmup": {"start": 3, "steps": 6, "by": 1}},
        checkpoint={"every": 8},
        evaluate={"every": 10},
    )
    told = pool.run(claimed, 3, given, 1)
    taken = Counter(share for own in told for share in own["taken"])
    assert taken == Counter((step, part) for step in range(1, 21) for part in range(3))
    (plain,) = pool.run(plain_run, 1, config("all_reduce", folder=str(tmp_path / "b"), **_batch(given)))
    rates, seen = plain
    for own in told:
        assert own["rates"] == [rates[step - 1] for step, _ in own["taken"]]
        assert own["seen"] == (20, *seen)
        assert 0 < own["told"] <= seen[1]  # the place of what it learned from last, which need not be the last of all
        assert max(own["steps"]) <= 20
        assert all(torch.equal(own["weights"][name], value) for name, value in told[0]["weights"].items())
    assert sum(own["tokens"] for own in told) == seen[1]
    assert [own["kept"] for own in told] == [len(own["taken"]) for own in told]
    steps = ", ".join(f"{i}: {len(own['taken'])}" for i, own in enumerate(told))
    assert all(own["words"].endswith(f"local steps by replica: {steps}") for own in told)
    assert "pushes by their staleness in versions: 0: " in told[0]["words"]


def _batch(given):
    tree = given.tree()
    return {key: tree[key] for key in ("batch", "schedule", "optimizer")} | {"train": {"steps": given.train.steps}}


def plain_run(member, given):
    with world_of(member, given) as world, loop_of(given, world) as loop:
        rates = [event.lr for event in loop.steps()]
        return rates, (loop.sequences_seen, loop.tokens_seen)


def stopped(member, given):
    """Replica 1 is asked after its second step."""
    with world_of(member, given) as world, loop_of(given, world) as loop:
        for count, _ in enumerate(loop.steps(), 1):
            loop.stop_request.asked = member.index == 1 and count >= 2
        loop.finish_saving()
        return loop.step, {shard.name: shard.local.clone() for shard in loop.parts.built.replica.shards}


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_request_to_stop_ends_the_run_after_a_whole_step(dynamic, pool, tmp_path):
    order = "arrival" if dynamic else "replicas"
    given = run(
        tmp_path,
        steps=60,
        checkpoint={"every": 0},
        sync={"every": 2, "order": order, "dynamic_steps": dynamic, "least": 1},
    )
    told = pool.run(stopped, 2, given)
    assert told[0][0] == told[1][0] < 60
    assert distance(told[0][1], told[1][1]) == 0.0
    (rest,) = run_all(pool, [given], until=60)
    assert sum(map(len, rest.losses)) == 2 * (60 - told[0][0])


def saved_between(member, given):
    with world_of(member, given) as world, loop_of(given, world) as loop:
        next(iter(loop.steps()))
        try:
            loop.save()
        except TrainError as error:
            return str(error)


def test_a_save_where_replicas_do_not_meet_is_refused(pool, tmp_path):
    for told in pool.run(saved_between, 2, run(tmp_path)):
        assert "save where all meet" in told


def with_servers(member, addresses, keeper, kills):
    """Servers in processes of their own; before some steps one of these is killed."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    model = tiny_llama()
    replica = ModuleReplica(Masters(model, torch.float64), SGD(lr=0.3), mesh=Mesh.alone())
    options = AsyncLocalSGD(every=2, order="replicas", dynamic_steps=False, timeout_s=60.0)
    sync = options.build(SyncContext(link=between, steps=6, servers=addresses))
    sync.start(replica)
    goal = objective()
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    losses = []
    for step, part in shares_of(sync, replica, 6, member.index):
        if member.index == 0 and step in kills:
            for pid in [children(keeper)[i] for i in kills[step]]:
                os.kill(pid, signal.SIGKILL)
        batches = [goal.batch(micro, seed=0, step=step) for micro in share(step, 7, part, member.size, 4)]
        losses.append(train_step(replica, sync, schedule, batches, step=step, stop=False).loss)
    return {"losses": losses, "weights": {shard.name: shard.local.clone() for shard in replica.shards}}


def test_a_run_whose_servers_are_killed_goes_on_with_the_same_result(pool, tmp_path):
    """kill -9: the one with the coordinator, another, then both."""
    results = []
    for kills in ({}, {2: [0], 3: [1], 4: [0, 1]}):
        with processes(2, Path(tmp_path) / str(len(kills))) as (keeper, addresses):
            results.append(pool.run(with_servers, 2, addresses, keeper, kills))
    for one, other in zip(*results, strict=True):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


# Words and refusals.


def test_what_is_sent_with_dynamic_steps_is_at_most_what_is_announced(pool):
    sync = {"name": "async_local_sgd", "every": 4, "least": 2}
    options = choose(SYNCS, sync)
    shapes = {name: p.shape for name, p in tiny_llama().named_parameters()}
    whole = 4 * sum(p.numel() for p in tiny_llama().parameters())
    sent = [told["sent_bytes"] for told in pool.run(on_pool, 2, {"sync": sync, "steps": 9, "dtype": torch.float32})]
    assert options.sends_less and all(0 < own <= options.wire_bytes(shapes, 2, 9) == 9 * whole for own in sent)
    assert options.delays(shapes, 2, 9) == 8 * 9 and options.delays(shapes, 1, 9) == 0


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"precision": "bf16_pure"}, "precision=bf16_pure is not built"),
        ({"average": {"name": "ema"}}, "average=ema is not built"),
        (
            {"optimizer": {"name": "schedule_free_adamw"}, "schedule": {"name": "constant"}},
            "optimizer=schedule_free_adamw is not built",
        ),
    ],
)
def test_what_goes_by_steps_of_all_is_refused(other, reason, tmp_path):
    with pytest.raises(PlanError, match=reason):
        plan_run(config({"name": "async_local_sgd"}, folder=str(tmp_path), replicas=2, **other))


def test_levels_verify_and_options_that_do_not_belong_are_refused(tmp_path):
    with pytest.raises(PlanError, match="one level of several"):
        plan_run(config(["all_reduce", "async_local_sgd"], replicas=[2, 2]))
    with pytest.raises(ConfigError, match="order=replicas is for runs that give the same bits"):
        config({"name": "async_local_sgd", "order": "replicas"})
    with pytest.raises(PlanError, match="each takes what is next"):
        verify(config("async_local_sgd", replicas=2))
