"""A parameter server against all-reduce, its bounds in real runs, and servers that are killed while a run goes on."""

import os
import signal
from pathlib import Path

import pytest
import torch

from loops import LLAMA, config, distance, loop_of, run_all, world_of
from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.errors import ConfigError, PlanError, WorkerError
from paceline.objectives.base import Batch
from paceline.objectives.mixup import Mixed
from paceline.optim.adamw import AdamW
from paceline.parallel.precision import Masters
from paceline.plan.run import plan_run
from paceline.schedule.accumulate import Accumulate
from paceline.sync.base import Serving, SyncContext
from paceline.sync.parameter_server import ParameterServer
from paceline.train.assemble import looked_up
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from parity import CPU, objective, share, tiny_llama
from servers import children, processes
from tolerances import FP64_EQUAL

STEPS = 5


def run(sync, folder, **other):
    """AdamW with decay, a rate that changes, and clipping that bites."""
    other.setdefault("train", {"steps": STEPS, "clip_norm": 0.2})
    return config(
        sync,
        folder=str(folder),
        **{
            "replicas": 2,
            "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.3},
            "schedule": {"name": "linear", "warmup_steps": 2},
            **other,
        },
    )


@pytest.mark.parametrize("layout", [{}, {"shard": 2}, {"tensor": 2}], ids=["plain", "shard", "tensor"])
def test_in_lock_step_it_is_all_reduce(layout, pool, tmp_path):
    """Every loss, weight and moment, and what a checkpoint holds; stale with a bound of 0 is the same in every bit."""
    syncs = {
        "all_reduce": "all_reduce",
        "sync": {"name": "parameter_server", "servers": 3},
        "stale": {"name": "parameter_server", "servers": 3, "mode": "stale", "staleness": 0},
    }
    ran = dict(
        zip(
            syncs,
            run_all(pool, [run(sync, tmp_path / key, layout=layout) for key, sync in syncs.items()]),
            strict=True,
        )
    )
    for one, other in zip(ran["all_reduce"].losses, ran["sync"].losses, strict=True):
        assert one == pytest.approx(other, rel=FP64_EQUAL)
    for one, other in zip(ran["all_reduce"].states, ran["sync"].states, strict=True):
        assert distance(one, other) <= FP64_EQUAL
    assert distance(ran["sync"].states[0], ran["stale"].states[0]) == 0.0
    assert distance(ran["sync"].states[0], ran["sync"].states[1]) == 0.0


UNTIED = {"model": {"config": {**LLAMA, "tie_word_embeddings": False}}}


@pytest.mark.parametrize(
    "layout", [{}, {"shard": 2}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}], ids=lambda cut: next(iter(cut), "")
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_pushing_rows_learns_what_pushing_all_does(optimizer, layout, pool, tmp_path):
    """Every loss, weight and moment, in fp64; and fewer bytes than are said to be the most."""
    optimizers = {
        "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.3},
        "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    }
    server = {"name": "parameter_server", "servers": 3}
    runs = [
        run(
            sync,
            tmp_path / key,
            layout=layout,
            batch={"sequences": 4, "sequence_tokens": 5},
            **UNTIED,
            optimizer=optimizers[optimizer],
        )
        for key, sync in {"whole": "all_reduce", "all": server, "rows": {**server, "sparse": True}}.items()
    ]
    whole, every, rows = run_all(pool, runs)
    for one, other in zip(whole.losses, rows.losses, strict=True):
        assert one == pytest.approx(other, rel=FP64_EQUAL)
    for one, other in zip(whole.states, rows.states, strict=True):
        assert distance(one, other) <= FP64_EQUAL
    assert distance(rows.states[0], rows.states[1]) == 0.0
    assert sum(rows.sent_bytes) < sum(every.sent_bytes)
    if not layout:
        shapes = {name: weight.shape for name, weight in rows.weights[0].items()}
        most = ParameterServer(sparse=True).wire_bytes(shapes, 2, STEPS, value_bytes=8)
        assert max(rows.sent_bytes) < most and max(every.sent_bytes) < most


@pytest.mark.parametrize("options", [{"mode": "stale", "staleness": 1}, {"mode": "async", "compensation": "constant"}])
def test_replicas_that_push_rows_at_their_own_pace_agree_where_they_meet(options, pool, tmp_path):
    options = {"name": "parameter_server", "sparse": True, **options}
    train = {"steps": 12, "clip_norm": 1.0}
    settings = run(options, tmp_path, replicas=3, train=train, checkpoint={"every": 4}, evaluate={"every": 4}, **UNTIED)
    (ran,) = run_all(pool, [settings])
    assert distance(ran.weights[0], ran.weights[1]) == distance(ran.weights[0], ran.weights[2]) == 0.0
    assert len(set(ran.evaluations)) == 1
    assert all(losses[-1] < losses[0] for losses in ran.losses)


def test_rows_of_a_run_that_goes_on_from_a_save_between_meetings(pool, tmp_path):
    """What is saved has all rows, though a rank had only those of its batch."""
    sparse = {"name": "parameter_server", "sparse": True}
    (whole,) = run_all(pool, [run("all_reduce", tmp_path / "whole", **UNTIED)])
    run_all(pool, [run(sparse, tmp_path / "cut", **UNTIED)], until=2)
    (after,) = run_all(pool, [run(sparse, tmp_path / "cut", **UNTIED)])
    assert distance(whole.states[0], after.states[0]) <= FP64_EQUAL


def jumping(member, run):
    with world_of(member, run) as world, loop_of(run, world) as loop:
        loop.parts.sync.at = 3  # as of a replica that was given up, and came back where the others are
        steps = loop.steps()
        seen = [(next(steps).step, loop.sequences_seen) for _ in range(2)]
        assert isinstance(loop.parts.sync, Serving)
        return seen


def test_a_loop_goes_on_where_others_are(pool, tmp_path):
    (seen,) = pool.run(jumping, 1, run({"name": "parameter_server"}, tmp_path, replicas=1))
    assert seen == [(3, 18), (4, 24)], "with the data of that step"


def test_rows_of_a_table_that_is_the_head_too_are_refused(pool, tmp_path):
    with pytest.raises(WorkerError, match="or the output head too"):
        run_all(pool, [run({"name": "parameter_server", "sparse": True}, tmp_path)])


def test_a_run_of_one_goes_on_under_the_other(pool, tmp_path):
    """Saved by servers, continued by an all-reduce, against never stopped."""
    server = {"name": "parameter_server"}
    (whole,) = run_all(pool, [run("all_reduce", tmp_path / "whole")])
    run_all(pool, [run(server, tmp_path / "cut")], until=2)
    run_all(pool, [run("all_reduce", tmp_path / "cut")], until=4)
    (after,) = run_all(pool, [run(server, tmp_path / "cut")])
    assert distance(whole.states[0], after.states[0]) <= FP64_EQUAL


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "stale", "staleness": 1},
        {"mode": "async"},
        {"mode": "async", "compensation": "adaptive", "scale_rate": True},
        {"mode": "sync", "backups": 1},
        {"mode": "sync", "backups": 2, "sparse": True, "lease_s": 30},
    ],
    ids=["stale", "async", "compensated", "backups", "backups-lease"],
)
def test_replicas_at_their_own_pace_agree_where_they_meet(options, pool, tmp_path):
    """In the end, and where weights are saved or measured; and they learn."""
    options = {"name": "parameter_server", **options}
    train = {"steps": 12, "clip_norm": 1.0}
    every = {"checkpoint": {"every": 4}, "evaluate": {"every": 4}, **UNTIED}
    (ran,) = run_all(pool, [run(options, tmp_path, replicas=3, train=train, **every)])
    assert distance(ran.weights[0], ran.weights[1]) == distance(ran.weights[0], ran.weights[2]) == 0.0
    assert len(set(ran.evaluations)) == 1
    # Not by a replica's own losses: one that is always late has few of them.
    assert ran.evaluations[0] < max(losses[0] for losses in ran.losses)
    (again,) = run_all(pool, [run(options, tmp_path, replicas=3, train={**train, "steps": 13}, **UNTIED)])
    assert len(again.losses[0]) == 1


def with_servers(member, addresses, keeper, kills):
    """AdamW on servers in processes of their own; before some steps one of these is killed."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    model = tiny_llama()
    replica = ModuleReplica(Masters(model, torch.float64), AdamW(lr=0.01), mesh=Mesh.alone())
    options = ParameterServer(servers=2, timeout_s=60.0)
    sync = options.build(SyncContext(link=between, steps=STEPS, servers=addresses))
    sync.start(replica)
    goal = objective()
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    losses = []
    for step in range(1, STEPS + 1):
        if member.index == 0 and step in kills:
            for pid in [children(keeper)[i] for i in kills[step]]:
                os.kill(pid, signal.SIGKILL)
        rows = share(step, 7, member.index, member.size, 4)
        batches = [goal.batch(micro, seed=0, step=step) for micro in rows]
        losses.append(train_step(replica, sync, schedule, batches, step=step, stop=False).loss)
    return {"losses": losses, "weights": {shard.name: shard.local.clone() for shard in replica.shards}}


def test_a_run_whose_servers_are_killed_goes_on_with_the_same_result(pool, tmp_path):
    """kill -9: the one with the coordinator, another, then both."""
    results = []
    for kills in ({}, {2: [0], 3: [1], 4: [0, 1]}):
        with processes(2, Path(tmp_path) / str(len(kills))) as (keeper, addresses):
            results.append(pool.run(with_servers, 2, addresses, keeper, kills))
    for one, other in zip(*results, strict=True):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


def late(member, backups):
    """Three steps of parts of three workers; the third has its first gradient when the others have taken all."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    model = tiny_llama()
    replica = ModuleReplica(Masters(model, torch.float64), AdamW(lr=0.01), mesh=Mesh.alone())
    sync = ParameterServer(backups=backups, timeout_s=60.0).build(SyncContext(link=between, steps=3))
    sync.start(replica)
    goal = objective()
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    learn = schedule.run

    def slow(*arguments, **options):
        while "in versions: 0: 6" not in sync.words():  # six pushes
            pass
        return learn(*arguments, **options)

    schedule.run = slow if member.index == 2 else learn
    while sync.at < 3:
        step = sync.at + 1
        batches = [goal.batch(micro, seed=0, step=step) for micro in share(step, 7, member.index, 3, 4)]
        train_step(replica, sync, schedule, batches, step=step, stop=False)
    return {"words": sync.words(), "weights": {shard.name: shard.local.clone() for shard in replica.shards}}


def test_what_comes_too_late_is_left_out_and_counted(pool):
    """With a backup the two that were in time learn as they do alone, and the third goes on from where they are."""
    alone, *_ = pool.run(late, 2, 0)
    told = pool.run(late, 3, 1)
    for each in told:
        assert all(torch.equal(each["weights"][name], alone["weights"][name]) for name in alone["weights"])
    assert "too late and were left out: 1" in told[0]["words"]
    assert alone["words"] is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"sync": {"backups": 2}}, "backups=2 of replicas=2 leaves no gradient to wait for; at most 1"),
        ({"optimizer": {"name": "muon"}}, "a server has pieces of tensors"),
        (
            {"optimizer": {"name": "schedule_free_adamw"}, "schedule": {"name": "constant"}},
            "averages weights between steps",
        ),
        ({"precision": "fp16"}, "precision=fp16 is not built"),
        ({"precision": "bf16_pure"}, "precision=bf16_pure is not built"),
        ({"reduction": "bf16"}, "sums in fp32"),
        ({"regularisation": {"l2": 0.1}}, "l2=0.1 with sync=parameter_server"),
        ({"train": {"clip_value": 0.1}}, "clip_value=0.1 with sync=parameter_server"),
        ({"sync": {"sparse": True}, "average": {"name": "ema"}}, "an average needs all rows in every step"),
        (
            {"sync": {"mode": "async", "lease_s": 9}, "early_stop": {"patience": 2}, "evaluate": {"every": 1}},
            "a replica may be gone",
        ),
    ],
)
def test_what_servers_cannot_do_is_refused(other, reason, tmp_path):
    with pytest.raises(PlanError, match=reason):
        plan_run(run({"name": "parameter_server", **other.pop("sync", {})}, tmp_path, **other))


def test_levels_and_options_that_do_not_belong_are_refused(tmp_path):
    with pytest.raises(PlanError, match="one level of several"):
        plan_run(run(["all_reduce", "parameter_server"], tmp_path, replicas=[2, 2]))
    with pytest.raises(ConfigError, match="lease_s is for mode=async or stale"):
        run({"name": "parameter_server", "lease_s": 5}, tmp_path)
    with pytest.raises(ConfigError, match="backups=1 is for mode=sync, got mode=async"):
        run({"name": "parameter_server", "mode": "async", "backups": 1}, tmp_path)
    with pytest.raises(ConfigError, match="use compensation=constant"):
        run({"name": "parameter_server", "mode": "async", "sparse": True, "compensation": "adaptive"}, tmp_path)
    with pytest.raises(ConfigError, match="are for mode=async, got mode=stale"):
        run({"name": "parameter_server", "mode": "stale", "scale_rate": True}, tmp_path)


class TwoLookups(torch.nn.Module):
    """An encoder's and a decoder's embedding of one table, and a head with a table of its own or the same."""

    def __init__(self, tied):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Embedding(5, 3), torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5)
        self.decoder.weight = self.encoder.weight
        if tied:
            self.head.weight = self.encoder.weight

    def get_input_embeddings(self):
        return self.encoder


def test_a_table_is_what_nothing_but_embeddings_has():
    from transformers import LlamaConfig, LlamaForCausalLM

    untied = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "tie_word_embeddings": False}))
    assert looked_up(untied) == {"model.embed_tokens.weight"}
    assert looked_up(tiny_llama()) == frozenset()
    assert looked_up(TwoLookups(tied=False)) == {"encoder.weight"}
    assert looked_up(TwoLookups(tied=True)) == frozenset()
    assert looked_up(torch.nn.Linear(2, 2)) == frozenset()


def test_tokens_of_a_batch_are_all_that_are_looked_up():
    ids = {"input_ids": torch.tensor([[3, 4]]), "decoder_input_ids": torch.tensor([[7], [9]]), "use_cache": False}
    mixed = Mixed(ids=torch.tensor([[11]]), labels=torch.tensor([[0]]), shares=torch.ones(1, 1))
    batch = Batch(inputs=ids, labels=torch.zeros(1, 2), count=2, sequences=(0,), mixed=mixed)
    assert sorted(batch.tokens.tolist()) == [3, 4, 7, 9, 11]
