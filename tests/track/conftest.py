"""A run folder to read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.track import RunInfo
from paceline.track.jsonl import write_info
from track.runs import metrics_of, write_lines


@pytest.fixture
def info() -> RunInfo:
    return RunInfo(
        name="runs/first",
        model="llama-1m",
        parameters=1_310_000,
        steps=200,
        replicas=2,
        precision="bf16",
        checkpoint_every=50,
        mfu_formula="MFU = 6 N x tokens/s / 812 GFLOP/s",
    )


@pytest.fixture
def write_run(tmp_path: Path, info: RunInfo) -> Callable[..., Path]:
    """Write a run folder of so many steps, with an evaluation each 50 and whatever else is given as files."""

    def write(steps: int = 200, *, evaluations: int | None = None, change: Any = None, **files: str) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        records = [metrics_of(step) for step in range(1, steps + 1)]
        for record in records:
            if change:
                change(record)
        measured = [
            {"step": step, "loss": 2.6, "bits_per_byte": 1.5 + 50 / step, "targets": 1000, "time": 0.0}
            | {"samples": [{"prompt": "def f(x):\n", "text": f"    return {step}"}]}
            for step in range(50, steps + 1, 50)
        ][:evaluations]
        write_lines(folder / "metrics.jsonl", records)
        write_lines(folder / "evaluations.jsonl", measured)
        write_lines(folder / "events.jsonl", [{"time": 1.79e9, "step": 0, "kind": "start", "message": "seed 0"}])
        write_info(folder, info)
        (folder / "config.yaml").write_text("objective: {name: next_token}\ntrain: {steps: 200, output: runs/first}\n")
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        return folder

    return write
