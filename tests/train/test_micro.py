"""How many rows fit at once: by what a device says, by a straight line, and the same on all ranks."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commands import metrics, paceline, tiny_config, write_texts
from meshes import replica
from paceline import Trainer
from paceline.comm import link
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.config import BatchConfig, Config, read
from paceline.data.rows import Row
from paceline.errors import PlanError
from paceline.plan.batch import micro_sizes, plan_batch
from paceline.plan.layout import Grid
from paceline.plan.run import plan_batches, plan_run
from paceline.train.memory import available_bytes
from paceline.train.micro import by_measuring, by_trying, longest, smallest
from tolerances import FP32_RUN


@given(st.integers(1, 300), st.integers(1, 300))
def test_what_runs_out_above_so_many_rows_gives_the_fewest_micro_batches(share, most):
    tried = []

    def run(count):
        tried.append(count)
        if count > most:
            raise torch.OutOfMemoryError

    found = by_trying(share, run)
    assert tried[0] == share and tried[-1] == found <= most
    plan = plan_batch(BatchConfig(sequences=share, micro=found), 1)
    assert plan.micro_batches == -(-share // min(share, most))
    if share % most == 0:
        assert found == most
    assert plan.filling < plan.micro_batches, "no row too many"


def test_a_device_without_room_for_a_row_gives_none():
    def run(count):
        raise torch.OutOfMemoryError

    assert by_trying(6, run) == 0 and micro_sizes(6) == [6, 3, 2, 1]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**9), st.integers(1, 10**6))
def test_a_straight_line_tells_how_many_rows_fit(share, most, fixed, each):
    warm = iter([10**12])  # the first pass makes what stays, and does not count
    grown = by_measuring(share, lambda count: next(warm, fixed + count * each), fixed + most * each)
    assert grown == by_trying(share, lambda count: _runs_out(count > most))


def _runs_out(is_out):
    if is_out:
        raise torch.OutOfMemoryError


def test_a_measure_that_does_not_grow_is_not_believed():
    """All of what two rows take is then taken for what rows take: 100 rows of 50 bytes do not fit into 1000."""
    assert by_measuring(100, lambda count: 100, 1000) == 17


def test_rows_are_as_long_as_they_can_be():
    short = Row(3, np.arange(4), np.array([0, 2]), target=np.arange(2), weight=0.0)
    made = longest(short, 6)
    assert made.tokens.tolist() == [0, 1, 2, 3, 0, 1] and made.target.tolist() == [0, 1, 0, 1, 0, 1]
    assert made.weight == 1.0 and made.sequence == 3
    assert longest(short, 2).starts.tolist() == [0]


def agreed(member, said):
    device = SimpleNamespace(torch_device=torch.device("cpu"))
    with replica(member, Grid(shard=member.size)) as mesh:
        return smallest(SimpleNamespace(mesh=mesh, link=LocalLink(), device=device), said[member.index])


def test_all_ranks_of_a_replica_take_the_least(pool):
    assert pool.run(agreed, 3, [7, 2, 5]) == [2, 2, 2]


def linked(member, said):
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    device = SimpleNamespace(torch_device=torch.device("cpu"))
    return smallest(SimpleNamespace(mesh=Mesh.alone(), link=between, device=device), said[member.index])


def test_all_replicas_take_the_least(pool):
    assert pool.run(linked, 3, [7, 2, 5]) == [2, 2, 2]


def test_the_least_of_kernel_and_groups_is_available(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    assert available_bytes(proc, groups) == 1000 * 1024, "no groups"
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    inner = groups / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, used, cached in ((inner, "max", 10, 0), (inner.parent, 900_000, 500_000, 100_000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert available_bytes(proc, groups) == 500_000
    (proc / "self" / "cgroup").write_text("4:memory:/job\n3:cpu:/job\n")
    job = groups / "memory" / "job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("700000\n")
    (job / "memory.usage_in_bytes").write_text("600000\n")
    (job / "memory.stat").write_text("inactive_file 9\ntotal_inactive_file 0\n")
    assert available_bytes(proc, groups) == 100_000


MEASURED = """
from statistics import median
import torch
from torch import nn
from paceline.comm.device import _keep_freed_memory
from paceline.train.micro import growth

_keep_freed_memory()
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)))


def run(count):
    model(torch.randn(count * 512, 256)).square().sum().backward()
    model.zero_grad()


growth(run, 1, torch.device("cpu"))
print(*(median(growth(run, count, torch.device("cpu")) for _ in range(5)) for count in (1, 2, 8)))
"""


def test_what_a_straight_line_says_is_what_a_pass_takes():
    """In a process of its own, whose allocator keeps what is freed, as that of a rank does."""
    ended = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, env=os.environ)
    one, two, eight = (int(word) for word in ended.stdout.split())
    assert 0.8 * eight < one + 7 * (two - one) < 1.25 * eight, (one, two, eight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("micro")
    write_texts(made)
    return made


def losses(folder, name, *words):
    ended = paceline(folder, "train", str(tiny_config(folder)), f"train.output={name}", *words)
    assert ended.status == 0, ended
    return [line["loss"] for line in metrics(folder / name)]


def test_a_run_that_tries_first_learns_the_same(folder):
    """Where all fits, bit for bit; dropout and average would show a stream that was moved."""
    words = ("batch.sequences=6", "model.config.attention_dropout=0.1", "average=ema", "replicas=2")
    plain, tried = losses(folder, "plain", *words), losses(folder, "tried", *words, "batch.micro=auto")
    assert plain == tried
    told = (folder / "tried" / "events.jsonl").read_text()
    assert "batch.micro=auto: 3 sequence(s) of a rank at once, 1 time(s) a step" in told
    assert "micro: auto" in (folder / "tried" / "config.yaml").read_text()


def test_under_shards_it_is_measured_too(folder):
    plain = losses(folder, "one", "batch.sequences=6")
    tried = losses(folder, "sharded", "batch.sequences=6", "batch.micro=auto", "layout={shard: 2, zero: 1}")
    assert tried == pytest.approx(plain, rel=FP32_RUN)


def test_fewer_rows_than_the_share_add_up_to_the_same(folder, monkeypatch):
    """As where memory is short: 6 sequences, of which 2 fit."""
    monkeypatch.chdir(folder)
    said = []
    monkeypatch.setattr("paceline.train.assemble.choose_micro", lambda trial, share: said.append(share) or 2)
    config = read(tiny_config(folder), ["batch.sequences=6", "batch.micro=auto", "train.output=short"])
    with Trainer(config) as trainer:
        short = [event.loss for event in trainer.steps()]
        assert (trainer._loop.parts.batches.full.micro_batches, said) == (3, [6])
    assert short == pytest.approx(losses(folder, "whole", "batch.sequences=6"), rel=FP32_RUN)


def small(**sections):
    return Config.parse({"data": {"source": "x"}, "train": {"steps": 9}} | sections)


def test_the_plan_takes_what_was_found():
    config = small(batch={"sequences": 12, "micro": "auto", "warmup": {"start": 2, "steps": 3}}, replicas=2)
    assert plan_run(config)[1].micro == 6
    batches = plan_batches(config, 2)
    assert (batches.full.micro, batches.full.micro_batches) == (2, 3)
    assert [batches.at(step).micro for step in (1, 2, 3, 4)] == [1, 2, 2, 2]


def test_a_pipeline_refuses_it_in_one_line():
    with pytest.raises(PlanError, match=r"batch\.micro=auto with layout\.pipeline=2 is not built") as error:
        plan_run(small(batch={"micro": "auto"}, layout={"pipeline": 2}))
    assert len(str(error.value).splitlines()) == 1


def test_the_dry_run_says_so(folder):
    ended = paceline(folder, "train", str(tiny_config(folder)), "batch.micro=auto", "--dry-run", "--json")
    assert ended.status == 0 and "micro auto" in ended.out, ended
    assert ended.json()["batch"]["micro"] == "auto"
