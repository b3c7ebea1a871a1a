import json
import math
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import PacelineError, TrainError
from paceline.track import RunInfo
from paceline.track.jsonl import JsonLines, cut, read_evaluations, read_events, read_metrics, write_info
from track.runs import metrics_of, write_lines


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


def test_lines_stand_in_the_files_before_anything_is_closed(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / "run")
    lines.step({"step": 1, "loss": 2.5})
    lines.evaluation({"step": 1, "samples": [{"prompt": "a\n", "text": '\u2028\ud800"b'}]})
    lines.event({"step": 1, "kind": "start", "message": "m"})
    folder = tmp_path / "new" / "run"
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5}\n'
    assert read_evaluations(folder)[0]["samples"][0]["text"] == '\u2028\ud800"b'
    assert len((folder / "evaluations.jsonl").read_text().splitlines()) == 1
    assert read_events(folder) == [{"step": 1, "kind": "start", "message": "m"}]
    lines.close()


def test_reading_leaves_a_half_last_line_out_and_needs_no_file(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_evaluations(tmp_path) == read_events(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert steps_of(tmp_path) == [1, 2]


@given(kept=st.integers(0, 3 * len('{"step": 1}\n')))
def test_after_a_kill_at_any_byte_the_next_line_stands_alone(
    tmp_path_factory: pytest.TempPathFactory, kept: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    whole = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    (folder / "metrics.jsonl").write_bytes(whole[:kept])
    lines = JsonLines(folder)
    lines.step({"step": 9})
    lines.close()
    written = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    complete = len([end for end in (11, 23, 35) if kept >= end])  # where the closing braces stand
    assert written == [*range(1, complete + 1), 9]


def test_cut_takes_later_steps_back_byte_for_byte_and_leaves_events(tmp_path: Path) -> None:
    first = '{"loss": 2.50, "step":1}\n{"step": 2,  "loss": 1e0}\n'
    (tmp_path / "metrics.jsonl").write_text(first + '{"step": 3}\n{"step": 4}\n{"st')
    write_lines(tmp_path / "evaluations.jsonl", [{"step": 2}, {"step": 4}])
    events = '{"step": 4, "kind": "stop", "message": ""}\n{"st'
    (tmp_path / "events.jsonl").write_text(events)
    cut(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == first
    assert [record["step"] for record in read_evaluations(tmp_path)] == [2]
    assert (tmp_path / "events.jsonl").read_text() == events


def test_cut_to_no_checkpoint_begins_anew(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    write_lines(tmp_path / "evaluations.jsonl", [{"step": 0}, {"step": 1}])
    cut(tmp_path, 0)
    assert steps_of(tmp_path) == []
    assert read_evaluations(tmp_path) == []


def test_killed_and_continued_each_step_stands_once(tmp_path: Path) -> None:
    for start, end in [(0, 7), (4, 9), (8, 12)]:
        cut(tmp_path, start)
        lines = JsonLines(tmp_path)
        for step in range(start + 1, end + 1):
            lines.step(metrics_of(step))
        lines.close()
    assert steps_of(tmp_path) == list(range(1, 13))


def test_cut_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2}])

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TrainError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        cut(tmp_path, 1)
    assert steps_of(tmp_path) == [1, 2]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metrics.jsonl", lambda lines: lines.step({"step": 1})),
        ("evaluations.jsonl", lambda lines: lines.evaluation({"step": 1})),
        ("events.jsonl", lambda lines: lines.event({"step": 1})),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, name: str, write: Callable[[JsonLines], None]
) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    message = rf"{tmp_path}/{name} cannot be written: No space left on device"
    with closing(JsonLines(tmp_path)) as lines, pytest.raises(TrainError, match=message) as caught:
        write(lines)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path, info: RunInfo) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"file/run/metrics\.jsonl cannot be written: Not a directory"):
        JsonLines(tmp_path / "file" / "run")
    with pytest.raises(TrainError, match=r"file/run/run\.json cannot be written: Not a directory"):
        write_info(tmp_path / "file" / "run", info)


@pytest.mark.parametrize("damage", ["\0\0\0", "[]", '{"step": "two"}', '{"loss": 1}'])
def test_a_damaged_line_inside_a_file_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    for read in (read_metrics, lambda folder: cut(folder, 1)):
        with pytest.raises(PacelineError, match=r"metrics\.jsonl line 2 is not"):
            read(tmp_path)


def test_a_number_that_json_has_no_word_for_is_a_programmers_error(tmp_path: Path) -> None:
    with closing(JsonLines(tmp_path)) as lines, pytest.raises(ValueError, match="Out of range"):
        lines.step({"step": 1, "loss": math.nan})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
