import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.checkpoint.folder import newest, remove_stale, steps
from paceline.checkpoint.retention import surplus


def dead_pid() -> int:
    """The number of a process that has just ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_only_folders_with_the_name_of_a_step_count(tmp_path: Path) -> None:
    for name in (
        *("step-00000020", "step-00000003", "step-123456789"),
        *("step-7", "step-00000004.bak", ".step-00000005.writing-host-1", "abandoned-step-00000006", "notes"),
    ):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [3, 20, 123456789]
    assert newest(tmp_path) == 123456789


@pytest.mark.parametrize(
    ("keep", "keep_every", "gone"),
    [
        (3, 0, [10, 20, 30]),
        (1, 0, [10, 20, 30, 40, 50]),
        (9, 0, []),
        (1, 20, [10, 30, 50]),
        (2, 30, [10, 20, 40]),
        (1, 10, []),
    ],
)
def test_the_newest_and_the_multiples_stay(keep: int, keep_every: int, gone: list[int]) -> None:
    assert surplus([10, 20, 30, 40, 50, 60], keep=keep, keep_every=keep_every) == gone


def test_the_only_one_stays() -> None:
    assert surplus([10], keep=1, keep_every=0) == []
    with pytest.raises(AssertionError):
        surplus([10], keep=0, keep_every=0)


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    host, other = socket.gethostname(), f"not-{socket.gethostname()}"
    living = os.getppid()
    stale = [
        f".step-00000001.writing-{host}-{dead_pid()}",
        f".step-00000002.removed-{host}-{os.getpid()}",
        f".step-00000003.writing-{other}-{living}",
    ]
    kept = [
        f".step-00000004.writing-{host}-{living}",
        f".step-00000005.writing-{other}-1",
        ".step-00000006.writing",
        ".hidden",
        "step-00000007",
        "abandoned-step-00000008",
    ]
    for name in stale + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    os.utime(tmp_path / stale[2], (0, 0))
    remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
