"""Federated runs against their definitions, over replicas and layouts, stopped and continued, and what is refused."""

import math

import pytest
import torch

from federation import CLIENTS, LR, Federation, federated, mean_of, plus, square, times, told_in_double
from loops import distance, run_all
from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.config import Config, choose
from paceline.errors import ConfigError, PlanError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.plan.run import plan_run
from paceline.recipes.lr_range import lr_range
from paceline.recipes.noise_scale import noise_scale
from paceline.registry import OPTIMIZERS
from paceline.schedule.accumulate import Accumulate
from paceline.sync.base import SyncContext
from paceline.sync.local_sgd import LocalSGD
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from paceline.verify.double import in_double
from paceline.verify.run import Trial
from paceline.verify.subject import Subject
from tolerances import FP64_EQUAL

BY = {"targets": lambda one: one[2], "data": lambda one: one[0].data_rows, "uniform": lambda one: 1.0}


def plain(weights="targets", lr=1.0):
    return lambda _, now, told: plus(now, mean_of(told, BY[weights]), lr)


def momentum(lr, kept, nesterov):
    v = {}

    def server(_, now, told):
        update = mean_of(told, BY["targets"])
        for name, value in update.items():
            v[name] = kept * v.get(name, 0.0) + value
        ahead = plus(update, v, kept) if nesterov else v
        return plus(now, ahead, lr)

    return server


def adaptive(rule, lr, tau, beta1, beta2):
    m, v = {}, {}

    def server(_, now, told):
        after = {}
        for name, d in mean_of(told, BY["targets"]).items():
            m[name] = beta1 * m.get(name, 0.0) + (1 - beta1) * d
            before = v.get(name, torch.full_like(d, tau**2))
            v[name] = {
                "fedadagrad": before + d**2,
                "fedadam": beta2 * before + (1 - beta2) * d**2,
                "fedyogi": before - (1 - beta2) * d**2 * torch.sign(before - d**2),
            }[rule]
            after[name] = now[name] + lr * m[name] / (torch.sqrt(v[name]) + tau)
        return after

    return server


def adaptive_case(rule):
    betas = {} if rule == "fedadagrad" else {"beta2": 0.8}
    return {"server": {"name": rule, "lr": 0.05, "tau": 0.01, "beta1": 0.7, **betas}}, {
        "server": lambda: adaptive(rule, 0.05, 0.01, 0.7, 0.8)
    }


def proximal(mu):
    return lambda visit, gradient, own, begun: plus(gradient, plus(own, begun, -1.0), mu)


def fair(q):
    def server(_, now, told):
        lipschitz = 1.0 / LR
        down, h = times(now, 0.0), 0.0
        for _, update, _, loss in told:
            back = times(update, -lipschitz)
            down = plus(down, back, loss**q)
            h += q * loss ** (q - 1) * square(back) + lipschitz * loss**q
        return plus(now, down, -1.0 / h)

    return server


def stale(_, now, told):
    """FedBuff: a stale update counts less, and the sum is divided as if none were."""
    total = sum(one[2] for one in told)
    for visit, update, learned, _ in told:
        now = plus(now, update, learned / total / math.sqrt(1 + visit.staleness))
    return now


class Scaffold:
    """Algorithm 1 of arXiv 1910.06378, option II."""

    def __init__(self, run):
        zero = times(Federation(run).start, 0.0)
        self.c, self.own = zero, [zero for _ in range(CLIENTS)]
        self.changes = []

    def local(self, visit, gradient, own, begun):
        return plus(plus(gradient, self.own[visit.client], -1.0), self.c)

    def leave(self, visit, update):
        new = plus(plus(self.own[visit.client], self.c, -1.0), update, -1.0 / (visit.steps * LR))
        self.changes.append((visit.client, new))

    def server(self, _, now, told):
        for client, new in self.changes:
            self.c = plus(self.c, plus(new, self.own[client], -1.0), 1 / CLIENTS)
        for client, new in self.changes:
            self.own[client] = new
        self.changes = []
        return plus(now, mean_of(told, BY["uniform"]))


HEAVY = {"optimizer": {"name": "sgd", "lr": LR, "momentum": 0.5}, "train": {"steps": 3}}
BUFFER = {"buffer": {"updates": 2, "max_staleness": 2}, "speed_spread": 1.0, "clients_per_round": 4}
CASES = {
    "fedavg": ({}, {"server": plain}),
    "fedavg by data, one epoch": ({"epochs": 1, "weights": "data"}, {"server": lambda: plain("data")}),
    "fedavg uniform, half way": (
        {"server": {"name": "fedavg", "lr": 0.5}, "weights": "uniform"},
        {"server": lambda: plain("uniform", 0.5)},
    ),
    "fedavgm": ({"server": {"name": "fedavgm", "lr": 0.8}}, {"server": lambda: momentum(0.8, 0.9, False)}),
    "fedavgm with Nesterov": (
        {"server": {"name": "fedavgm", "lr": 0.8, "momentum": 0.5, "nesterov": True}},
        {"server": lambda: momentum(0.8, 0.5, True)},
    ),
    **{rule: adaptive_case(rule) for rule in ("fedadagrad", "fedadam", "fedyogi")},
    "fedprox": ({"proximal": 0.7}, {"server": plain, "local": proximal(0.7)}),
    "q-fedavg": ({"q": 0.5, "weights": "uniform"}, {"server": lambda: fair(0.5)}),
    "momentum of clients, anew": (HEAVY, {"server": plain, "momentum": 0.5}),
    "momentum of clients, kept": (HEAVY | {"moments": "keep"}, {"server": plain, "momentum": 0.5, "keep": True}),
    "over-selection": ({"over_selection": 0.5, "speed_spread": 0.8, "deadline": 4.0}, {"server": plain}),
    "fedbuff": (BUFFER | {"train": {"steps": 3}}, {"server": lambda: stale}),
    "scaffold": ({"scaffold": True, "weights": "uniform", "train": {"steps": 3}}, "scaffold"),
}


def definition(case):
    options, told = CASES[case]
    run = federated(**options)
    if told == "scaffold":
        scaffold = Scaffold(run)
        return told_in_double(run, scaffold.server, local=scaffold.local, leave=scaffold.leave)
    rest = {key: value for key, value in told.items() if key != "server"}
    return told_in_double(run, told["server"](), **rest)


SHORT = ("fedyogi", "fedprox", "q-fedavg", "fedbuff", "scaffold", "momentum of clients, kept")
"""What most ways to share the work are tried with: the others do nothing that these do not."""
LAYOUTS = {
    "alone": (1, {}),
    "two replicas": (2, {}),
    "three replicas": (3, {}),
    "shard": (1, {"shard": 2}),
    "tensor, two replicas": (2, {"tensor": 2}),
    "pipeline": (1, {"pipeline": 2}),
}


@pytest.fixture(scope="module")
def defined():
    return {case: definition(case) for case in CASES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clients_and_server_learn_what_the_definition_says(layout, defined, pool, tmp_path):
    replicas, cut = LAYOUTS[layout]
    cases = SHORT if cut or replicas > 2 else CASES
    runs = [federated(folder=str(tmp_path / case), replicas=replicas, layout=cut, **CASES[case][0]) for case in cases]
    for case, ran in zip(cases, run_all(pool, runs), strict=True):
        losses, weights = defined[case]
        for own in ran.losses:
            assert own == pytest.approx(losses, rel=FP64_EQUAL), case
        for own in ran.weights:
            assert distance(weights, {name: own[name] for name in weights}) <= FP64_EQUAL, case


def test_the_cases_are_not_each_other(defined):
    ends = [weights for losses, weights in defined.values() if len(losses) == 2]
    for i, one in enumerate(ends):
        assert all(distance(one, other) > 1e-6 for other in ends[:i])


@pytest.mark.parametrize("case", ["fedadam", "fedbuff", "scaffold", "momentum of clients, kept"])
def test_a_run_goes_on_as_if_never_stopped_also_with_other_replicas(case, pool, tmp_path):
    options = CASES[case][0] | {"optimizer": {"name": "adamw", "lr": 0.01}, "train": {"steps": 4}}
    if case == "scaffold":
        del options["optimizer"]
    (whole,) = run_all(pool, [federated(folder=str(tmp_path / "whole"), replicas=2, **options)])
    (before,) = run_all(pool, [federated(folder=str(tmp_path / "cut"), replicas=2, **options)], until=2)
    (after,) = run_all(pool, [federated(folder=str(tmp_path / "cut"), replicas=2, **options)])
    assert whole.losses[0] == before.losses[0] + after.losses[0]
    assert distance(whole.states[0], after.states[0]) == distance(whole.states[1], after.states[1]) == 0.0
    run_all(pool, [federated(folder=str(tmp_path / "other"), replicas=2, **options)], until=2)
    (alone,) = run_all(pool, [federated(folder=str(tmp_path / "other"), replicas=1, **options)])
    assert distance(whole.weights[0], alone.weights[0]) <= 1e-9
    with pytest.raises(Exception, match="that is another run"):
        run_all(pool, [federated(folder=str(tmp_path / "cut"), **{**options, "local_steps": 3})])


def local_sgd(member, run):
    """The product's local SGD, each replica with the rows of one client."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    with in_double():
        federation = Federation(run)
        objective = Subject.of(run, full=True).material(torch.float64).objective
        replica = ModuleReplica(Masters(federation.model, torch.float64), SGD(lr=LR), mesh=Mesh.alone())
        sync = LocalSGD(every=2).build(SyncContext(link=between, steps=4))
        sync.start(replica)
        schedule = Accumulate(federation.model, objective, seed=0, device=torch.device("cpu"))
        step = 0
        for number in (1, 2):
            ((_, steps),) = [pair for pair in federation.loader.visits(number) if pair[0].client == member.index]
            for local_step, rows in enumerate(steps, 1):
                step += 1
                batches = [objective.batch(micro, seed=0, step=local_step) for micro in rows]
                train_step(replica, sync, schedule, batches, step=step, stop=False)
    return {shard.name: shard.local.clone() for shard in replica.shards}


def test_all_clients_are_local_sgd(pool, tmp_path):
    """Clients for replicas, one window of local steps for a round: the same rows, the same weights."""
    run = federated(folder=str(tmp_path), count=2, clients_per_round=2, train={"steps": 2})
    (ran,) = run_all(pool, [run])
    for weights in pool.run(local_sgd, 2, run):
        assert distance(weights, {name: ran.weights[0][name] for name in weights}) <= FP64_EQUAL


def test_q_of_zero_is_fedavg_and_bytes_are_those_announced(pool, tmp_path):
    tiny = {"q": 1e-14, "weights": "uniform"}
    runs = [
        federated(folder=str(tmp_path / str(i)), replicas=2, **o) for i, o in enumerate((tiny, {"weights": "uniform"}))
    ]
    one, other = run_all(pool, runs)
    assert distance(one.weights[0], other.weights[0]) <= FP64_EQUAL
    shapes = {name: tuple(tensor.shape) for name, tensor in Federation(runs[0]).start.items()}
    # fp64 where the plan says fp32: parameters take twice as many bytes
    numbers = 2 * 4 * 8
    assert other.sent_bytes[0] >= numbers
    sent = runs[1].sync.wire_bytes(shapes, 2, 2) - numbers
    evaluation = other.sent_bytes[0] - numbers - 2 * sent
    assert 0 <= evaluation <= 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 1, "local_steps": 2}, "both say how long"),
        ({"scaffold": True}, "needs weights=uniform, not targets"),
        ({"q": 0.1}, "needs weights=uniform, not targets"),
        ({"scaffold": True, "q": 1.0, "weights": "uniform"}, "not built"),
        ({"buffer": {"updates": 2}}, "set speed_spread"),
        ({"buffer": {"updates": 2}, "speed_spread": 1, "deadline": 3}, "waits for no cohort"),
        ({"deadline": 3}, "set speed_spread"),
        ({"moments": "keep", **BUFFER}, "may come twice"),
        ({"server": "fedsgd"}, "sync.server='fedsgd'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        federated(**options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"source": "x"}}, "needs data.clients"),
        ({"sync": "all_reduce"}, "data.clients is for sync=federated"),
        (
            {"sync": ["all_reduce", {"name": "federated", "clients_per_round": 1, "epochs": 1}], "replicas": [1, 1]},
            "levels",
        ),
        ({"precision": "fp16"}, "precision=fp16"),
        ({"optimizer": "lbfgs"}, "optimizer=lbfgs"),
        ({"optimizer": "schedule_free_adamw", "schedule": "constant"}, "optimizer=schedule_free_adamw"),
        ({"schedule": {"name": "cosine", "unit": "tokens"}}, "schedule.unit=tokens"),
        ({"schedule": "dynamic"}, "schedule=dynamic"),
        ({"spikes": {}, "checkpoint": {"every": 2}}, "spikes"),
        ({"batch": {"sequences": 4, "warmup": {"start": 2, "steps": 2}}}, "batch.warmup"),
        ({"regularisation": {"momentum": 0.1}}, "regularisation.momentum"),
        ({"data": {"source": "x", "split": "file", "clients": {}}}, "data.split=file"),
        ({"optimizer": "sophia", "sync": {"name": "federated", "proximal": 0.1}}, "sync.proximal: optimizer=sophia"),
        ({"sync": [{"name": "federated", "proximal": 0.1}], "replicas": [1], "precision": "bf16_pure"}, "bf16_pure"),
    ],
)
def test_what_rounds_do_not_go_with_is_refused(change, words):
    tree = federated().tree() | change
    with pytest.raises(PlanError, match=words):
        plan_run(Config.parse(tree))


ALONE = [
    name
    for name in OPTIMIZERS
    if not (made := choose(OPTIMIZERS, name)).averages and not made.remakes and made.sees != "loss"
]


def test_clients_leave_nothing_in_the_optimizer(pool, tmp_path):
    """Three clients one after the other are three clients at three replicas, with every optimizer."""
    ran = []
    for replicas in (1, 3):
        runs = [
            federated(
                folder=str(tmp_path / f"{name}-{replicas}"),
                replicas=replicas,
                train={"steps": 1},
                optimizer={"name": name, "lr": 0.01},
            )
            for name in ALONE
        ]
        ran.append(run_all(pool, runs))
    for name, one, other in zip(ALONE, *ran, strict=True):
        assert distance(one.weights[0], other.weights[0]) <= FP64_EQUAL, name


def test_what_looks_at_single_steps_is_refused(pool, tmp_path):
    run = federated(folder=str(tmp_path))
    with pytest.raises(PlanError, match="Measure with sync=all_reduce"):
        noise_scale(run, batches=3)
    with pytest.raises(PlanError, match="round of many clients"):
        lr_range(run, tmp_path, low=1e-4, high=1.0, steps=10)
    with pytest.raises(PlanError, match="Verify the layout with sync=all_reduce"):
        Trial(run, pool)


def test_scaffold_takes_plain_sgd_only():
    options = {"scaffold": True, "weights": "uniform"}
    plan_run(federated(**options))
    with pytest.raises(PlanError, match="defined for plain SGD"):
        plan_run(federated(**options, optimizer={"name": "adamw"}))


def test_more_clients_than_there_are(pool, tmp_path):
    with pytest.raises(Exception, match="more than the 5 clients"):
        run_all(pool, [federated(folder=str(tmp_path), clients_per_round=6)])
