import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.comm import link
from paceline.comm.device import claim
from paceline.comm.mesh import Mesh
from paceline.comm.ranks import Coordinates
from paceline.comm.replica import Shard
from paceline.comm.world import enter
from paceline.config import Options
from paceline.errors import LinkError, WorkerError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.parallel.shard import ShardedStates
from paceline.plan.layout import Grid
from paceline.plan.wire import all_reduce_bytes
from paceline.schedule.accumulate import Accumulate
from paceline.sync.all_reduce import AllReduce
from paceline.sync.base import SyncContext
from paceline.sync.buckets import bucketed
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from parity import assert_equal_training, identical, on_pool, tiny_llama, train
from tolerances import FP64_EQUAL


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_replicas_learn_what_one_process_learns(pool, replicas, micro):
    one = train(None, micro=7)
    many = pool.run(on_pool, replicas, {"micro": min(micro, -(-7 // replicas))})
    assert identical(many)
    assert_equal_training(one, many[0], FP64_EQUAL)


def test_active_clipping_acts_on_the_whole_gradient(pool):
    one = train(None, micro=7, clip_norm=0.5)
    assert min(one["norms"]) > 0.5, "the threshold must be active for this to prove anything"
    assert_equal_training(one, pool.run(on_pool, 2, {"micro": 2, "clip_norm": 0.5})[1], FP64_EQUAL)


@pytest.mark.parametrize("bucket_mib", [1e-6, 0.001, 100.0])
def test_bucket_size_changes_nothing(pool, bucket_mib):
    expected = pool.run(on_pool, 2, {"sync": {"name": "all_reduce", "bucket_mib": 0.01}})
    assert_equal_training(
        expected[0], pool.run(on_pool, 2, {"sync": {"name": "all_reduce", "bucket_mib": bucket_mib}})[0], 0.0
    )


def test_frozen_parameters_are_neither_sent_nor_changed(pool):
    name = "model.layers.0.mlp.up_proj.weight"
    one = train(None, micro=7, freeze=name)
    both = pool.run(on_pool, 2, {"freeze": name})
    assert name not in one["weights"]
    assert_equal_training(one, both[0], FP64_EQUAL)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 1500))
def test_every_tensor_stands_in_exactly_one_bucket(numels, most):
    buckets = bucketed(numels, most)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(numels)))
    for bucket in buckets:
        assert len(bucket) == 1 or sum(numels[i] for i in bucket) <= most


def _link(member):
    return link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )


def without_gradient(member):
    """Weights of a parameter that decays, where only replica 1 or no replica has a gradient for it."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.always = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
            self.sometimes = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
            self.never = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    model = Two()
    replica = ModuleReplica(Masters(model, torch.float64), SGD(lr=1.0, weight_decay=0.5), mesh=Mesh.alone())
    sync = AllReduce().build(SyncContext(link=_link(member), steps=1))
    sync.start(replica)
    sync.begin(1, replica, 1)
    replica.expect(True)
    loss = model.always.sum()
    if member.index == 1:
        loss = loss + model.sometimes.sum()
    loss.backward()
    replica.end_backward()
    sync.reduce(replica)
    sync.update(replica)
    return {shard.name: shard.local.clone() for shard in replica.shards}


def test_a_parameter_without_gradient_anywhere_is_left_alone(pool):
    first, second = pool.run(without_gradient, 2)
    assert torch.equal(first["never"], torch.ones(2, 2, dtype=torch.float64))  # not even decayed
    assert torch.equal(first["sometimes"], torch.full((2, 2), 1 - (1 + 0.5), dtype=torch.float64))
    assert torch.equal(first["always"], torch.full((2, 2), 1 - (2 + 0.5), dtype=torch.float64))
    assert all(torch.equal(first[name], second[name]) for name in first)


def summed(member, reduction, pure):
    """The sum of a gradient of each replica, and the bytes this one sent for it."""
    model = torch.nn.Linear(64, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    states = Masters(model, torch.bfloat16 if pure else torch.float32, pure=pure)
    rounding_seed = 0 if pure else None
    replica = ModuleReplica(states, SGD(lr=1.0), mesh=Mesh.alone(), reduction=reduction, rounding_seed=rounding_seed)
    between = _link(member)
    sync = AllReduce().build(SyncContext(link=between, steps=1))
    sync.start(replica)
    sync.begin(1, replica, 1)
    replica.expect(True)
    before = between.sent_bytes
    factor = (256.0, 1.0, 1.0)[member.index] if pure else 1.0 + 2.0**-9
    (model.weight * factor).sum().backward()
    replica.end_backward()
    sent = between.sent_bytes - before
    sync.reduce(replica)
    sync.update(replica)
    return -replica.shards[0].local[0, 0].item(), sent


@pytest.mark.parametrize(
    ("reduction", "pure", "expected", "value_bytes"),
    [
        (None, False, 3 * (1 + 2.0**-9), 4),
        (torch.bfloat16, False, 3.0, 2),
        (None, True, 258.0, 4),  # in bf16 256 + 1 is 256
    ],
)
def test_gradients_are_summed_in_what_was_asked_for(pool, reduction, pure, expected, value_bytes):
    for total, sent in pool.run(summed, 3, reduction, pure):
        assert (total, sent) == (expected, all_reduce_bytes(value_bytes * 65, 3))
    shapes = {"weight": (1, 64)}
    assert AllReduce().wire_bytes(shapes, 3, 1, value_bytes) == sent + all_reduce_bytes(8, 3) + all_reduce_bytes(24, 3)
    assert AllReduce().state_bytes(shapes, value_bytes) == 65 * value_bytes


def sharded(member):
    """Replicas x shards: each replica a world of its own, links between counterparts (2 x 2 ranks)."""
    from parity import CPU, objective, share

    place = Coordinates.of(member.index, replicas=2, ranks=2, local_rank=member.index, local_ranks=4)
    with enter(place, claim(place), member.store, Grid(shard=2), timeout_s=30.0, loopback=True) as world:
        model, goal = tiny_llama(), objective()
        states = ShardedStates(model, world.mesh, torch.float64, zero=3)
        replica = ModuleReplica(states, SGD(lr=0.3), mesh=world.mesh)
        sync = AllReduce(bucket_mib=0.002).build(SyncContext(link=world.link, steps=3))
        sync.start(replica)
        schedule = Accumulate(model, goal, seed=0, device=CPU)
        for step in (1, 2, 3):
            rows = share(step, 8, world.data_rank, world.data_ranks, 2)
            batches = [goal.batch(micro_rows, seed=0, step=step) for micro_rows in rows]
            train_step(replica, sync, schedule, batches, step=step, stop=False)
        return {shard.name: shard.parameter.full_tensor().detach() for shard in replica.shards}


def test_works_on_the_local_part_of_sharded_parameters(pool):
    one = train(None, sequences=8, micro=8)["weights"]
    for weights in pool.run(sharded, 4):
        for name in one:
            error = torch.linalg.vector_norm(one[name] - weights[name]) / torch.linalg.vector_norm(one[name])
            assert error <= FP64_EQUAL, name


def dies(member):
    between = _link(member)
    tensor = torch.ones(3)
    between.all_reduce(tensor).wait()
    if member.index == 1:
        os._exit(7)
    try:
        between.all_reduce(tensor).wait()
    except LinkError as error:
        return str(error)


def test_a_lost_peer_is_a_link_error_and_the_pool_names_it(pool):
    with pytest.raises(WorkerError, match="rank 1 of the pool died with exit code 7"):
        pool.run(dies, 2)
    assert pool.run(on_pool, 2, {"steps": 1})  # the pool has replaced its workers


def test_config_is_frozen_and_refuses_what_it_does_not_know():
    assert issubclass(AllReduce, Options)
    with pytest.raises(ValueError, match="bucket_mib"):
        AllReduce(bucket_mib=0)
    with pytest.raises(ValueError, match="extra"):
        AllReduce(every=3)


def test_shard_reports_a_plain_parameter_as_its_own_local_part():
    parameter = torch.nn.Parameter(torch.ones(2))
    shard = Shard("w", parameter)
    assert shard.gradient is None
    shard.set_gradient(torch.tensor([1.0, 2.0]))
    assert torch.equal(parameter.grad, torch.tensor([1.0, 2.0]))
