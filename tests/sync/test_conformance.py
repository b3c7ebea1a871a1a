"""What holds for every sync, read from the table: a new one is tested without new test code."""

import pytest
import torch

from paceline.comm import link
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.errors import TrainError
from paceline.objectives.base import Batch
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.registry import SYNCS
from paceline.schedule.accumulate import Accumulate
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from parity import CPU, assert_equal_training, identical, on_pool, tiny_llama, train
from tolerances import FP64_EQUAL

EVERY = pytest.mark.parametrize("name", list(SYNCS))


@EVERY
def test_one_replica_is_plain_training(name):
    plain = tiny_llama()
    assert_equal_training(train(None, micro=7), train(None, micro=7, sync={"name": name}), FP64_EQUAL)
    strategy = choose(SYNCS, name).build(LocalLink())
    replica = ModuleReplica(Masters(plain, torch.float64), SGD(), mesh=Mesh.alone())
    strategy.start(replica)
    assert strategy.begin(1, replica, 5) == 5
    assert choose(SYNCS, name).wire_bytes({"w": (10, 10)}, 1) == 0


@EVERY
def test_replicas_agree_and_a_second_run_gives_the_same_bits(name, pool):
    first = pool.run(on_pool, 3, {"sync": {"name": name}})
    assert identical(first)
    second = pool.run(on_pool, 3, {"sync": {"name": name}})
    assert_equal_training(first[0], second[0], 0.0)


def start_unequal(member, name):
    replica = ModuleReplica(Masters(tiny_llama(seed=member.index), torch.float64), SGD(), mesh=Mesh.alone())
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    try:
        choose(SYNCS, name).build(between).start(replica)
    except TrainError as error:
        return str(error)


@EVERY
def test_replicas_that_start_differently_are_refused_everywhere(name, pool):
    messages = pool.run(start_unequal, 3, name)
    assert all("replica(s) 1, 2 start with other weights than replica 0" in message for message in messages)


@EVERY
def test_bytes_are_announced(name):
    options = choose(SYNCS, name)
    shapes = {"a": (1000, 100), "b": (7,)}
    assert options.wire_bytes(shapes, 2) > 0
    assert options.wire_bytes(shapes, 4) >= options.wire_bytes(shapes, 2)
    assert options.state_bytes(shapes) >= 0


class Branching(torch.nn.Module):
    """Only some micro-batches go through the branch, so it has no gradient from the others."""

    def __init__(self):
        super().__init__()
        self.branch = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.always = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, branches):
        return (self.always * self.branch if branches else self.always * 2).sum()


class ByPlace:
    """Every second sequence takes the branch."""

    def loss(self, model, batch):
        return model(batch.sequences[0] % 2)


def branching(member, name):
    """Three steps of one micro-batch a replica (or of both in one process): losses and weights."""
    index, size, store = (member.index, member.size, member.store) if member else (0, 1, None)
    between = link.connect(store, index=index, size=size, coordinate=0, backend="gloo", timeout_s=10.0, loopback=True)
    model = Branching()
    replica = ModuleReplica(Masters(model, torch.float64), SGD(lr=0.1), mesh=Mesh.alone())
    strategy = choose(SYNCS, {"name": name}).build(between)
    strategy.start(replica)
    schedule = Accumulate(model, ByPlace(), seed=0, device=CPU)
    losses, norms = [], []
    for step in (1, 2, 3):
        places = range(index, 2, size)
        batches = [Batch({}, torch.zeros(1, 1, dtype=torch.int64), count=1, sequences=(p,)) for p in places]
        result = train_step(replica, strategy, schedule, batches, step=step, stop=False)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    return {"losses": losses, "norms": norms, "weights": {s.name: s.local.clone() for s in replica.shards}}


@EVERY
def test_replicas_that_use_different_parameters_exchange_in_the_same_order(name, pool):
    both = pool.run(branching, 2, name, timeout_s=30.0)
    assert identical(both)
    if name == "all_reduce":
        assert_equal_training(branching(None, name), both[1], FP64_EQUAL)
