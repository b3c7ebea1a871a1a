import runpy
import sys
from pathlib import Path

import pytest

import paceline
from commands import metrics, write_texts
from paceline.plan.run import plan_run


def test_the_example_of_a_module_of_ones_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    changes = ["data.source=texts", "data.document=paragraph", "train.steps=10", "batch.sequence_tokens=32"]
    monkeypatch.setattr(sys, "argv", ["own_module.py", *changes])
    runpy.run_path(str(root / "examples" / "own_module.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "step 10  loss" in printed and "bits per byte" in printed
    losses = [line["loss"] for line in metrics(tmp_path / "runs" / "own_module")]
    assert len(losses) == 10 and losses[-1] < losses[0]


def test_the_example_of_unequal_replicas_is_a_config_that_can_be_planned(root: Path) -> None:
    config = paceline.read(str(root / "examples" / "unequal_replicas.yaml"))
    grid, batch = plan_run(config)
    assert grid.ranks == 1 and batch.data_parallel == 4
