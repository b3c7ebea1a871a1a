"""A log on disk: a snapshot and the records after it, in a folder of its own.

    record   header length (4 bytes), body length (8), CRC-32 of these (4)
             header (JSON), body (tensors), "done", CRC-32 of header and body (4)

A record is written before it is answered for. What a process has written outlives it; to outlive the machine too,
``fsync`` waits for the disk. A record that was cut off by a death was never answered for, and is left out. Any other
that is not as it was written is damage: a server must not go on without it, nor with it.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from paceline.errors import LinkError
from paceline.sync.server.codec import DTYPES, body_bytes, pack, padded, raw, unpack

_LENGTHS = struct.Struct("!IQ")
_CHECK = struct.Struct("!I")
_PREFIX_BYTES = _LENGTHS.size + _CHECK.size
_DONE = b"done"
_SUFFIX_BYTES = len(_DONE) + _CHECK.size


class DamagedLog(LinkError):
    """What a log holds is not what was written."""


class FileLog:
    """The log of one server; ``longest_bytes`` of records make a snapshot due.

    Raises ``DamagedLog`` if records that were answered for are not as they were written.
    """

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
        snapshot = None
        if self._snapshot.exists():
            snapshot = next(_frames(self._snapshot), None)
            if snapshot is None:  # it was given its name when it was whole
                raise _damaged(self._snapshot, 0)
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
    lengths = _LENGTHS.pack(len(header), body_bytes(tensors))
    parts: list[Any] = [lengths + _CHECK.pack(crc32(lengths)), header]
    total = crc32(header)
    for tensor in tensors:
        data, gap = raw(tensor), bytes(padded(tensor.nbytes) - tensor.nbytes)
        parts += [data, gap]
        total = crc32(gap, crc32(data, total))
    parts.append(_DONE + _CHECK.pack(total))
    written = 0
    for part in parts:
        view = memoryview(part)
        while len(view):
            count = os.write(descriptor, view)
            view, written = view[count:], written + count
    return written


def _frames(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Where each complete record of a file ends, and what reads it; ``DamagedLog`` if one is not as it was written."""
    total, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + _PREFIX_BYTES <= total:
            file.seek(at)
            lengths, check = file.read(_LENGTHS.size), file.read(_CHECK.size)
            if _CHECK.unpack(check)[0] != crc32(lengths):
                if _is_blank(file, at):  # room that the file was given, and never filled
                    return
                raise _damaged(path, at)
            header, body = _LENGTHS.unpack(lengths)
            end = at + _PREFIX_BYTES + header + body + _SUFFIX_BYTES
            if end > total:
                return
            if not _is_whole(file, header, body):
                if _is_blank(file, end - _SUFFIX_BYTES):
                    return
                raise _damaged(path, at)
            yield end, partial(_read, path, at + _PREFIX_BYTES, header, body)
            at = end


def _is_whole(file: BinaryIO, header: int, body: int) -> bool:
    """Whether the record from here on is as it was written."""
    words = file.read(header)
    total, left = crc32(words), body
    try:
        sizes = [_bytes_of(*described) for described in json.loads(words)[1]]
    except (ValueError, LookupError, TypeError):
        return False
    for size in sizes:
        gap = padded(size) - size
        total = crc32(file.read(size), total)
        total = crc32(file.read(gap), total)
        left -= size + gap
    return left == 0 and file.read(_SUFFIX_BYTES) == _DONE + _CHECK.pack(total)


def _bytes_of(dtype: str, shape: list[int]) -> int:
    return int(DTYPES[dtype].itemsize * math.prod(shape))


def _is_blank(file: BinaryIO, at: int) -> bool:
    """Whether there are only zeros from here to the end of the file."""
    file.seek(at)
    while part := file.read(1 << 20):
        if part.count(0) != len(part):
            return False
    return True


def _damaged(path: Path, at: int) -> DamagedLog:
    return DamagedLog(
        f"{path}: the record at byte {at:,} is not what was written (its checksum is wrong), and what comes after it "
        "may not be applied without it. Start the run again: it goes on from its newest checkpoint, with servers that "
        "begin anew. If it happens again, look at the disk"
    )


def _read(path: Path, start: int, header: int, body: int) -> Any:
    with path.open("rb") as file:
        file.seek(start)
        return unpack(file.read(header), bytearray(file.read(body)))
