"""What has come in a round, on disk: a message a file, written before it is answered for.

A server that is killed finds it again; and updates are read one at a time, so that many take the memory of one.
"""

import os
import shutil
import struct
from collections.abc import Set
from pathlib import Path
from typing import Any

from paceline.sync.server.codec import pack, padded, raw, unpack

_HEADER = struct.Struct("!I")


class Shelf:
    """Of one round; older ones in the same folder are cleared away."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder / f"round-{step:06d}"
        for old in folder.glob("round-*"):
            if old != self._folder:
                shutil.rmtree(old, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._numbers: dict[str, set[int]] = {}
        for path in self._folder.glob("*/*.bin"):
            self._numbers.setdefault(path.parent.name, set()).add(int(path.stem))

    def kept(self, kind: str) -> Set[int]:
        """The numbers under which there is something of a kind."""
        return self._numbers.get(kind, frozenset())

    def put(self, kind: str, number: int, value: Any) -> None:
        """Keep a value; it is on disk when this returns."""
        header, tensors = pack(value)
        path = self._path(kind, number)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(_HEADER.pack(len(header)) + header)
            for tensor in tensors:
                file.write(raw(tensor))
                file.write(bytes(padded(tensor.nbytes) - tensor.nbytes))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._numbers.setdefault(kind, set()).add(number)

    def get(self, kind: str, number: int) -> Any:
        """The value."""
        data = self._path(kind, number).read_bytes()
        (length,) = _HEADER.unpack_from(data)
        begin = _HEADER.size + length
        return unpack(data[_HEADER.size : begin], bytearray(memoryview(data)[begin:]))

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / kind / f"{number}.bin"
