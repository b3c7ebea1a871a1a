"""What holds for every sync, read from the table: a new one is tested without new test code."""

import pytest
import torch

from paceline.comm import link
from paceline.comm.link import LocalLink
from paceline.config import choose
from paceline.errors import TrainError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.registry import SYNCS
from paceline.train.replica import ModuleReplica
from parity import assert_equal_training, identical, on_pool, tiny_llama, train
from tolerances import FP64_EQUAL

EVERY = pytest.mark.parametrize("name", list(SYNCS))


@EVERY
def test_one_replica_is_plain_training(name):
    plain = tiny_llama()
    assert_equal_training(train(None, micro=7), train(None, micro=7, sync={"name": name}), FP64_EQUAL)
    strategy = choose(SYNCS, name).build(LocalLink())
    replica = ModuleReplica(Masters(plain, torch.float64), SGD(), None)
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
    replica = ModuleReplica(Masters(tiny_llama(seed=member.index), torch.float64), SGD(), None)
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
