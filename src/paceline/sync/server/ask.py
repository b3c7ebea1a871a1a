"""One rank's connections to the servers: it asks, and asks again where a connection broke, with the same words."""

import socket
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from paceline.errors import LinkError
from paceline.sync.server import messages as m
from paceline.sync.server.client import Asked, Exchange
from paceline.sync.server.codec import values_bytes
from paceline.sync.server.serve import Address
from paceline.sync.server.wire import Inbox, Memories, Place, frame, read_frame, readable, without_delay

T = TypeVar("T")
_AGAIN_S = 0.02


class Caller:
    """Drives exchanges with servers at ``addresses``; ``LinkError`` if one does not answer within ``timeout_s``."""

    def __init__(self, addresses: Sequence[Address], *, timeout_s: float) -> None:
        self._addresses, self._timeout_s = list(addresses), timeout_s
        self._connections: dict[int, tuple[socket.socket, Inbox]] = {}
        self._serial = 0
        self._memories = Memories()
        self.sent_bytes = 0
        """Bytes of tensors in all requests, and of numbers of rows; also where they lie in memory that is shared."""

    def run(self, exchange: Exchange[T], *, bodies: Sequence[Place] | None = None) -> T:
        """The result of an exchange. ``bodies``: where the tensors of each request already lie, if they do."""
        try:
            asked = next(exchange)
            while True:
                asked = exchange.send(self.ask(asked, bodies=bodies))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def ask(self, asked: Asked, *, bodies: Sequence[Place] | None = None) -> list[m.Answer]:
        """Answers to some requests, which are on their way at the same time."""
        deadline = time.monotonic() + self._timeout_s
        waiting: dict[int, tuple[int, list[Any]]] = {}
        for i, (server, request) in enumerate(asked):
            self._serial += 1
            body_at = bodies[i] if bodies is not None else None
            waiting[self._serial] = (max(0, server), frame(self._serial, request, body_at=body_at))
            if isinstance(request, m.Stage | m.Fill):
                self.sent_bytes += values_bytes(request.payload)
            elif isinstance(request, m.Pull):
                self.sent_bytes += sum(ids.nbytes for _, ids in request.payload[3] if ids is not None)
        serials, answers = list(waiting), {}
        for serial, (server, buffers) in waiting.items():
            self._send(server, buffers, waiting, serial, deadline)
        while waiting:
            for server in {server for server, _ in waiting.values()}:
                for serial, answer in self._receive(server, waiting, deadline):
                    if waiting.pop(serial, None) is not None:
                        answers[serial] = answer
        return [answers[serial] for serial in serials]

    def close(self) -> None:
        """Hang up."""
        for connection, _ in self._connections.values():
            connection.close()
        self._connections.clear()

    def _send(self, server: int, buffers: list[Any], waiting: dict[int, Any], serial: int, deadline: float) -> None:
        """Send one request, and those before it that a broken connection may have lost."""
        while True:
            if server not in self._connections:
                self._connect(server, deadline)
                buffers = [b for s, (to, each) in waiting.items() if to == server and s <= serial for b in each]
            connection, _ = self._connections[server]
            try:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                for buffer in buffers:
                    connection.sendall(buffer)
                connection.setblocking(False)
                return
            except OSError as error:
                self._lost(server, error, deadline)

    def _receive(self, server: int, waiting: dict[int, Any], deadline: float) -> list[tuple[int, Any]]:
        connection, inbox = self._connections[server]
        try:
            if not readable(connection, max(0.0, deadline - time.monotonic())):
                raise LinkError(
                    f"parameter server {server} at {self._at(server)} did not answer within {self._timeout_s:g} s; see "
                    "its log, and that of the slowest replica"
                )
            return [read_frame(header, body, self._memories) for header, body in inbox.receive(connection)]
        except OSError as error:
            self._lost(server, error, deadline)
            last = max(serial for serial, (to, _) in waiting.items() if to == server)
            self._send(server, [], waiting, last, deadline)
            return []

    def _lost(self, server: int, error: OSError, deadline: float) -> None:
        connection, _ = self._connections.pop(server)
        connection.close()
        if time.monotonic() > deadline:
            raise LinkError(f"parameter server {server} at {self._at(server)}: {error}") from error

    def _connect(self, server: int, deadline: float) -> None:
        while True:
            try:
                connection = socket.create_connection(self._addresses[server], timeout=self._timeout_s)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LinkError(f"parameter server {server} at {self._at(server)}: {error}") from error
                time.sleep(_AGAIN_S)
                continue
            self._connections[server] = without_delay(connection), Inbox()
            return

    def _at(self, server: int) -> str:
        host, port = self._addresses[server]
        return f"{host}:{port}"
