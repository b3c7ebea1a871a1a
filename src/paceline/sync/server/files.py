"""A log on disk: a snapshot and the records after it, in a folder of its own.

A record is written before it is answered for. What a process has written outlives it; to outlive the machine too,
``fsync`` waits for the disk. A record that was cut off by a death was never answered for, and is left out.
"""

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from paceline.sync.server.codec import body_bytes, pack, padded, raw, unpack

_PREFIX = struct.Struct("!IQ")


class FileLog:
    """The log of one server; ``longest_bytes`` of records make a snapshot due."""

    keeps = True

    def __init__(self, folder: Path, *, longest_bytes: int, fsync: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._longest, self._fsync = folder, longest_bytes, fsync
        self._number = max((int(path.stem.split("-")[1]) for path in folder.glob("snapshot-*.bin")), default=0)
        self._file = os.open(self._records, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = self._cut()

    @property
    def is_long(self) -> bool:
        """Whether the records have become longer than they should."""
        return self._size > self._longest

    def append(self, record: Any) -> None:
        """Write one more."""
        self._size += _write(self._file, record)
        if self._fsync:
            os.fdatasync(self._file)

    def replace(self, snapshot: Mapping[str, Any]) -> None:
        """A new pair of files; the old one is there until the new snapshot is."""
        old = [self._snapshot, self._records]
        self._number += 1
        temporary = self._folder / "snapshot.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        _write(descriptor, dict(snapshot))
        if self._fsync:
            os.fsync(descriptor)
        os.close(descriptor)
        os.close(self._file)
        self._file = os.open(self._records, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.replace(temporary, self._snapshot)
        self._size = 0
        for path in old:
            path.unlink(missing_ok=True)

    def read(self) -> tuple[Mapping[str, Any] | None, Iterator[Any]]:
        """What was kept."""
        snapshot = next(_frames(self._snapshot), None) if self._snapshot.exists() else None
        return snapshot and snapshot[1](), (record() for _, record in _frames(self._records))

    def _cut(self) -> int:
        """Leave out what was cut off; the bytes that are left."""
        size = max((end for end, _ in _frames(self._records)), default=0)
        os.ftruncate(self._file, size)
        return size

    @property
    def _snapshot(self) -> Path:
        return self._folder / f"snapshot-{self._number}.bin"

    @property
    def _records(self) -> Path:
        return self._folder / f"records-{self._number}.bin"


def _write(descriptor: int, record: Any) -> int:
    header, tensors = pack(record)
    parts: list[Any] = [_PREFIX.pack(len(header), body_bytes(tensors)), header]
    for tensor in tensors:
        parts += [raw(tensor), bytes(padded(tensor.nbytes) - tensor.nbytes)]
    written = 0
    for part in parts:
        view = memoryview(part)
        while len(view):
            count = os.write(descriptor, view)
            view, written = view[count:], written + count
    return written


def _frames(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Where each complete record of a file ends, and what reads it."""
    total, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + _PREFIX.size <= total:
            file.seek(at)
            header, body = _PREFIX.unpack(file.read(_PREFIX.size))
            start, at = at + _PREFIX.size, at + _PREFIX.size + header + body
            if at > total:
                return
            yield at, partial(_read, path, start, header, body)


def _read(path: Path, start: int, header: int, body: int) -> Any:
    with path.open("rb") as file:
        file.seek(start)
        return unpack(file.read(header), bytearray(file.read(body)))
