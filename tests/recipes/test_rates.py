"""Rates that are measured, averages, perturbed weights and a batch that grows, in real runs: the same under every
layout, and bit for bit after a stop."""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from commands import Command, metrics, paceline, tiny_config, write_texts
from tolerances import FP32_LOSS, FP32_RUN

CLOCK = ("tokens_per_s", "mfu", "step_s", "data_wait_s", "memory_bytes", "time")
STEPS = 9
EVERYTHING = {
    "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.5},
    "schedule": {"name": "dynamic", "warmup_steps": 2, "window": 2, "floor": 0.5, "keep": 0.6, "unit": "tokens"},
    "batch": {"sequences": 6, "warmup": {"start": 2, "steps": 4, "by": 2}},
    "average": {"name": "ema", "decay": 0.7},
    "perturb": {"at": [4], "shrink": 0.8, "noise": 0.2},
    "evaluate": {"every": 2},
    "checkpoint": {"every": 3},
    "train": {"steps": STEPS},
}
RATES = "the rates follow what the weights do"


def ran(folder, *overrides, **sections):
    if not (folder / "texts").exists():
        write_texts(folder)
    ended = paceline(folder, "train", str(tiny_config(folder, **sections)), *overrides)
    assert ended.status == 0, ended
    return folder / "run"


def lines(run, name="metrics.jsonl"):
    """A file of a run, without what a clock says."""
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = ran(tmp_path_factory.mktemp("alone"), **EVERYTHING)
    return lines(run), lines(run, "evaluations.jsonl"), load_file(run / "export" / "model.safetensors")


def test_the_run_is_one_in_which_everything_happens(alone):
    steps, evaluations, _ = alone
    assert [line["tokens"] // 32 for line in steps] == [2, 2, 4, 4, 6, 6, 6, 6, 6]
    assert steps[-1]["sequences_seen"] == 42 and steps[-1]["tokens_seen"] == 42 * 32
    rates = [line["lr"] for line in steps]
    assert len(set(rates)) == STEPS and 0.005 < min(rates[3:]) < 0.4, RATES
    assert all(line["averaged"] for line in evaluations)


LAYOUTS = [
    "replicas=2",
    "layout.shard=2",
    "layout.tensor=2 layout.sequence=true",
    "layout.pipeline=2 batch.micro=1",
    "layout.context=2 layout.zero=2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_rates_losses_and_averages(tmp_path, alone, layout):
    run = ran(tmp_path, *layout.split(), **EVERYTHING)
    steps, evaluations, weights = alone
    found = lines(run)
    assert [line["sequences_seen"] for line in found] == [line["sequences_seen"] for line in steps]
    for key in ("lr", "loss"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in steps], rel=10 * FP32_LOSS), key
    held_out = [line["loss"] for line in lines(run, "evaluations.jsonl")]
    assert held_out == pytest.approx([line["loss"] for line in evaluations], rel=10 * FP32_LOSS)
    exported = load_file(run / "export" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, tensor in weights.items():
        error = torch.linalg.vector_norm(exported[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error <= FP32_RUN, name


@pytest.mark.parametrize("layout", ["replicas=2", "layout.shard=2"])
def test_gone_on_with_from_a_checkpoint_everything_is_the_same_bit_for_bit(tmp_path, layout):
    run = ran(tmp_path, layout, **EVERYTHING)
    whole = lines(run), lines(run, "evaluations.jsonl"), load_file(run / "export" / "model.safetensors")
    for step in (3, 6):
        ran(tmp_path, layout, f"checkpoint.resume={step}", **EVERYTHING)
        assert (lines(run), lines(run, "evaluations.jsonl")) == whole[:2]
        again = load_file(run / "export" / "model.safetensors")
        assert all(torch.equal(again[name], whole[2][name]) for name in again)


PLATEAU = {
    "schedule": {"name": "plateau", "warmup_steps": 0, "patience": 0, "threshold": 0.5, "multiply": 0.9},
    "evaluate": {"every": 1},
    "train": {"steps": 16},
}


def test_a_rate_that_follows_the_held_out_loss_goes_on_after_a_stop(tmp_path):
    """Asked to stop where an evaluation is due, a run must not miss what the rate of the next steps follows from."""
    whole = ran(tmp_path, "train.output=whole", **PLATEAU).with_name("whole")
    config = str(tiny_config(tmp_path, **PLATEAU))
    command = Command(tmp_path, "train", config, "replicas=1", "train.output=stopped")
    stopped = tmp_path / "stopped"
    while not (stopped / "metrics.jsonl").exists() or len(metrics(stopped)) < 3:
        assert command._process.is_alive(), command.end()
        time.sleep(0.002)  # a poll of a file, not a synchronisation: the condition is checked
    command.signal(signal.SIGTERM)
    assert command.end().status == 0
    assert paceline(tmp_path, "train", config, "train.output=stopped").status == 0
    assert lines(stopped) == lines(whole)
    assert lines(stopped, "evaluations.jsonl") == lines(whole, "evaluations.jsonl")
    rates = [line["lr"] for line in lines(whole)]
    assert rates[0] == rates[1] and rates[-1] == pytest.approx(rates[0] * 0.9**14), RATES


@pytest.mark.parametrize("layout", ["replicas=2", "layout.shard=2"])
def test_every_layout_takes_the_same_held_out_loss_for_a_fall(tmp_path, layout):
    rates = [
        [line["lr"] for line in lines(ran(tmp_path, *words, **PLATEAU, data={"held_out": 0.2}).parent / output)]
        for output, words in (("run", []), ("cut", [layout, "train.output=cut"]))
    ]
    assert rates[0] == rates[1] and len(set(rates[0])) > 8


def test_snapshots_of_the_cycle_ends_are_exported_as_their_mean(tmp_path):
    sections = {
        "schedule": {"name": "cosine_restarts", "warmup_steps": 0, "cycle_steps": 3, "final": 0.0},
        "average": "swa",
        "checkpoint": {"every": 3},
        "train": {"steps": STEPS},
    }
    run = ran(tmp_path, "replicas=2", **sections)
    from paceline.checkpoint import load

    ends = []
    for step in (3, 6, 9):
        with load(run / "checkpoints", step) as checkpoint:
            ends.append({name: checkpoint.tensor(name) for name in checkpoint.names if name.startswith("model/")})
    exported = load_file(run / "export" / "model.safetensors")
    for name, tensor in exported.items():
        mean = torch.stack([end[f"model/{name}"].double() for end in ends]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(exported[name.removeprefix("model/")], tensor) for name, tensor in ends[-1].items())
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("(the average of the weights)" in event["message"] for event in events if event["kind"] == "export")


def test_an_average_may_be_begun_and_given_up_at_a_resume(tmp_path):
    common = {"evaluate": {"every": 1}, "checkpoint": {"every": 2}}
    run = ran(tmp_path, "train.steps=2", **common)
    ran(tmp_path, "train.steps=4", "average=ema", **common)
    ran(tmp_path, "train.steps=6", **common)
    assert [line["averaged"] for line in lines(run, "evaluations.jsonl")] == [False] * 2 + [True] * 2 + [False] * 2


def test_a_dry_run_tells_the_rates_the_growth_and_what_is_done_to_the_weights(tmp_path):
    write_texts(tmp_path)
    scaled = {**EVERYTHING["schedule"], "name": "cosine", "scale": "linear", "base_sequences": 3}
    for key in ("window", "floor", "keep"):
        scaled.pop(key)
    config = tiny_config(tmp_path, **{**EVERYTHING, "schedule": scaled})
    ended = paceline(tmp_path, "train", str(config), "--dry-run", "--json")
    assert ended.status == 0, ended
    for expected in (
        "from 2 sequences = 1 rank(s) x 1 micro-batch(es) x 2 in step 1, by 2 at a time, full from step 5 on",
        "peak 1 = 0.5 x 2 (linear: 6 sequences for 3)",
        "average    ema, every 1 step(s), for evaluation and export",
        "perturb    0.8 x weights + 0.2 x new first values, after step(s) 4",
        "copies of the weights",
    ):
        assert expected in ended.out, ended.out
    plan = ended.json()
    assert plan["tokens_in_all"] == 42 * 32 and plan["rates"]["peak"] == 1.0
    assert plan["rates"]["first"] == pytest.approx(0.5 * 2 / 3 * (2 / 6) / 2) and plan["rates"][
        "last"
    ] == pytest.approx(0.1)
    assert plan["bytes_per_rank"]["copies"] == 4 * plan["model"]["trainable"]
