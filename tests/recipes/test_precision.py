"""Whole runs in each precision: what is skipped, recorded, saved, resumed, and refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline
from commands import metrics, tiny_config, write_texts
from paceline.checkpoint import load
from paceline.comm import device
from paceline.config import read_tree
from paceline.errors import CheckpointError, NonFiniteError, PlanError
from paceline.recipes.explain import explain
from paceline.track.report import write_report
from paceline.train import rounded

CLOCK = ("tokens_per_s", "mfu", "step_s", "data_wait_s", "memory_bytes", "time")
FP16 = {"precision": "fp16", "loss_scale": {"initial": 2.0**24, "growth_steps": 3}}
"""Starts at a scale at which the model overflows."""
STEPS = 8


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict[str, Any]:
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    tree = read_tree(tiny_config(tmp_path, train={"steps": STEPS}, checkpoint={"every": 1, "keep": 100}))
    return {**tree, "schedule": "constant"}


def ran(config, output="run", **changes):
    """Train to the end; the lines of the metrics, without what a clock says."""
    with paceline.Trainer({**config, "train": {**config["train"], "output": output, **changes}}) as trainer:
        for _ in trainer.steps():
            pass
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(Path(output))]


def test_steps_that_overflow_are_skipped_and_said(config, tmp_path):
    lines = ran({**config, **FP16})
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert len(skipped) >= 2 and skipped[0] == 1 and len(skipped) < STEPS
    for before, after in pairwise(lines):
        assert after["skipped_steps"] == before["skipped_steps"] + after["skipped"]
        assert after["tokens_seen"] == before["tokens_seen"] + after["tokens"], "the data moves on"
        assert not before["skipped"] or after["loss_scale"] == before["loss_scale"] / 2
    assert all((line["gradient_norm"] is None) == line["skipped"] for line in lines)
    assert 0.1 < lines[-1]["gradient_norm"] < 10.0, "without the scale"
    with load(tmp_path / "run" / "checkpoints", skipped[0]) as first, load(tmp_path / "run" / "checkpoints", 8) as last:
        assert first.tensor("loss_scale").tolist() == [2.0**23, 0, 1], "value, good steps, skipped steps"
        assert not [name for name in first.names if name.startswith("optimizer/")], "nothing was updated"
        assert last.tensor("loss_scale")[2] == len(skipped)
        count = next(name for name in last.names if name.endswith("/step"))
        assert last.tensor(count).item() == STEPS - len(skipped), "Adam counts its updates"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["kind"] == "skip"]
    assert [event["step"] for event in told] == skipped
    assert told[0]["message"].startswith("a gradient overflowed at loss scale 1.67772e+07: step skipped, the scale is")
    assert not [event for event in events if "written as null" in event["message"]]
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{len(skipped)} steps skipped, because a gradient overflowed in fp16" in page and "Loss scale" in page


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("precision", [FP16, {"precision": "bf16_pure"}])
def test_a_run_goes_on_bit_for_bit(config, precision, stop):
    """In fp16 also where it stopped among skipped steps, before the optimizer had any state."""
    ran({**config, **precision}, steps=stop)
    assert ran({**config, **precision}) == ran({**config, **precision}, output="whole")
    runs = [load(Path(output) / "checkpoints", STEPS) for output in ("run", "whole")]
    with runs[0] as one, runs[1] as other:
        assert one.names == other.names and all(torch.equal(one.tensor(n), other.tensor(n)) for n in one.names)
        dtypes = {one.entry(name).dtype for name in one.names if name.startswith("model/")}
        assert dtypes == {"bfloat16" if precision != FP16 else "float32"}
        assert {one.entry(n).dtype for n in one.names if n.startswith("optimizer/")} == {"float32"}


def test_bf16_alone_learns_as_with_masters_because_it_rounds_by_chance(config, monkeypatch):
    """At a rate at which most updates are nothing to the nearest bf16 number."""
    small = {**config, "optimizer": {"name": "adamw", "lr": 1e-4}, "checkpoint": {"every": 0}}

    def loss(precision, output):
        return ran({**small, "precision": precision}, output=output, steps=40)[-1]["loss"]

    masters, pure = loss("bf16", "masters"), loss("bf16_pure", "pure")
    monkeypatch.setattr(rounded, "round_box", lambda exact, kept, **_: kept.copy_(exact))
    nearest = loss("bf16_pure", "nearest")
    assert abs(pure - masters) < 0.1 * abs(nearest - masters)


def test_what_learns_in_another_dtype_is_another_run(config):
    ran({**config, "precision": "bf16"}, steps=1)
    assert ran({**config, "precision": "fp32"}, steps=2), "both have fp32 masters"
    with pytest.raises(CheckpointError, match=r"dtype of what learns='float32', this config has 'bfloat16'"):
        paceline.Trainer({**config, "precision": "bf16_pure"})


def test_an_overflow_at_the_least_scale_names_the_layer(config):
    scale = {"initial": 2.0**24, "least": 2.0**24}
    with pytest.raises(NonFiniteError, match=r"at step 1.*began in the gradient of .*replica 0, rank 0"):
        ran({**config, "precision": "fp16", "loss_scale": scale})


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure", "fp16", "fp32"])
def test_what_is_slow_on_this_device_runs_with_a_warning(config, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "units", lambda _: frozenset())
    ran({**config, "precision": precision}, steps=1)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    warned = [event["message"] for event in events if event["kind"] == "warning"]
    units = {"bf16": "bf16", "bf16_pure": "bf16", "fp16": "fp16"}.get(precision)
    assert [f"precision={precision} was asked for" in text and f"no {units} units" in text for text in warned] == [
        True
    ] * bool(units)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"precision": "fp8"}, "precision=fp8 is not built: it takes fp8 matrix units"),
        ({"precision": "bf16", "loss_scale": {"initial": 1024.0}}, "loss_scale is for precision=fp16"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_built(config, changes, expected):
    tree = {**config, **changes}
    with pytest.raises(PlanError, match=expected):
        explain(paceline.Config.parse(tree))
    with pytest.raises(PlanError, match=expected):
        paceline.Trainer(tree)


@pytest.mark.parametrize(
    ("precision", "micro", "bytes_per_parameter"),
    [("fp32", None, 16), ("bf16", None, 18), ("fp16", 1, 18), ("bf16_pure", None, 12), ("bf16_pure", 1, 14)],
)
def test_the_plan_says_the_bytes_of_a_parameter(config, precision, micro, bytes_per_parameter):
    plan = explain(
        paceline.Config.parse({**config, "precision": precision, "batch": {**config["batch"], "micro": micro}})
    )
    memory = plan.values()["bytes_per_rank"]
    assert memory["states"] == bytes_per_parameter * plan.model.parameters
    assert f"precision  {precision} (asked" in plan.text()
