"""1-bit Adam, an optimizer with a sync: against algorithm 1 of arXiv 2102.02888, in fp64."""

import zlib

import numpy as np
import pytest
import torch

from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.config import Config, choose
from paceline.errors import PlanError
from paceline.optim.onebit_adam import OneBitAdam
from paceline.parallel.precision import Masters
from paceline.plan.run import plan_run
from paceline.registry import SYNCS
from paceline.sync.base import SyncContext
from paceline.train.replica import ModuleReplica
from parity import assert_equal_training, on_pool
from reducers import CODES, by_blocks
from tolerances import FP64_EQUAL

SHAPE, STEPS, EXACT = (12, 9), 7, 3
OPTIONS = OneBitAdam(lr=0.1, weight_decay=0.2)


def gradient(step, member):
    """With a column that never has one while sums are exact."""
    rng = np.random.default_rng([step, member])
    drawn = rng.normal(size=SHAPE)
    drawn[:, 0] *= step > EXACT
    return drawn


def on_member(member, reducer):
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    model = torch.nn.ParameterDict({"w": torch.ones(SHAPE, dtype=torch.float64)})
    replica = ModuleReplica(Masters(model, torch.float64), OPTIONS, mesh=Mesh.alone())
    sync = choose(SYNCS, {"name": "all_reduce", "reducer": reducer, "exact_steps": EXACT}).build(
        SyncContext(link=between, steps=STEPS)
    )
    sync.start(replica)
    for step in range(1, STEPS + 1):
        replica.begin(step)
        sync.begin(step, replica, member.index + 1)
        model["w"].grad = torch.as_tensor(gradient(step, member.index))
        sync.reduce(replica)
        sync.update(replica)
    return model["w"].detach().numpy()


def algorithm(code, members):
    """Of the paper, with the corrections and the decay of AdamW, a code for each block, and one owner of all.

    The mean is by targets, of which member i has i + 1. Of two members nothing is encoded again.
    """
    (b1, b2), w = OPTIONS.betas, np.ones(SHAPE)
    m, v, worker = np.zeros(SHAPE), np.zeros(SHAPE), [np.zeros(SHAPE)] * members
    share = np.arange(1, members + 1) / sum(range(members + 1))
    for step in range(1, STEPS + 1):
        g = [gradient(step, i) for i in range(members)]
        if step <= EXACT:
            mean = sum(part * own for part, own in zip(share, g, strict=True))
            m, v = b1 * m + (1 - b1) * mean, b2 * v + (1 - b2) * mean**2
        else:
            p = [part * (b1 * m + (1 - b1) * own) + left for part, own, left in zip(share, g, worker, strict=True)]
            sent = [by_blocks(own, code) for own in p]
            worker = [own - coded for own, coded in zip(p, sent, strict=True)]
            # One block, so one owner: what the second encoding leaves out is sent by it with its own the next time.
            owner = zlib.crc32(b"w") % members
            m = by_blocks(sum(sent), code) if members > 2 else sum(sent)
            worker[owner] = worker[owner] + sum(sent) - m
        root = np.sqrt(v / (1 - b2 ** min(step, EXACT))) + OPTIONS.eps
        w = w * (1 - OPTIONS.lr * OPTIONS.weight_decay) - OPTIONS.lr * np.where(v > 0, m, 0) / (1 - b1**step) / root
    return w


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("reducer", ["sign", "int4"])
def test_averages_are_summed_in_place_of_gradients(reducer, members, pool):
    expected = algorithm(CODES[reducer], members)
    for weights in pool.run(on_member, members, reducer):
        assert np.linalg.norm(weights - expected) <= FP64_EQUAL * np.linalg.norm(expected)


def test_without_loss_it_is_adam_whose_square_stays(pool):
    """With all of the values three replicas do what one does with the whole batch."""
    sync = {"name": "all_reduce", "reducer": {"name": "topk", "share": 1.0}, "exact_steps": 2}
    options = {"sync": sync, "steps": 4, "optimizer": OneBitAdam(lr=0.01)}
    (one,) = pool.run(on_pool, 1, {**options, "micro": 7})
    for own in pool.run(on_pool, 3, options):
        assert_equal_training(one, own, 1e-7)  # eps and roots make rounding of a gradient larger
    adam = pool.run(on_pool, 1, {**options, "micro": 7, "sync": None})[0]
    assert any(not torch.equal(adam["weights"][name], one["weights"][name]) for name in one["weights"])


def parsed(sync, **other):
    tree = {"model": {"preset": "llama-1m"}, "data": {"source": "x"}, "optimizer": "onebit_adam", "sync": sync}
    train = {"steps": 40, "output": "y", "clip_norm": None}
    return Config.parse({**tree, "train": train, "replicas": 2, **other})


SIGN = {"name": "all_reduce", "reducer": "sign", "exact_steps": 8}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ((SIGN,), None),
        (({"name": "all_reduce", "reducer": "sign"},), "exact_steps=0"),
        ((SIGN, {"precision": "bf16_pure"}), "bf16_pure"),
        ((SIGN, {"train": {"steps": 40, "output": "y", "clip_norm": 1.0}}), "clip_norm"),
    ],
)
def test_pairs_that_are_not_sound_are_refused(config, reason):
    sync, other = config[0], (config[1] if len(config) > 1 else {})
    if reason is None:
        plan_run(parsed(sync, **other))
        return
    with pytest.raises(PlanError, match=reason):
        plan_run(parsed(sync, **other))


def test_two_levels_are_refused():
    with pytest.raises(PlanError, match="one level"):
        plan_run(parsed([SIGN, "all_reduce"], replicas=[2, 2]))
