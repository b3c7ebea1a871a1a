"""One server at work: a shard, and the coordinator with the first, behind one listening socket.

One thread answers one request after the other, so the logic needs no locks. The listening socket belongs to whoever
started the server: it outlives a server that dies, and workers that connect meanwhile wait in it for the next one.
"""

import json
import selectors
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paceline.config import choose
from paceline.registry import OPTIMIZERS
from paceline.sync.server import messages as m
from paceline.sync.server.coordinator import Coordinator, Out
from paceline.sync.server.delayed_nesterov import DelayedNesterov, PushStore
from paceline.sync.server.files import FileLog
from paceline.sync.server.leases import Leases
from paceline.sync.server.local import LocalCoordinator
from paceline.sync.server.log import Log
from paceline.sync.server.mixed import MixedStore, store
from paceline.sync.server.place import Places
from paceline.sync.server.rules import Rules
from paceline.sync.server.shard import ServerShard
from paceline.sync.server.store import Delay, TensorStore
from paceline.sync.server.wire import Inbox, Memories, copy_into, frame, read_frame, send_some, watched, without_delay

Address = tuple[str, int]
_HERE = ("here", 0)
"""Whose answer it is that the shard beside the coordinator waits for."""
_RETRY_S = 0.2
_SNAPSHOT_TIMES = 8
"""A log may become so many times longer than the parameters are, before they are written anew."""


@dataclass
class _Connection:
    socket: socket.socket
    inbox: Inbox = field(default_factory=Inbox)
    out: deque[memoryview] = field(default_factory=deque)
    is_ours: bool = False
    """To the coordinator: answers come from it."""


@dataclass(frozen=True, kw_only=True)
class Durability:
    """Where a server keeps its log, if it does."""

    folder: Path | None = None
    fsync: bool = False


class Server:
    """Server number ``number``; ``coordinator`` is where the first one listens."""

    def __init__(self, number: int, listening: socket.socket, coordinator: Address, durability: Durability) -> None:
        self.number = number
        self._coordinator_at, self._durability = coordinator, durability
        self._selector = selectors.DefaultSelector()
        self._memories = Memories()
        self._coordinator: Coordinator | None = None
        self._store: TensorStore | MixedStore
        self._shard: ServerShard | None = None
        self._upstream: _Connection | None = None
        self._leases = Leases(None, {}, 0.0)
        self._asked = 0.0
        self._serial = 0
        self._stopped = False
        self._bell, self._stop = socket.socketpair()
        listening.setblocking(False)
        self._selector.register(listening, selectors.EVENT_READ, None)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self._listening = listening
        folder = durability.folder
        if folder is not None and any((folder / "shard").glob("snapshot-*.bin")):  # else it died before it was filled
            self._build(json.loads((folder / "setup.json").read_text(encoding="utf-8")))

    def stop(self) -> None:
        """End ``run``, from another thread."""
        self._stopped = True
        self._stop.send(b"!")

    def run(self) -> None:
        """Answer until told to stop."""
        try:
            self._follow_on()
            while not self._stopped:
                for key, events in self._selector.select(timeout=_RETRY_S):
                    if key.fileobj is self._listening:
                        self._accept()
                    elif key.data is not None:
                        self._serve(key.data, events)
                for worker, life in self._leases.over(time.monotonic()):
                    assert self._coordinator is not None
                    print(f"worker {worker} is gone: others do not wait for it any more", flush=True)
                    self._answer(self._coordinator.handle(None, m.Leave(worker, life)))
                if self._upstream is None:
                    self._follow_on()
        finally:
            for key in list(self._selector.get_map().values()):
                if key.fileobj is not self._listening:
                    key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            self._stop.close()

    # Sockets.

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            accepted, _ = self._listening.accept()
            self._open(_Connection(watched(without_delay(accepted))))

    def _open(self, connection: _Connection) -> None:
        connection.socket.setblocking(False)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _close(self, connection: _Connection) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        self._leases.hung_up(connection, time.monotonic())
        if connection is self._upstream:
            self._upstream = None

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(connection)
            if events & selectors.EVENT_READ:
                for header, body in connection.inbox.receive(connection.socket):
                    serial, message = read_frame(header, body, self._memories)
                    if connection.is_ours:
                        self._answered(message)
                    else:
                        self._answer(self._handled((connection, serial), message))
        except OSError:
            self._close(connection)

    def _post(self, connection: _Connection, buffers: list[Any]) -> None:
        connection.out.extend(map(memoryview, buffers))
        self._flush(connection)
        for i, view in enumerate(connection.out):
            if not view.readonly:  # what has to wait must not change meanwhile, as parameters do
                connection.out[i] = memoryview(bytes(view))

    def _flush(self, connection: _Connection) -> None:
        send_some(connection.socket, connection.out)
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.out else 0)
        self._selector.modify(connection.socket, wanted, connection)

    # Requests.

    def _handled(self, to: Any, request: Any) -> Out:
        try:
            return self._handle(to, request)
        except Exception as error:  # this server is at its end: who asked is told why
            self._answer([(to, m.Refused(f"{type(error).__name__}: {error}"))])
            raise

    def _handle(self, to: Any, request: Any) -> Out:
        match request:
            case m.Setup():
                self._set_up(request)
                return [(to, m.Done())]
            case m.Ask():
                return [(to, m.Done(self._told()))]
        if self._shard is None:
            return [(to, m.Refused("this server has not been set up"))]
        match request:
            case m.Fill(key, payload):
                self._store.fill(key, payload)
                return [(to, m.Done())]
            case m.Ready(scalars):
                self._store.set_scalars(scalars)
                self._shard.keep()
                return [(to, m.Done())]
            case m.Stage():
                return self._shard.handle(to, request)
            case m.Pull():
                # Where the answer goes in shared memory is for this class, not for the logic.
                return self._shard.handle((to, request.payload[2]), request)
        assert self._coordinator is not None, f"server {self.number} was asked {request}"
        match request:
            case m.Join(worker, life) | m.Turn(worker, life) | m.Commit(m.Push(worker, life)):
                self._leases.heard(worker, life, to[0])
        return self._coordinator.handle(to, request)

    def _answer(self, out: Out) -> None:
        """Send answers; what they mean for the shard beside the coordinator is done here too, and sent."""
        waiting = deque(out)
        while waiting:
            to, answer = waiting.popleft()
            if to is None:
                continue
            if to == _HERE:
                assert self._shard is not None and self._coordinator is not None
                assert isinstance(answer, m.Entries)
                waiting.extend(self._shard.follow(answer))
                waiting.extend(self._coordinator.handle(_HERE, self._shard.next_fetch()))
                continue
            if isinstance(to[0], tuple):  # of a pull
                to, place = to
                if place is not None and isinstance(answer, m.Values):
                    try:
                        copy_into(self._memories.at(*place), answer.payload)
                    except OSError:  # who asked is dead, and its memory gone
                        continue
                    answer = m.Values(answer.version, None)
            connection, serial = to
            if connection.socket.fileno() >= 0:
                try:
                    self._post(connection, frame(serial, answer))
                except OSError:
                    self._close(connection)

    # The order of things, from the coordinator.

    def _follow_on(self) -> None:
        """Ask the coordinator, wherever it is, for what comes next."""
        if self._shard is None:
            return
        if self._coordinator is not None:
            self._answer(self._coordinator.handle(_HERE, self._shard.next_fetch()))
            return
        now = time.monotonic()
        if now - self._asked < _RETRY_S:
            return
        self._asked = now
        try:
            upstream = without_delay(socket.create_connection(self._coordinator_at, timeout=_RETRY_S * 10))
        except OSError:
            return
        self._upstream = _Connection(upstream, is_ours=True)
        self._open(self._upstream)
        self._fetch()

    def _fetch(self) -> None:
        assert self._shard is not None
        self._serial += 1
        if self._upstream is not None:
            try:
                self._post(self._upstream, frame(self._serial, self._shard.next_fetch()))
            except OSError:
                self._close(self._upstream)

    def _answered(self, message: Any) -> None:
        assert self._shard is not None
        if isinstance(message, m.Entries):
            self._answer(self._shard.follow(message))
            self._fetch()
        elif self._upstream is not None:  # it has not been set up yet: ask again in a while
            self._close(self._upstream)

    # Beginning.

    def _set_up(self, request: m.Setup) -> None:
        folder = self._durability.folder
        options = {"life": request.life, **request.options}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*/*.bin"):
                old.unlink()
            (folder / "setup.json").write_text(json.dumps(options), encoding="utf-8")
        self._build(options)
        if self._upstream is not None:
            self._close(self._upstream)
        self._asked = 0.0
        self._follow_on()

    def _build(self, options: Mapping[str, Any]) -> None:
        rules = Rules.of(options["rules"])
        shapes = {name: tuple(shape) for name, shape in options["shapes"].items()}
        dtype = getattr(torch, options["dtype"])
        tables = frozenset(options["tables"])
        places = Places(shapes, rules.shards, dtype.itemsize, options["largest_bytes"], tables)
        pieces = places.pieces[self.number]
        ndims = {name: len(shape) for name, shape in shapes.items()}
        if rules.local is not None:
            self._store = PushStore(pieces, ndims, DelayedNesterov(**options["optimizer"]), dtype)
        else:
            optimizer: Any = choose(OPTIMIZERS, options["optimizer"])
            self._store = store(pieces, ndims, optimizer, dtype, Delay(**options["delay"]), tables)
        size = dtype.itemsize * sum(piece.numel for piece in pieces)
        self._shard = ServerShard(
            self.number, self._store, self._log("shard", _SNAPSHOT_TIMES * size), first_life=options["life"]
        )
        if self.number == 0:
            kind = Coordinator if rules.local is None else LocalCoordinator
            self._coordinator = kind(rules, self._log("coordinator", 1 << 20), first_life=options["life"])
            self._leases = Leases(options["lease_s"], self._coordinator.heard_of, time.monotonic())

    def _log(self, name: str, longest_bytes: int) -> Log | None:
        folder = self._durability.folder
        if folder is None:
            return None
        return FileLog(folder / name, longest_bytes=longest_bytes + (1 << 20), fsync=self._durability.fsync)

    def _told(self) -> dict[str, Any]:
        return {
            **(self._coordinator.told() if self._coordinator is not None else {}),
            "lives": dict(self._coordinator.heard_of) if self._coordinator is not None else {},
            "version": self._shard.version if self._shard is not None else 0,
            "kept": self._store.kept() if self._shard is not None else {},
        }
