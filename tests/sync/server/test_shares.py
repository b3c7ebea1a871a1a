"""Shares that are given out, how many to whom, and the outer rule of what comes back: numbers and values only."""

import dataclasses
import json
import random

import pytest
import torch

from paceline.sync.server.codec import Boxed
from paceline.sync.server.delayed_nesterov import DelayedNesterov, OuterRule, PushStore, Window
from paceline.sync.server.place import Places
from paceline.sync.server.rules import LocalRules, Rules
from paceline.sync.server.shard import Gradient
from paceline.sync.server.shares import Pool, dynamic_steps
from tolerances import FP64_EQUAL


def shares(lease):
    return list(range(lease.first, lease.first + lease.stride * lease.length, lease.stride))


@pytest.mark.parametrize("blocks", [False, True])
def test_every_share_up_to_a_meeting_is_given_out_once(blocks):
    """With leases that come back, states that are saved and read, and an end that comes earlier."""
    for seed in range(300):
        draw = random.Random(seed)
        workers = draw.randint(1, 4)
        pool = Pool(workers, draw.randint(1, 5), blocks)
        learned, out = [], []
        for until in sorted(draw.sample(range(1, 30), 3)):
            if until <= pool.steps:
                continue
            pool.open(until)
            closed = False
            while pool.left or out:
                if pool.left and draw.random() < 0.6:
                    worker = draw.randrange(workers)
                    out.append(pool.take(worker, draw.randint(1, 6)))
                elif out:
                    lease = out.pop(draw.randrange(len(out)))
                    if draw.random() < 0.3:
                        pool.give_back(lease)
                    else:
                        learned += shares(lease)
                if draw.random() < 0.02 and not closed:
                    pool.close()
                    closed = True
                pool = Pool.of(pool.saved())
            assert sorted(learned) == list(range(pool.steps * workers))


def test_a_block_gives_each_worker_its_own_part_of_each_step():
    pool = Pool(3, 4, True)
    pool.open(6)
    assert [shares(pool.take(worker, 4)) for worker in (1, 0, 2)] == [[1, 4, 7, 10], [0, 3, 6, 9], [2, 5, 8, 11]]
    assert shares(pool.take(1, 4)) == [13, 16]
    assert shares(pool.take(1, 4)) == [12, 15], "its own part is taken"


def test_leases_are_as_long_as_workers_are_quick():
    speeds = {0: 5.0, 1: 2.5, 2: 1.24}
    given = [dynamic_steps(worker, speeds, 10_000, every=40, least=1) for worker in speeds]
    assert given == [40, 20, 9]
    assert dynamic_steps(2, speeds, 10_000, every=40, least=12) == 12
    assert dynamic_steps(0, {0: 3.0}, 7, every=40, least=5) == 7


def test_towards_a_meeting_leases_become_shorter_and_the_slow_do_not_hold_up_others():
    speeds = {0: 5.0, 1: 5.0, 2: 1.0}
    assert [dynamic_steps(worker, speeds, 22, every=40, least=1) for worker in speeds] == [10, 10, 2]
    assert dynamic_steps(2, speeds, 4, every=40, least=1) == 0, "a quick one has done all four before it has one"
    assert dynamic_steps(0, speeds, 1, every=40, least=1) == 1
    for left in range(1, 60):
        assert dynamic_steps(0, speeds, left, every=7, least=3) > 0, "the quickest always has something to do"


def test_of_equal_pushes_the_rule_is_the_papers():
    """theta - lr (g / N + mu m) in every N-th push, theta - lr g / N in the others."""
    lr, mu, delay = 0.6, 0.8, 3
    generator = torch.Generator().manual_seed(0)
    pushes = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(8)]
    theta, m, buffer = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), 0.0
    store, window = stored(DelayedNesterov(lr=lr, momentum=mu, delay=delay)), Window(delay)
    for number, g in enumerate(pushes, 1):
        buffer = buffer + g
        if number % delay == 0:
            m = mu * m + buffer / delay
            theta, buffer = theta - lr * (g / delay + mu * m), 0.0
        else:
            theta = theta - lr * g / delay
        push(store, window, g, targets=7.0)
        assert torch.allclose(store.flat, theta, rtol=FP64_EQUAL, atol=1e-14)


def test_a_short_push_goes_in_by_its_targets_and_the_window_ends_with_their_mean():
    """Two pushes, of six targets and of two, where four are usual."""
    store, window = stored(DelayedNesterov(lr=1.0, momentum=0.0, delay=2)), Window(2)
    one, other = torch.ones(5, dtype=torch.float64), torch.full((5,), 3.0, dtype=torch.float64)
    push(store, window, one, targets=6.0, usual=4.0)
    assert torch.allclose(store.flat, -1.5 / 2 * one)
    push(store, window, other, targets=2.0, usual=100.0)
    assert torch.allclose(store.flat, -(6 * one + 2 * other) / 8)


def test_without_delay_it_is_torchs_sgd_with_nesterov():
    rule = DelayedNesterov(lr=0.7, momentum=0.9, delay=1)
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    store, window = stored(rule), Window(1)
    for seed in range(4):
        g = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parameter.grad = g.clone()
        sgd.step()
        push(store, window, g, targets=3.0 + seed)
        assert torch.allclose(store.flat, parameter.detach(), rtol=FP64_EQUAL, atol=1e-14)


@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_a_replica_alone_follows_the_same_rule(mu):
    """Where nothing is old, a server and the rule as an interpolation are one."""
    rule = DelayedNesterov(lr=0.6, momentum=mu, delay=3)
    store, window, alone = stored(rule), Window(3), OuterRule(rule)
    theta = torch.zeros(5, dtype=torch.float64)
    alone.start({"w": theta})
    for seed, targets in enumerate([3.0, 5.0, 2.0, 4.0, 9.0, 1.0, 6.0]):
        moved = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        alone.take(targets, 4.0)
        theta = alone.step("w", theta, theta - moved, 1.0)
        push(store, window, moved, targets=targets, usual=4.0)
        assert torch.allclose(store.flat, theta, rtol=FP64_EQUAL, atol=1e-14)


def test_rules_go_through_json():
    rules = Rules(workers=2, shards=1, mode="local", local=LocalRules(every=3, dynamic=True, speeds=(1.0, 0.5)))
    again = Rules.of(json.loads(json.dumps(dataclasses.asdict(rules))))
    assert again.local is not None and list(again.local.speeds) == [1.0, 0.5] and again.local.every == 3


def stored(rule):
    """A store of one parameter of five values."""
    return PushStore(PLACES.pieces[0], {"w": 1}, rule, torch.float64)


PLACES = Places({"w": (5,)}, 1, value_bytes=8)
BOXES = PLACES.cuts({"w": None}, ["w"], 0).boxes


def push(store, window, delta, *, targets, usual=None):
    weight, closed = window.take(targets, usual or targets)
    store.gather([Gradient(weight, {0: Boxed(BOXES, delta)}, None, 0)], measured=False)
    store.push(closed)
