"""The source of truth of a run: what it is, and its metrics, evaluations and events as JSON lines.

A line is complete when its newline is written, and is written by one system call, so a kill leaves at most one half
line at the end of a file. Files only grow, except that ``cut`` takes the steps after a checkpoint back when a run
continues from it or goes back to it, so that each step stands once. Events are never cut: they tell what happened, also
what was undone.
"""

import json
import os
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from paceline.errors import PacelineError, TrainError
from paceline.track.base import Record, RunInfo

RUN = "run.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
EVENTS = "events.jsonl"


class JsonLines:
    """Appends to the three files of a run folder, which it makes if need be.

    Raises ``TrainError`` with the path and the system's reason when a line cannot be kept (full disk, no permission).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open()

    def _open(self) -> None:
        with ExitStack() as files:
            self._metrics = files.enter_context(closing(_Appender(self._folder / METRICS)))
            self._evaluations = files.enter_context(closing(_Appender(self._folder / EVALUATIONS)))
            self._events = files.enter_context(closing(_Appender(self._folder / EVENTS)))
            self._files = files.pop_all()

    def step(self, metrics: Record) -> None:
        """Append to ``metrics.jsonl``."""
        self._metrics.append(metrics)

    def evaluation(self, evaluation: Record) -> None:
        """Append to ``evaluations.jsonl``."""
        self._evaluations.append(evaluation)

    def event(self, event: Record) -> None:
        """Append to ``events.jsonl``; a rollback also cuts the steps that it undoes."""
        self._events.append(event)
        if event["kind"] == "rollback":
            self._files.close()
            cut(self._folder, event["to"])
            self._open()

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class _Appender:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend(path)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - unbuffered: a line is one system call
        except OSError as error:
            _refuse(path, error)

    def append(self, record: Record) -> None:
        """Write one line; a number that is not finite is a ``ValueError`` (``Trackers`` takes them out)."""
        line = json.dumps(dict(record), allow_nan=False).encode() + b"\n"
        try:
            while line:  # the system may take a part only, and say why at the next call
                line = line[self._file.write(line) :]
        except OSError as error:
            _refuse(self._path, error)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            _refuse(self._path, error)


def _refuse(path: Path, error: OSError) -> NoReturn:
    raise TrainError(
        f"{path} cannot be written: {error.strerror or error}. "
        "Make room or give permission, then run the same command again: it continues from the newest checkpoint."
    ) from error


def write_info(folder: Path, info: RunInfo) -> None:
    """Write ``run.json``, whole or not at all; ``TrainError`` if it cannot be written."""
    _replace(folder / RUN, json.dumps(asdict(info), indent=1).encode() + b"\n")


def cut(folder: Path, step: int) -> None:
    """Take metrics and evaluations after ``step`` back (all of them when ``step`` is 0); events stay.

    Each file is replaced as a whole, or untouched if the process dies meanwhile. Call it before ``JsonLines`` opens.
    Raises ``TrainError`` when a file cannot be written, ``PacelineError`` when a line is not JSON.
    """
    for path in (folder / METRICS, folder / EVALUATIONS):
        if path.is_file():
            lines = [line for line, record in _lines(path) if step > 0 and record["step"] <= step]
            _replace(path, b"".join(lines))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Metrics of every step in order; empty if there is no file. A half last line is left out."""
    return _records(folder / METRICS)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Evaluations in order; empty if there is no file. A half last line is left out."""
    return _records(folder / EVALUATIONS)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Events in order; empty if there is no file. A half last line is left out."""
    return _records(folder / EVENTS)


def _records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in _lines(path)] if path.is_file() else []


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every complete line with what it says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PacelineError(f"{path} cannot be read: {error.strerror}") from None
    *complete, rest = content.split(b"\n")
    found = [(line + b"\n", _parse(line)) for line in complete]
    if (last := _parse(rest)) is not None:
        found.append((rest + b"\n", last))
    for number, (_, record) in enumerate(found, start=1):
        if record is None:
            raise PacelineError(
                f"{path} line {number} is not a JSON object with a step; the file is damaged: mend or remove it"
            )
    return [(line, record) for line, record in found if record is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _mend(path: Path) -> None:
    """Take a half last line away, or end a whole one that lacks its newline, so that the next line stands alone."""
    if not path.is_file():
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if start == len(content):
        return
    if _parse(content[start:]) is None:
        os.truncate(path, start)
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        _refuse(path, error)
