"""The names inside a folder of checkpoints.

    step-00000100                                a checkpoint, complete from the moment it has this name
    .step-00000200.writing-<host>-<pid>          being written by that process, or left by its death
    .step-00000050.removed-<host>-<pid>          being deleted
    abandoned-step-00000300                      of a line the run left by going back to an older step

A checkpoint is never written over: a step that is there is set aside or removed before the same number can be saved.
"""

import os
import re
import shutil
import socket
import time
from pathlib import Path

_STEP = re.compile(r"step-(\d{8,})")
_ABANDONED = re.compile(r"abandoned-step-(\d{8,})")
_HIDDEN = re.compile(r"\.step-\d{8,}\.(writing|removed)-(?P<host>.+)-(?P<pid>\d+)")
_STALE_S = 24 * 3600.0  # no save takes a day: what another machine left is removed after one


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps saved in ``folder``, ascending; empty if there is no such folder."""
    return _numbered(folder, _STEP)


def newest(folder: Path) -> int | None:
    """The last step saved in ``folder``, or None."""
    return max(steps(folder), default=None)


def writing_name(step: int) -> str:
    """The hidden folder into which this process writes a step."""
    return f".{step_name(step)}.writing-{socket.gethostname()}-{os.getpid()}"


def remove(folder: Path, name: str, step: int) -> None:
    """Delete ``name``: hidden by one rename first, so that no half of it is ever taken for a checkpoint."""
    hidden = folder / f".{step_name(step)}.removed-{socket.gethostname()}-{os.getpid()}"
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(folder / name, hidden)
    shutil.rmtree(hidden)


def set_aside_after(folder: Path, step: int) -> list[int]:
    """Rename the checkpoints after ``step`` to ``abandoned-...``, newest first; return their steps.

    Nothing is lost: they are deleted only when the new line has passed them (``remove_abandoned``).
    """
    later = [saved for saved in reversed(steps(folder)) if saved > step]
    for saved in later:
        aside = f"abandoned-{step_name(saved)}"
        if (folder / aside).exists():
            remove(folder, aside, saved)
        os.rename(folder / step_name(saved), folder / aside)
    return later


def remove_abandoned(folder: Path, step: int) -> None:
    """Delete the abandoned checkpoints up to ``step``."""
    for saved in _numbered(folder, _ABANDONED):
        if saved <= step:
            remove(folder, f"abandoned-{step_name(saved)}", saved)


def remove_stale(folder: Path) -> None:
    """Delete what was left half written or half deleted by processes that are gone, or by this one: it must be idle."""
    for path in folder.iterdir():
        match = _HIDDEN.fullmatch(path.name)
        if match and not _may_be_in_use(path, match["host"], int(match["pid"])):
            shutil.rmtree(path)


def _may_be_in_use(path: Path, host: str, pid: int) -> bool:
    if time.time() - path.stat().st_mtime > _STALE_S:
        return False
    if host != socket.gethostname():
        return True
    if pid == os.getpid():  # this process, or an earlier one of the same number, usual in containers
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)
