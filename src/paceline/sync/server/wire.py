"""Frames over TCP, and memory that two processes of one machine share.

    frame   header length (4 bytes), body length (8), header (JSON), body (tensors)

The header holds a serial number, which the answer repeats, and the message. Where both ends are on one machine the body
of a push lies in memory of the worker that the server maps, and so does what it pulls.
"""

import ctypes
import json
import mmap
import os
import selectors
import socket
import ssl
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.sync.server.codec import body_bytes, built, pack, padded, raw

_PREFIX = struct.Struct("!IQ")
Place = tuple[str, int, int]
"""Of a body in shared memory: the path of the memory, its size, and where in it."""


class Inbox:
    """What has come in on a socket that does not block, frame by frame. One longer than ``most_bytes`` is refused."""

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes = most_bytes
        self._prefix, self._header, self._body = bytearray(_PREFIX.size), bytearray(), bytearray()
        self._left: memoryview
        self._begin()

    def receive(self, connection: socket.socket) -> list[tuple[bytes, bytearray]]:
        """Headers and bodies of all frames that are complete; ``ConnectionError`` when the other end is gone, after its
        last words have been given."""
        frames: list[tuple[bytes, bytearray]] = []
        while True:
            try:
                count = connection.recv_into(self._left) if len(self._left) else 0
            except (BlockingIOError, ssl.SSLWantReadError):
                return frames
            except OSError:
                if frames:
                    return frames
                raise
            if count == 0 and len(self._left):
                if frames:
                    return frames
                raise ConnectionResetError("the other end is gone")
            self._left = self._left[count:]
            while not len(self._left) and (frame := self._next()) is not None:
                if frame:
                    frames.append(frame)

    def _begin(self) -> None:
        self._stage, self._left = 0, memoryview(self._prefix)

    def _next(self) -> tuple[bytes, bytearray] | tuple[()] | None:
        """Go on to the next part of a frame: the frame if that was its last, () if not, None to wait for more."""
        if self._stage == 0:
            header, body = _PREFIX.unpack(self._prefix)
            if self.most_bytes is not None and header + body > self.most_bytes:
                raise ConnectionAbortedError(f"a frame of {header + body} bytes, and {self.most_bytes} are the most")
            self._header, self._body, self._stage = bytearray(header), bytearray(body), 1
            self._left = memoryview(self._header)
            return None
        if self._stage == 1 and len(self._body):
            self._stage, self._left = 2, memoryview(self._body)
            return None
        frame = bytes(self._header), self._body
        self._begin()
        self._header, self._body = bytearray(), bytearray()
        return frame


def frame(serial: int, message: Any, *, body_at: Place | None = None) -> list[Any]:
    """A frame as buffers to send; with ``body_at`` the tensors lie there already."""
    header, tensors = pack((serial, body_at, message))
    if body_at is not None:
        return [_PREFIX.pack(len(header), 0), header]
    parts: list[Any] = [_PREFIX.pack(len(header), body_bytes(tensors)), header]
    for tensor in tensors:
        parts.append(raw(tensor))
        if gap := padded(tensor.nbytes) - tensor.nbytes:
            parts.append(bytes(gap))
    return [part for part in parts if len(part)]


def read_frame(header: bytes, body: bytearray, memory: "Memories") -> tuple[int, Any]:
    """The serial number and the message of a frame."""
    tree, shapes = json.loads(header)
    place = tree[2]  # of a tuple: its kind, then its items
    where = memory.at(*place[1:]) if place is not None else body
    serial, _, message = built(tree, shapes, where)
    return serial, message


class SharedMemory:
    """Memory of this process that others of the machine may map; it is gone with the last of them."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = max(n_bytes, mmap.PAGESIZE)
        self._file = os.memfd_create("paceline")
        os.ftruncate(self._file, self.n_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self._map = mmap.mmap(self._file, self.n_bytes)

    def place(self, at: int) -> Place:
        """For the other end."""
        return (self.path, self.n_bytes, at)

    def tensor(self, at: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Values that lie in it."""
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=at)

    def close(self) -> None:
        """Let it go: what others have mapped stays with them."""
        os.close(self._file)


class Memories:
    """Memory of other processes, as this one maps it."""

    def __init__(self) -> None:
        self._maps: dict[str, tuple[int, mmap.mmap]] = {}

    def at(self, path: str, n_bytes: int, at: int) -> memoryview:
        """From some place on."""
        inode = os.stat(path).st_ino  # a number of a descriptor may come to mean other memory
        if path not in self._maps or self._maps[path][0] != inode:
            descriptor = os.open(path, os.O_RDWR)
            try:
                self._maps[path] = inode, mmap.mmap(descriptor, n_bytes)
            finally:
                os.close(descriptor)
        return memoryview(self._maps[path][1])[at:]


def copy_into(where: memoryview, parts: Sequence[Tensor]) -> None:
    """Tensors one after the other, without gaps."""
    at = 0
    for part in parts:
        if part.numel():
            torch.frombuffer(where, dtype=part.dtype, count=part.numel(), offset=at).view(part.shape).copy_(part)
            at += part.nbytes


def without_delay(connection: socket.socket) -> socket.socket:
    """Small messages are sent at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def watched(connection: socket.socket) -> socket.socket:
    """The kernel finds out within half a minute that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def send_some(connection: socket.socket, out: deque[memoryview]) -> None:
    """Of what is to be sent take as much as a socket that does not block takes now."""
    try:
        while out:
            count = connection.send(out[0])
            out[0] = out[0][count:]
            if not len(out[0]):
                out.popleft()
    except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
        pass


def readable(connection: socket.socket, timeout_s: float | None = None) -> bool:
    """Whether something has come within so long; ``select.select`` knows only the first 1,024 open files."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(timeout_s))


def end_with_parent() -> None:
    """Be killed when the process that started this one dies."""
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG
