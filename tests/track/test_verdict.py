from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.track.folder import read_run
from paceline.track.verdict import verdict

WriteRun = Callable[..., Path]


def said(folder: Path, about: str) -> list[str]:
    return [key + rest for topic, key, rest in verdict(read_run(folder)) if topic == about]


def event(kind: str, step: int, message: str = "m") -> str:
    return f'{{"time": 1790000100.0, "step": {step}, "kind": "{kind}", "message": "{message}"}}\n'


def test_a_finished_run_in_five_sentences(write_run: WriteRun) -> None:
    folder = write_run(summary__json='{"bits_per_byte": 1.6, "baselines": {"gzip -9": 2.0, "an n-gram": 1.28}}')
    assert said(folder, "Held-out text") == [
        "1.600 bits per byte, 20 % fewer than gzip -9 (2.000), 25 % more than an n-gram (1.280)"
    ]
    assert said(folder, "Training loss") == ["2.543 nats per token (smoothed; 2.540 at step 200), from 8.352 at step 1"]
    assert said(folder, "Work") == ["200 of 200 steps, 819k tokens, 39 s in steps, 40 s from start to end"]
    assert said(folder, "Speed") == [
        "21,000 tokens/s (median), MFU 31 %, 412 MiB of memory at most; MFU = 6 N x tokens/s / 812 GFLOP/s"
    ]
    assert said(folder, "Remarks") == ["Nothing out of the ordinary: no warning, no leap of the loss, no stalled step."]


def test_without_a_summary_the_last_evaluation_counts(write_run: WriteRun) -> None:
    assert said(write_run(), "Held-out text") == ["1.750 bits per byte"]


def test_a_best_that_was_not_the_last_is_named(write_run: WriteRun) -> None:
    folder = write_run(summary__json='{"bits_per_byte": 1.9}')
    assert said(folder, "Held-out text") == ["1.900 bits per byte, the best was 1.750 at step 200"]


def test_an_objective_without_bits_per_byte_has_its_loss(write_run: WriteRun) -> None:
    folder = write_run(evaluations__jsonl='{"step": 200, "loss": 2.25, "bits_per_byte": null}\n')
    assert said(folder, "Held-out text") == ["2.250 nats per token"]


def test_no_evaluation_and_no_step_are_said(write_run: WriteRun, tmp_path: Path) -> None:
    assert said(write_run(evaluations=0), "Held-out text") == ["not measured"]
    (tmp_path / "config.yaml").write_text("train: {steps: 5}\n")
    assert verdict(read_run(tmp_path)) == [("Remarks", "", "No step is finished yet.")]


def leap(record: dict[str, Any]) -> None:
    record["loss"] += 3.0 if record["step"] in (150, 190) else 0.0


def stall(record: dict[str, Any]) -> None:
    record["step_s"] = 4.0 if record["step"] in (1, 120) else record["step_s"]


def wait(record: dict[str, Any]) -> None:
    record["data_wait_s"] = 0.05


def lose(record: dict[str, Any]) -> None:
    record["loss"] = None if record["step"] > 193 else record["loss"]


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        (leap, "The loss leapt up at step 150, 190, to 5.641 at most."),
        (stall, "Over 5 times the median time at step 120; the longest took 4.0 s."),
        (wait, "26 % of the time of the steps went into waiting for data."),
        (lose, "The loss was not a finite number at step 194, 195, 196, 197, 198 and 2 more."),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(
    write_run: WriteRun, change: Callable[[dict[str, Any]], None], remark: str
) -> None:
    assert said(write_run(change=change), "Remarks") == [remark]


def test_an_unfinished_run_with_trouble(write_run: WriteRun) -> None:
    folder = write_run(120, events__jsonl=event("warning", 7) + event("resume", 50) + event("error", 120, "full"))
    assert said(folder, "Remarks") == [
        "Error at step 120: full",
        "The run is not finished: 80 steps are left.",
        "1 warning, the last at step 7.",
    ]
    assert said(folder, "Work")[0].endswith("; continued from step 50")


def test_steps_that_are_missing_in_the_record_are_said(write_run: WriteRun) -> None:
    folder = write_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:70] + lines[75:]))
    assert said(folder, "Remarks") == ["Steps are missing in the record from 71."]
