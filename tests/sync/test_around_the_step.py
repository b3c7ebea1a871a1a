"""Averages, schedules, perturbation and growing batches with replicas that differ."""

import pytest
import torch

from loops import config, distance, loop_of, run_all, world_of
from paceline.checkpoint import load
from paceline.config import Config, choose
from paceline.errors import PlanError
from paceline.plan.run import plan_run
from paceline.registry import SCHEDULES, SYNCS
from paceline.train.replica import holding
from tolerances import FP64_EQUAL

DILOCO = {"name": "diloco", "every": 3}
EMA = {"name": "ema", "decay": 0.6}
STEPS = 7


def averaging(folder, *, average=EMA, optimizer=None, replicas=2, sync=DILOCO, layout=None):
    run = config(
        sync,
        folder=str(folder),
        replicas=replicas,
        layout=layout or {},
        average=average,
        train={"steps": STEPS},
        evaluate={"every": 5},
    )
    return Config.parse({**run.tree(), **({"optimizer": optimizer} if optimizer else {})})


def measured_with(member, run, weights):
    """The held-out loss of a model with these weights."""
    with world_of(member, run) as world, loop_of(run, world) as loop:
        replica = loop.parts.built.replica
        with holding(replica, weights):
            return loop.parts.evaluator.measure(0, loop._total).loss


def given_away(member, run):
    """The last evaluation, and the leader's export, after the end."""
    with world_of(member, run) as world, loop_of(run, world) as loop:
        for _ in loop.steps():
            pass
        loop.finish_saving()
        if loop.coordinates.is_leader:
            return {name: loop.weights()[name].clone() for name in loop.weights()}


SCHEDULE_FREE = {"name": "schedule_free_adamw", "lr": 0.01}


@pytest.mark.parametrize(
    ("changes", "slot"),
    [
        ({}, "average/{}"),
        ({"layout": {"shard": 2}}, "average/{}"),
        ({"sync": ["all_reduce", DILOCO], "replicas": [2, 2]}, "average/{}"),
        ({"average": "none", "optimizer": SCHEDULE_FREE}, "model/{}"),
    ],
    ids=["ema", "shard", "levels", "schedule_free"],
)
def test_the_mean_of_the_replicas_averages_is_measured_and_exported(changes, slot, pool, tmp_path):
    """Each replica averages its own weights, also between exchanges and after the last one."""
    run = averaging(tmp_path, **changes)
    world = run.all_replicas * (2 if "layout" in changes else 1)
    (ran,) = run_all(pool, [run], until=5)
    names = list(ran.weights[0])
    own = [{name: state[slot.format(name)] for name in names} for state in ran.states]
    assert distance(own[0], own[-1]) > 1e-6
    mean = {name: torch.stack([state[name] for state in own]).mean(0) for name in names}
    (loss,) = pool.run(measured_with, 1, averaging(tmp_path / "alone", replicas=1, average="none"), mean)
    assert len(set(ran.evaluations)) == 1
    assert ran.evaluations[0] == pytest.approx(loss, rel=FP64_EQUAL)
    weights, *others = pool.run(given_away, world, run)
    assert others == [None] * (world - 1)
    with load(tmp_path / "checkpoints", STEPS) as saved:
        for name in names:
            every = saved.tensor(slot.format(name))
            assert every.shape[0] == 2 and torch.allclose(weights[name], every.mean(0), rtol=1e-12, atol=1e-15)


def test_an_average_between_exchanges_goes_on_bit_for_bit(pool, tmp_path):
    (whole,) = run_all(pool, [averaging(tmp_path / "whole")])
    run = averaging(tmp_path / "cut")
    run_all(pool, [run], until=5)
    (after,) = run_all(pool, [run])
    assert any(slot.startswith("average/") for slot in after.states[0])
    for replica in range(2):
        assert distance(whole.states[replica], after.states[replica]) == 0.0
    assert whole.evaluations == after.evaluations


def plateau(folder):
    return config(
        {"name": "local_sgd", "every": 3},
        folder=str(folder),
        replicas=2,
        schedule={"name": "plateau", "patience": 1, "threshold": 0.9},
        train={"steps": 8},
        evaluate={"every": 2},
    )


def test_a_rate_that_follows_the_held_out_loss_is_the_same_on_all_replicas(pool, tmp_path):
    """The loss is of weights that stand for all, over the rows of all; it is part of what goes on."""
    (whole,) = run_all(pool, [plateau(tmp_path / "whole")])
    assert whole.rates[0] == whole.rates[1] and len(set(whole.rates[0])) >= 2
    run = plateau(tmp_path / "cut")
    (before,), (after,) = run_all(pool, [run], until=4), run_all(pool, [run])
    assert before.rates[1] + after.rates[1] == whole.rates[1]
    assert distance(whole.states[1], after.states[1]) == 0.0


DIFFER = [name for name in SYNCS if not choose(SYNCS, name).keeps_equal]


@pytest.mark.parametrize("sync", DIFFER)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": name}, rf"schedule={name} follows how far a replica's weights move")
        for name in SCHEDULES
        if SCHEDULES.load(name).measures == "change"
    ]
    + [({"perturb": {"at": [2], "shrink": 0.4, "noise": 0.1}}, "perturb is not built for replicas that learn alone")],
)
def test_what_would_set_replicas_apart_is_refused(sync, changes, words):
    for syncs, replicas in [(sync, 2), (["all_reduce", sync], [2, 2])]:
        tree = config(syncs, replicas=replicas).tree()
        with pytest.raises(PlanError, match=rf"sync={sync}: {words}.* Use sync=all_reduce"):
            plan_run(Config.parse({**tree, **changes}))
    plan_run(Config.parse({**config("all_reduce", replicas=2).tree(), **changes}))


def test_a_growing_batch_is_dealt_out_as_to_replicas_that_share_gradients(pool, tmp_path):
    """With an exchange in every step and plain SGD local SGD is all-reduce, whatever the share of each replica."""
    batch = {"sequences": 7, "warmup": {"start": 2, "steps": 3, "by": 1}}
    runs = [
        config(sync, folder=str(tmp_path / name), replicas=2, batch=batch, train={"steps": 5})
        for name, sync in {"local": {"name": "local_sgd", "every": 1}, "whole": "all_reduce"}.items()
    ]
    local, whole = run_all(pool, runs)
    for one, other in zip(local.weights, whole.weights, strict=True):
        assert distance(one, other) <= FP64_EQUAL
    run = config(DILOCO, folder=str(tmp_path / "cut"), replicas=2, batch=batch, train={"steps": 5})
    (before,), (after,) = run_all(pool, [run], until=2), run_all(pool, [run])
    (never,) = run_all(pool, [config(DILOCO, folder=str(tmp_path / "b"), replicas=2, batch=batch, train={"steps": 5})])
    assert never.losses[1] == before.losses[1] + after.losses[1]
    assert distance(never.states[1], after.states[1]) == 0.0
