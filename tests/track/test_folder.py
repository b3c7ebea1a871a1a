from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.errors import PacelineError
from paceline.track.folder import read_run


def test_a_folder_that_is_no_run_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        PacelineError, match=r"holds no metrics\.jsonl, events\.jsonl or config\.yaml; expected the folder"
    ):
        read_run(tmp_path)
    with pytest.raises(PacelineError, match="nowhere is not a folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.yaml", "a: [1", r"config\.yaml is not valid YAML"),
        ("config.yaml", b"\xff\xfe", r"config\.yaml cannot be read"),
        ("summary.json", "{", r"summary\.json is not valid JSON"),
        ("run.json", '{"name": "a"}', r"run\.json does not say what a run is"),
        ("run.json", "[]", r"run\.json does not say what a run is"),
        ("metrics.jsonl", "\n{}", r"metrics\.jsonl line 1"),
    ],
)
def test_a_damaged_file_is_named(write_run: Callable[..., Path], name: str, text: str | bytes, problem: str) -> None:
    folder = write_run(3)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PacelineError, match=problem) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


def test_sessions_start_after_each_resume(write_run: Callable[..., Path]) -> None:
    resumes = "".join(f'{{"step": {step}, "kind": "resume", "message": ""}}\n' for step in (50, 120))
    assert read_run(write_run(events__jsonl=resumes)).session_starts() == [0, 50, 120]


def test_marks_outside_of_the_steps_are_left_out(write_run: Callable[..., Path]) -> None:
    lines = [
        f'{{"step": {step}, "kind": "{kind}", "message": "m"}}\n' for step, kind in [(0, "warning"), (2, "checkpoint")]
    ]
    steps = read_run(write_run(3, events__jsonl="".join(lines))).steps()
    assert [(mark.step, mark.kind) for mark in steps.marks] == [(2, "checkpoint")]
    assert (steps.first, steps.last) == (1, 3)
