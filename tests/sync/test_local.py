"""The family of local SGD against its definitions, and what its members are in each other's terms."""

import pytest
import torch

from loops import config, distance, run_all
from oracle import Oracle, slow_momentum, torch_sgd
from paceline.comm import link
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.sync.alone import exchanges
from paceline.sync.base import SyncContext, SyncState
from paceline.sync.diloco import DiLoCo, OuterOptions, OuterSGD
from paceline.sync.local_sgd import LocalSGD
from paceline.sync.periodic import PeriodicSync
from paceline.train.replica import ModuleReplica
from paceline.verify.double import in_double
from parity import train
from tolerances import FP64_EQUAL

STEPS = 5
CASES = {
    "local_sgd": ({"name": "local_sgd", "every": 2}, {"every": 2}),
    "post_local_sgd": ({"name": "post_local_sgd", "start": 2, "every": 2}, {"every": 2, "first": 2}),
    "slowmo": (
        {"name": "slowmo", "every": 2, "lr": 0.8, "momentum": 0.6},
        {"every": 2, "outer": lambda: slow_momentum(0.8, 0.6)},
    ),
    "diloco": (
        {"name": "diloco", "every": 2, "outer": {"lr": 0.5, "momentum": 0.8}},
        {"every": 2, "outer": lambda: torch_sgd(0.5, 0.8, True)},
    ),
    "diloco without Nesterov": (
        {"name": "diloco", "every": 3, "outer": {"lr": 0.5, "momentum": 0.8, "nesterov": False}},
        {"every": 3, "outer": lambda: torch_sgd(0.5, 0.8, False)},
    ),
    "diloco without momentum": (
        {"name": "diloco", "every": 2, "outer": {"lr": 1.3, "momentum": 0}},
        {"every": 2, "outer": lambda: torch_sgd(1.3, 0.0, False)},
    ),
}


def all_in_double(member, options):
    """Replicas at different points differ by roundings; without this llama's fp32 parts would make much of them."""
    with in_double():
        return train(member, **options)


@pytest.mark.parametrize("case", CASES)
def test_replicas_learn_what_the_definition_says(case, pool):
    """Three replicas with unequal numbers of targets, momentum inside, and a last exchange out of turn."""
    sync, told = CASES[case]
    oracle = Oracle(3, momentum=0.5)
    with in_double():
        oracle.run(STEPS, **{key: value() if key == "outer" else value for key, value in told.items()})
    many = pool.run(all_in_double, 3, {"sync": sync, "steps": STEPS, "momentum": 0.5, "micro": 3})
    for own, part in zip(many, oracle.parts, strict=True):
        assert own["losses"] == pytest.approx(part.losses, rel=FP64_EQUAL)
        assert distance(part.weights, own["weights"]) <= FP64_EQUAL


LAYOUTS = {"plain": {}, "shard": {"shard": 2}, "tensor": {"tensor": 2}}
NEVER = 1_000_000
RUNS = {
    "all_reduce": "all_reduce",
    "local every step": {"name": "local_sgd", "every": 1},
    "diloco every step": {"name": "diloco", "every": 1, "outer": {"lr": 1, "momentum": 0}},
    "post_local never": {"name": "post_local_sgd", "start": NEVER},
    "local": {"name": "local_sgd", "every": 2},
    "post_local at once": {"name": "post_local_sgd", "start": 0, "every": 2},
    "slowmo plain": {"name": "slowmo", "every": 2, "momentum": 0},
    "diloco plain": {"name": "diloco", "every": 2, "outer": {"lr": 1, "momentum": 0}},
}
EQUAL = {
    "local every step": ("all_reduce", FP64_EQUAL),
    "diloco every step": ("all_reduce", FP64_EQUAL),
    "post_local never": ("all_reduce", 0.0),
    "post_local at once": ("local", 0.0),
    "slowmo plain": ("local", 0.0),
    "diloco plain": ("local", 0.0),
}
"""Without momentum inside and clipping, which act on other gradients; the others add in the same order."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_members_of_the_family_are_each_other_under_every_layout(layout, pool, tmp_path):
    runs = [
        config(sync, folder=str(tmp_path / name), replicas=2, layout=LAYOUTS[layout], train={"steps": 3})
        for name, sync in RUNS.items()
    ]
    ran = dict(zip(RUNS, run_all(pool, runs), strict=True))
    for name, (other, tolerance) in EQUAL.items():
        for own, same in zip(ran[name].weights, ran[other].weights, strict=True):
            assert distance(own, same) <= tolerance, name
    assert distance(ran["local"].weights[0], ran["all_reduce"].weights[0]) > 1e-3, "else this proves nothing"


def test_the_last_step_is_an_exchange_too():
    assert [exchanges(4, steps) for steps in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    sync = LocalSGD(every=4).build(SyncContext(link=LocalLink(), steps=6))
    assert [step for step in range(1, 7) if sync.is_agreed(step)] == [4, 6]


class Halves:
    """A reducer that sends half of what it is given, and so is right about differences only."""

    def __init__(self, between):
        self.between, self.given = between, []

    def start(self, shards):
        self.shapes = {shard.name: (tuple(shard.local.shape), shard.part) for shard in shards}

    def weighted_sum(self, values, share, step):
        self.given.append((step, {name: value.clone() for name, value in values.items()}))
        sums = {name: value * (share / 2) for name, value in values.items()}
        for value in sums.values():
            self.between.all_reduce(value).wait()
        return sums

    def settle(self, unused=()):
        assert unused == ()

    def state(self):
        return {"kept/rest": SyncState(torch.zeros(3), like=None)}


def lossy(member):
    """Two steps of one parameter, whose gradient is the replica's number plus one."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    model = torch.nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    replica = ModuleReplica(Masters(model, torch.float64), SGD(lr=0.1), mesh=Mesh.alone())
    reducer = Halves(between)
    outer = OuterSGD(OuterOptions(lr=1.0, momentum=0.5))
    sync = PeriodicSync(SyncContext(link=between, steps=4), every=2, reducer=reducer, is_exact=False, outer=outer)
    sync.start(replica)
    for step in (1, 2):
        sync.begin(step, replica, 3 + member.index)
        model.weight.grad = torch.full_like(model.weight, member.index + 1.0)
        sync.reduce(replica, torch.zeros(2, dtype=torch.float64))
        sync.update(replica)
    return model.weight.item(), reducer.given, reducer.shapes, sorted(sync.state())


def test_a_reducer_that_loses_something_is_given_differences_and_places(pool):
    told = pool.run(lossy, 2)
    moved = [2 * 0.1 * (index + 1) for index in range(2)]
    delta = (3 * moved[0] + 4 * moved[1]) / 7 / 2
    for index, (weight, given, shapes, state) in enumerate(told):
        assert weight == pytest.approx(1 - delta - 0.5 * delta, rel=FP64_EQUAL)
        ((step, values),) = given
        assert step == 2 and values["weight"].item() == pytest.approx(moved[index], rel=FP64_EQUAL)
        shape, place = shapes["weight"]
        assert shape == place.full_shape == (1, 1)
        assert state == ["kept/rest", "weight/agreed", "weight/outer_momentum", "window"]


def test_a_request_to_stop_waits_until_replicas_talk(pool):
    told = pool.run(asked_to_stop, 2)
    assert told == [[False, False, True], [False, False, True]]


def asked_to_stop(member):
    """Replica 1 is asked in step 1 and stays asked."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    replica = ModuleReplica(Masters(torch.nn.Linear(2, 2).double(), torch.float64), SGD(), mesh=Mesh.alone())
    for shard in replica.shards:
        torch.nn.init.ones_(shard.parameter)
    sync = DiLoCo(every=3).build(SyncContext(link=between, steps=9))
    sync.start(replica)
    stops = []
    for step in (1, 2, 3):
        sync.begin(step, replica, 1)
        _, stop = sync.reduce(replica, torch.zeros(2, dtype=torch.float64), member.index == 1)
        stops.append(sync.update(replica).stop or stop)
    return stops
