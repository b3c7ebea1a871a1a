"""16 bits and replicas that differ: who decides on an overflow, and how a mean is rounded."""

import pytest
import torch

from loops import config, distance, loop_of, ranks, run_all, world_of
from paceline.checkpoint import load
from paceline.comm import link
from paceline.comm.boxes import Part, block
from paceline.comm.mesh import Mesh
from paceline.comm.replica import Finish, Shard
from paceline.config import Config, LossScaleConfig
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.sync.base import SyncContext
from paceline.sync.diloco import DiLoCo
from paceline.sync.hierarchy import build_sync
from paceline.sync.local_sgd import LocalSGD
from paceline.train.loss_scale import LossScale
from paceline.train.replica import ModuleReplica
from paceline.train.state import tensors

LOCAL = {"name": "local_sgd", "every": 2}
OVERFLOW = {"step": 1, "replica": 1}


def scaled_steps(member, run, steps):
    """Steps on one weight of 1 whose gradient is 1, at rate 0.5; in one of them that of one replica is infinite.

    Replica i has i + 1 targets in every step. Returns who stepped, the scale, and the weight, after each.
    """
    with world_of(member, run) as world:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        scale = LossScale(LossScaleConfig(initial=8.0, growth_steps=2))
        replica = ModuleReplica(Masters(model, torch.float32), SGD(lr=0.5), mesh=Mesh.alone(), loss_scale=scale)
        sync = build_sync(run.syncs, world.links, steps=steps, seed=0)
        sync.start(replica)
        told = []
        for step in range(1, steps + 1):
            targets = member.index + 1
            group = sync.begin(step, replica, targets)
            overflows = (step, member.index) == (OVERFLOW["step"], OVERFLOW["replica"])
            own = torch.inf if overflows else targets / group * scale.value
            replica.shards[0].set_gradient(torch.full((1, 1), own))
            replica.end_backward()
            sync.reduce(replica, torch.zeros(2, dtype=torch.float64))
            finish = sync.update(replica)
            told.append((finish.stepped, scale.value, model.weight.item()))
        return told


def scaled_run(sync, replicas):
    return config(sync, replicas=replicas, precision="fp32")


def test_replicas_that_share_gradients_skip_together(pool):
    told = pool.run(scaled_steps, 3, scaled_run("all_reduce", 3), 3)
    assert told == [[(False, 4.0, 1.0), (True, 4.0, 0.5), (True, 8.0, 0.0)]] * 3


def test_replicas_that_learn_alone_skip_alone_and_count_for_what_they_learned_from(pool):
    """Replica 1 skips step 1, so that it moved half as far and has half its targets in the mean of step 2."""
    first, second, third = pool.run(scaled_steps, 3, scaled_run(LOCAL, 3), 2)
    mean = (2 * 1 * 0.0 + 1 * 2 * 0.5 + 2 * 3 * 0.0) / (2 + 2 + 6)
    assert [skipped for skipped, _, _ in second] == [False, True]
    assert [scale for _, scale, _ in first] == [8.0, 16.0] and [scale for _, scale, _ in second] == [4.0, 4.0]
    assert first[0][2] == third[0][2] == 0.5 and second[0][2] == 1.0
    assert first[1][2] == second[1][2] == third[1][2] == pytest.approx(mean, rel=1e-6)


STREAMING = {"name": "streaming_diloco", "every": 2, "fragments": 1, "mixing": 0, "outer": {"lr": 1, "momentum": 0}}


@pytest.mark.parametrize(
    ("sync", "steps"),
    [
        ({**STREAMING, "delay": 0}, 2),
        ({**STREAMING, "delay": 1}, 3),
        ({"name": "partial", "every": 2, "threshold": 0}, 2),
        ({"name": "partial", "every": 1, "threshold": 0.6, "longest": 1}, 2),
    ],
    ids=["at once", "on its way", "all", "changed enough"],
)
def test_so_it_is_where_parts_are_exchanged(sync, steps, pool):
    """As above; the last is due in step 2, for nobody has moved by more than half in step 1."""
    told = pool.run(scaled_steps, 3, scaled_run(sync, 3), steps + 1)
    mean = (2 * 1 * 0.0 + 1 * 2 * 0.5 + 2 * 3 * 0.0) / (2 + 2 + 6)
    assert [own[0][2] for own in told] == [0.5, 1.0, 0.5]
    assert [own[steps - 1][2] for own in told] == [pytest.approx(mean, rel=1e-6)] * 3


def test_so_it_is_in_a_pair(pool):
    """Two replicas, of which the second has twice the targets and skips one of two steps."""
    sync = {"name": "gossip", "every": 2, "lr": 1, "momentum": 0}
    told = pool.run(scaled_steps, 2, scaled_run(sync, 2), 3)
    assert [own[1][2] for own in told] == [pytest.approx((2 * 1 * 0.0 + 1 * 2 * 0.5) / 4, rel=1e-6)] * 2


def test_a_group_skips_together_and_other_groups_do_not(pool):
    run = scaled_run(["all_reduce", LOCAL], [2, 2])
    told = pool.run(scaled_steps, ranks(run), run, 1)
    assert [[taken for taken, _, _ in own] for own in told] == [[False], [False], [True], [True]]
    assert [own[0][1] for own in told] == [4.0, 4.0, 8.0, 8.0]


def test_two_levels_of_shared_gradients_skip_together(pool):
    run = scaled_run(["all_reduce", "all_reduce"], [2, 2])
    assert {own[0][:2] for own in pool.run(scaled_steps, ranks(run), run, 1)} == {(False, 4.0)}


def bad_at_the_end(member, run):
    """An exchange is due in the step in which the only replica goes bad: its weights stay to be looked at."""
    with world_of(member, run) as world:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        replica = ModuleReplica(Masters(model, torch.float32), SGD(lr=0.5), mesh=Mesh.alone())
        sync = build_sync(run.syncs, world.links, steps=2, seed=0)
        sync.start(replica)
        for step, gradient in ((1, 1.0), (2, torch.inf)):
            sync.begin(step, replica, 1)
            replica.shards[0].set_gradient(torch.full((1, 1), gradient))
            sync.reduce(replica)
            finish = sync.update(replica)
        return finish.stepped, finish.overflowed, model.weight.item()


def test_a_replica_that_goes_bad_keeps_its_weights(pool):
    run = scaled_run({"name": "diloco", "every": 2, "outer": {"lr": 0.5, "momentum": 0}}, 1)
    assert pool.run(bad_at_the_end, 1, run) == [(False, False, 0.5)]


def fp16(folder, *, replicas=2, precision="fp16", sync=LOCAL):
    scale = {"initial": 2.0**21, "growth_steps": 2} if precision == "fp16" else {}
    return config(
        sync,
        folder=str(folder),
        replicas=replicas,
        precision=precision,
        loss_scale=scale,
        train={"steps": 7},
        optimizer={"lr": 0.1},
    )


def test_every_replica_saves_its_scale_and_goes_on_bit_for_bit(pool, tmp_path):
    (whole,) = run_all(pool, [fp16(tmp_path / "whole")])
    (before,) = run_all(pool, [fp16(tmp_path / "cut")], until=5)
    with load(tmp_path / "cut" / "checkpoints", 5) as saved:
        assert saved.entry("loss_scale").kind == "per_replica"
        kept = saved.tensor("loss_scale")
    assert [state["loss_scale"].tolist() for state in before.states] == kept.tolist()
    assert (kept[:, 2] > 0).all(), "steps were skipped, else this proves little"
    (after,) = run_all(pool, [fp16(tmp_path / "cut")])
    for replica in range(2):
        assert whole.losses[replica] == before.losses[replica] + after.losses[replica]
        assert distance(whole.states[replica], after.states[replica]) == 0.0


def test_with_another_number_of_replicas_a_scale_is_dealt_out_and_with_another_precision_left(pool, tmp_path):
    (before,) = run_all(pool, [fp16(tmp_path)], until=5)
    (three,) = run_all(pool, [fp16(tmp_path, replicas=3)], until=0)
    for replica, state in enumerate(three.states):
        assert torch.equal(state["loss_scale"], before.states[replica % 2]["loss_scale"])
    (other,) = run_all(pool, [fp16(tmp_path, precision="fp32")], until=0)
    assert "loss_scale" not in other.states[0]
    (one,) = run_all(pool, [fp16(tmp_path, replicas=1)], until=0)
    assert torch.equal(one.states[0]["loss_scale"], before.states[0]["loss_scale"])


def lopsided(member, run, until):
    """A run whose replica 1 begins at a scale at which every step of it overflows."""
    with world_of(member, run) as world, loop_of(run, world) as loop:
        parts, losses = loop.parts, []
        if loop.step == 0 and member.index == 1:
            parts.built.replica.loss_scale.value = 2.0**60
        for event in loop.steps() if loop.step < until else ():
            losses.append(event.loss)
            if event.step == until:
                break
        if losses and until < run.train.steps:
            loop.save()
        loop.finish_saving()
        here = tensors(parts.built.model, parts.built.replica, parts.sync, parts.variant, average={})
        return losses, {slot: state.tensor.clone() for slot, state in here.items()}


def test_an_optimizer_that_has_not_begun_on_one_replica_is_saved_as_such(pool, tmp_path):
    """Replica 1 has taken no step yet. It goes on without a state; more replicas begin with that of replica 0."""

    def run(folder, replicas=2):
        tree = fp16(folder, replicas=replicas).tree()
        return Config.parse({**tree, "optimizer": "adamw", "loss_scale": {"initial": 4.0}})

    whole = pool.run(lopsided, 2, run(tmp_path / "whole"), 7)
    before = pool.run(lopsided, 2, run(tmp_path / "cut"), 3)
    begun = [[slot for slot in states if slot.startswith("optimizer/")] for _, states in before]
    assert begun[0] and not begun[1]
    three = pool.run(lopsided, 3, run(tmp_path / "cut", 3), 0)
    for _, states in three:
        assert all(torch.equal(states[slot], before[0][1][slot]) for slot in begun[0])
    after = pool.run(lopsided, 2, run(tmp_path / "cut"), 7)
    for replica in range(2):
        assert whole[replica][0] == before[replica][0] + after[replica][0]
        assert distance(whole[replica][1], after[replica][1]) == 0.0


def test_bf16_weights_agree_after_an_exchange_and_go_on_bit_for_bit(pool, tmp_path):
    runs = [fp16(tmp_path / kind, precision="bf16_pure", sync={"name": "diloco", "every": 2}) for kind in "ab"]
    (whole,) = run_all(pool, runs[:1])
    (before,), (after,) = run_all(pool, runs[1:], until=5), run_all(pool, runs[1:])
    assert distance(whole.weights[0], whole.weights[1]) == 0.0 < distance(before.weights[0], before.weights[1])
    for replica in range(2):
        assert whole.losses[replica] == before.losses[replica] + after.losses[replica]
        assert distance(whole.states[replica], after.states[replica]) == 0.0
    slots = whole.states[0]
    assert {t.dtype for slot, t in slots.items() if slot.endswith("/agreed")} == {torch.bfloat16}
    assert {t.dtype for slot, t in slots.items() if slot.endswith("/outer_momentum")} == {torch.float32}
    assert all(torch.equal(slots[f"model/{n}"], slots[f"sync/{n}/agreed"]) for n in whole.weights[0])


class Still:
    """A replica that holds some rows of one bf16 tensor, and learns nothing."""

    rate, reduction = 1.0, None

    def __init__(self, full, begin, end):
        part = Part(tuple(full.shape), (block((end - begin, full.shape[1]), (begin, 0)),))
        self.shards = [Shard("w", torch.nn.Parameter(full[begin:end].clone()), part)]

    def finish(self, vote):
        return Finish(stepped=vote(True), gradient_norm=0.0)

    def refresh(self):
        pass


SHAPE = (96, 64)


def exchanged(member, options):
    """One exchange of a tensor that is 1 on one replica, and the next bf16 number on the other, whole and in halves."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    full = torch.full(SHAPE, 1.0 + member.index * 2.0**-7, dtype=torch.bfloat16)
    after = []
    for begin, end in ((0, 96), (0, 40), (40, 96)):
        replica = Still(torch.ones(SHAPE, dtype=torch.bfloat16), begin, end)
        sync = options.build(SyncContext(link=between, steps=1, seed=3))
        sync.start(replica)
        sync.begin(1, replica, 1 + 2 * member.index)
        replica.shards[0].local.copy_(full[begin:end])
        sync.update(replica)
        after.append(replica.shards[0].local.clone())
    return after


@pytest.mark.parametrize("options", [LocalSGD(every=1), DiLoCo(every=1, outer={"lr": 1, "momentum": 0})])
def test_a_mean_of_bf16_weights_is_rounded_by_chance_alike_everywhere(options, pool):
    """Three quarters of the way from 1 to the next number: so many values go up, the same ones on every replica and
    however a replica is cut."""
    told = pool.run(exchanged, 2, options)
    whole, upper, lower = told[0]
    assert all(torch.equal(one, other) for one, other in zip(*told, strict=True))
    assert torch.equal(torch.cat([upper, lower]), whole)
    assert set(whole.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    up = (whole > 1).float().mean().item()
    assert abs(up - 0.75) < 4 * (0.75 * 0.25 / whole.numel()) ** 0.5
