"""What holds for every sync, read from the table: a new one is tested without new test code."""

import pytest
import torch

from loops import config, distance, run_all
from paceline.comm import link
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.config import SyncOptions, choose
from paceline.errors import TrainError
from paceline.objectives.base import Batch
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.registry import SYNCS
from paceline.schedule.accumulate import Accumulate
from paceline.sync.base import SyncContext
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from parity import CPU, assert_equal_training, identical, on_pool, shares_of, tiny_llama, train
from tolerances import FP64_EQUAL

NAMES = [name for name in SYNCS if not choose(SYNCS, name).in_rounds]
"""Those of rounds, whose replicas have clients of their own in place of a share of the batch: test_federated.py."""
EVERY = pytest.mark.parametrize("name", NAMES)
PLAIN = {
    "slowmo": {"momentum": 0},
    "diloco": {"outer": {"lr": 1, "momentum": 0}},
    "streaming_diloco": {"outer": {"lr": 1, "momentum": 0}, "delay": 0, "mixing": 0},
    "gossip": {"lr": 1, "momentum": 0},
    "async_local_sgd": {"outer": {"lr": 1, "momentum": 0}},
}
"""Options with which one replica is plain training, where it is not with the defaults."""


def small(name, **options):
    """A strategy that shows all it does in three steps or four."""
    fields = SYNCS.load(name).model_fields
    wanted = {"start": 1, "every": 2, "fragments": 2, "order": "replicas", "dynamic_steps": False}
    return {"name": name, **{key: value for key, value in wanted.items() if key in fields}, **options}


@EVERY
def test_one_replica_is_plain_training_bit_for_bit(name):
    alone = train(None, micro=7, sync=small(name, **PLAIN.get(name, {})), momentum=0.5)
    assert_equal_training(train(None, micro=7, momentum=0.5), alone, 0.0)
    assert alone["sent_bytes"] == 0
    assert choose(SYNCS, name).wire_bytes({"w": (10, 10)}, 1, 100) == 0


@EVERY
def test_replicas_agree_and_a_second_run_gives_the_same_bits(name, pool):
    first = pool.run(on_pool, 3, {"sync": small(name)})
    assert identical(first)
    second = pool.run(on_pool, 3, {"sync": small(name)})
    for one, other in zip(first, second, strict=True):
        assert_equal_training(one, other, 0.0)


def start_unequal(member, name):
    replica = ModuleReplica(Masters(tiny_llama(seed=member.index), torch.float64), SGD(), mesh=Mesh.alone())
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    try:
        choose(SYNCS, name).build(SyncContext(link=between, steps=1)).start(replica)
    except TrainError as error:
        return str(error)


@EVERY
def test_replicas_that_start_differently_are_refused_everywhere(name, pool):
    messages = pool.run(start_unequal, 3, name)
    assert all("replica(s) 1, 2 start with other weights than replica 0" in message for message in messages)


@EVERY
@pytest.mark.parametrize("replicas", [2, 3])
def test_bytes_on_the_wire_are_those_announced(name, replicas, pool):
    shapes = {name: p.shape for name, p in tiny_llama().named_parameters()}
    options = choose(SYNCS, small(name))
    announced = options.wire_bytes(shapes, replicas, 3)
    sent = [told["sent_bytes"] for told in pool.run(on_pool, replicas, {"sync": small(name), "dtype": torch.float32})]
    if options.sends_less:
        assert all(0 < own <= announced for own in sent)
    elif name == "gossip" and replicas % 2:  # one is left over in each round
        assert sum(sent) // replicas == announced
    else:
        assert sent == [announced] * replicas


@EVERY
def test_state_on_a_rank_is_what_is_announced(name):
    """What is kept between steps; buffers to send from come on top."""
    model = tiny_llama().float()
    replica = ModuleReplica(Masters(model, torch.float32), SGD(), mesh=Mesh.alone())
    options = choose(SYNCS, name)
    sync = options.build(SyncContext(link=LocalLink(), steps=1))
    sync.start(replica)
    kept = sum(state.tensor.nbytes for state in sync.state().values())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    buffers = options.state_bytes(shapes) - kept
    whole = sum(p.nbytes for p in model.parameters())
    assert 0 <= buffers <= 4 * whole + 8 * len(shapes) + 8 * 16  # gossip sends two tensors, and gets two
    assert all(state.like in shapes or state.like is None for state in sync.state().values())


LAYOUTS = {"plain": {}, "shard": {"shard": 2}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


@pytest.fixture(scope="module")
def learned(pool, tmp_path_factory):
    """What every sync learns under every layout, with momentum and a rate that changes."""
    kept = {}

    def run(layout):
        if layout not in kept:
            folder = tmp_path_factory.mktemp(layout)
            runs = [
                config(
                    small(name),
                    folder=str(folder / name),
                    replicas=2,
                    layout=LAYOUTS[layout],
                    optimizer={"momentum": 0.5},
                    schedule={"name": "linear", "warmup_steps": 2},
                    train={"clip_norm": 1.0},
                )
                for name in NAMES
            ]
            kept[layout] = dict(zip(NAMES, run_all(pool, runs), strict=True))
        return kept[layout]

    return run


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "plain"])
def test_how_a_replica_is_cut_changes_nothing(layout, learned):
    plain, cut = learned("plain"), learned(layout)
    for name in NAMES:
        for one, other in zip(plain[name].weights, cut[name].weights, strict=True):
            assert distance(one, other) <= FP64_EQUAL, name
        for one, other in zip(plain[name].losses, cut[name].losses, strict=True):
            assert one == pytest.approx(other, rel=FP64_EQUAL), name


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
    strategy = choose(SYNCS, small(name)).build(SyncContext(link=between, steps=3))
    strategy.start(replica)
    schedule = Accumulate(model, ByPlace(), seed=0, device=CPU)
    losses, norms = [], []
    for step, part in shares_of(strategy, replica, 3, index):
        places = range(part, 2, size)
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


def test_what_is_told_of_a_sync_is_told_of_every_sync():
    """By its instances: asked of a class, a property is always true."""
    told = [name for name, value in vars(SyncOptions).items() if isinstance(value, property)]
    for name in SYNCS:
        options = choose(SYNCS, name)
        assert isinstance(options, SyncOptions) and {type(getattr(options, key)) for key in told} == {bool}, name
    assert {"all_reduce", "gossip", "parameter_server"} < set(NAMES)
