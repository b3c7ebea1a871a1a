"""How often a strategy waits in a run, by a clock that nothing but waiting moves: its closed formula says it."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from clocked import SMALL_BYTES, Clock, Clocked
from federation import federated
from loops import loop_of, world_of
from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.plan import wire
from paceline.plan.network import Network
from paceline.registry import REDUCERS, SYNCS
from paceline.schedule.accumulate import Accumulate
from paceline.sync.base import Load, SyncContext, exchange_s
from paceline.sync.hierarchy import build_sync
from paceline.sync.server.ask import Caller
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from parity import CPU, objective, share, tiny_llama

LONG = 1000.0
"""What a step computes: longer than any exchange waits."""
NAMES = [name for name in SYNCS if not (choose(SYNCS, name).in_rounds or choose(SYNCS, name).claims)]
"""Of those that learn from a part of each step."""
SHORT = {"start": 1, "every": 2, "fragments": 2}
RUNS = {
    **{name: {"name": name} for name in NAMES},
    **{f"all_reduce {name}": {"name": "all_reduce", "reducer": name, "exact_steps": 1} for name in REDUCERS},
    **{f"diloco {name}": {"name": "diloco", "reducer": name} for name in REDUCERS},
    **{f"streaming_diloco {name}": {"name": "streaming_diloco", "reducer": name} for name in ("mean", "int8", "topk")},
    "streaming_diloco without delay": {"name": "streaming_diloco", "delay": 0},
    "partial of everything": {"name": "partial", "threshold": 0},
    "parameter_server stale": {"name": "parameter_server", "mode": "stale"},
    "parameter_server async": {"name": "parameter_server", "mode": "async"},
}
RUNS["all_reduce mean"] = {"name": "all_reduce"}
STEPS = (4, 7)
SHAPES = {name: tuple(parameter.shape) for name, parameter in tiny_llama().named_parameters()}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Formulas take for small what the clock does."""
    monkeypatch.setattr(wire, "direct_bytes", lambda _: SMALL_BYTES)


def options_of(name):
    given = RUNS[name]
    fields = SYNCS.load(given["name"]).model_fields
    return choose(SYNCS, {**{key: value for key, value in SHORT.items() if key in fields}, **given})


def connected(member, clock, name="all", among=None):
    """The clocked link of a member to some of all."""
    among = list(range(member.size)) if among is None else among
    between = link.connect(
        member.store,
        index=among.index(member.index),
        size=len(among),
        coordinate=0,
        backend="gloo",
        timeout_s=30.0,
        loopback=True,
        name=name,
    )
    return Clocked(between, clock)


def waits(member, strategy, clock, steps, compute=LONG):
    """Of one member in a run that computes in every step. An answer of servers is a question, too."""
    model = tiny_llama()
    replica = ModuleReplica(Masters(model, torch.float64), SGD(lr=0.1), mesh=Mesh.alone())
    strategy.start(replica)
    goal = objective()
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    ask = Caller.ask

    def asked(*arguments, **options):
        answers = ask(*arguments, **options)
        clock.now += 2
        return answers

    begin = strategy.begin

    def begun(*arguments):
        """The passes come next."""
        count = begin(*arguments)
        clock.now += compute
        return count

    clock.now, strategy.begin = 0.0, begun
    with patch.object(Caller, "ask", asked):
        for step in range(1, steps + 1):
            rows = share(step, 2 * member.size, member.index, member.size, 2)
            batches = [goal.batch(micro, seed=0, step=step) for micro in rows]
            train_step(replica, strategy, schedule, batches, step=step, stop=False)
    return clock.now - compute * steps


def counted(member, names, steps, compute=LONG):
    """Waits of some strategies, one after the other on one link."""
    clock, found = Clock(), {}
    between = connected(member, clock)
    for name in names:
        strategy = options_of(name).build(SyncContext(link=between, steps=steps))
        found[name] = waits(member, strategy, clock, steps, compute)
    return found


def most(told):
    """Of the member that waits most, by name."""
    return {name: max(own[name] for own in told) for name in told[0]}


@pytest.mark.parametrize("members", [2, 3])
def test_a_strategy_waits_as_often_as_it_says(members, pool):
    """Of servers what comes with a run's beginning and end is left out: the difference between two runs."""
    served = [name for name in RUNS if name.startswith("parameter_server")]
    short, long = (most(pool.run(counted, members, list(RUNS), steps, timeout_s=120.0)) for steps in STEPS)
    said = {name: [options_of(name).delays(SHAPES, members, steps) for steps in STEPS] for name in RUNS}
    for name in RUNS:
        if name in served:
            assert long[name] - short[name] == said[name][1] - said[name][0] > 0, name
        elif options_of(name).sends_less and name != "partial of everything":
            assert 0 < short[name] <= said[name][0] and 0 < long[name] <= said[name][1], name
        else:
            assert [short[name], long[name]] == said[name], name
            assert 0 < said[name][0] <= said[name][1], name


@pytest.mark.parametrize("name", RUNS)
def test_one_replica_waits_for_nobody(name):
    assert options_of(name).delays(SHAPES, 1, 100) == 0 == options_of(name).delays(SHAPES, 2, 0)


def levels_counted(member, names):
    """Two levels of pairs."""
    clock = Clock()
    pair, place = divmod(member.index, 2)
    links = [
        connected(member, clock, f"inner {pair}", [2 * pair, 2 * pair + 1]),
        connected(member, clock, f"outer {place}", [place, place + 2]),
    ]
    strategy = build_sync([options_of(name) for name in names], links, steps=STEPS[0], seed=0)
    return waits(member, strategy, clock, STEPS[0])


@pytest.mark.parametrize("outer", ["diloco", "all_reduce"])
def test_levels_wait_one_after_the_other(outer, pool):
    both = [options_of(name).delays(SHAPES, 2, STEPS[0]) for name in ("all_reduce", outer)]
    assert set(pool.run(levels_counted, 4, ["all_reduce", outer])) == {sum(both)}


ROUNDS = {
    "plain": {},
    "robust": {"aggregate": {"name": "median"}, "weights": "uniform"},
    "secure": {"secure": {}, "weights": "uniform"},
    "scaffold": {"scaffold": True, "weights": "uniform"},
    "moments": {"moments": "keep", "optimizer": {"momentum": 0.5}},
}
AT_MOST = {"moments"}
"""What comes from one replica three times in a row comes together here."""


def rounds_counted(member, run):
    """Of the second round of a run."""
    clock, times = Clock(), []
    with world_of(member, run) as world:
        between = Clocked(world.link, clock)
        with loop_of(run, replace(world, link=between, links=(between,))) as loop:
            for _ in loop.steps():
                times.append(clock.now)
    return times[1] - times[0]


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_waits_as_often_as_it_says(name, pool, tmp_path):
    run = federated(folder=str(tmp_path), replicas=2, train={"steps": 3}, **ROUNDS[name])
    said, counted = run.sync.delays(SHAPES, 2, 1), max(pool.run(rounds_counted, 2, run))
    assert counted == said or (name in AT_MOST and 0 < counted < said)


def test_a_fragment_is_waited_for_when_it_takes_longer_than_the_steps_beside_it():
    """Of 8 values twice over: two fragments of 32 bytes, and two numbers beside each; at the end both, and three."""
    shapes = {"blocks.0.w": (8,), "blocks.1.w": (8,)}
    options = choose(SYNCS, {"name": "streaming_diloco", "every": 10, "fragments": 2, "delay": 3})
    network = Network(bits_per_s=8.0, delay_s=1.0)  # a byte a second
    once, end = 32 + 16 + 1, 64 + 24 + 2

    def waited(steps, compute_s, options=options, members=2):
        load = Load(shapes=shapes, members=members, steps=steps, value_bytes=4, compute_s=compute_s)
        return exchange_s(options, network, load)

    assert waited(5, 10.0) == pytest.approx(end)
    assert waited(6, 1.0) == pytest.approx(end + once - 1.0), "sent in step 5, the run ends in step 6"
    assert waited(20, 10.0) == pytest.approx(end + 3 * (once - 30.0))
    assert waited(20, 20.0) == pytest.approx(end), "49 seconds beside three steps of 20"
    assert waited(20, 0.0) == pytest.approx(end + 3 * once)
    coded = options.model_copy(update={"reducer": choose(REDUCERS, "int8")})
    assert waited(20, 1e6, coded, 3) == pytest.approx(waited(5, 1e6, coded, 3) + 3), (
        "sums are told when they are needed"
    )
