"""A run's folder: taken by one run at a time, with the resolved config and the processes in it."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paceline.errors import PlanError
from paceline.train.records import write_text


@contextmanager
def claim(output: str) -> Iterator[Path]:
    """Make the folder and hold it for this process; errors say why it cannot be had."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise PlanError(
            f"train.output={output!r} cannot be written: {error.strerror}; choose a folder of your own"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise PlanError(
                f"train.output={output!r} is in use by another run (process {lock.read().strip() or 'unknown'}); "
                "wait for it, or choose another folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def write_processes(folder: Path, processes: Sequence[dict[str, Any]]) -> None:
    """Who is who: pid, role, replica, rank."""
    write_text(folder / "processes.json", json.dumps(list(processes), indent=1))
