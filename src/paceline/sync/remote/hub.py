"""The server's end of the wire: clients connect, say who they are, and ask for work.

One thread does all, while a round gathers; between rounds clients wait. Everything that comes is from strangers until a
connection has shown a token: frames are small until then, nothing is unpickled, and no memory is shared.
"""

import json
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.errors import PlanError
from paceline.sync.remote.check import problem_of
from paceline.sync.remote.gathering import Gathering, Said
from paceline.sync.remote.keys import Tokens
from paceline.sync.secure.mean import MASKED
from paceline.sync.server import messages as m
from paceline.sync.server.wire import Inbox, Memories, frame, read_frame, send_some, watched, without_delay

_TICK_S = 0.2
_HELLO_BYTES = 1 << 16
_HELLO_S = 30.0
"""A connection that has not said who it is by then is closed."""
_REMIND_S = 60.0
Say = Callable[[str], None]
WorkOf = Callable[[int], m.Work]
"""From the number of a client to what it is to do."""


class NoMemories(Memories):
    """Of other machines: nobody tells this process what to map."""

    def at(self, path: str, n_bytes: int, at: int) -> memoryview:
        """Refuse."""
        raise ConnectionAbortedError("a message that lies in memory, from another machine")


@dataclass(eq=False)
class _Connection:
    socket: ssl.SSLSocket
    peer: str
    since: float
    inbox: Inbox = field(default_factory=lambda: Inbox(_HELLO_BYTES))
    out: deque[memoryview] = field(default_factory=deque)
    name: str | None = None
    is_greeted: bool = False
    closes: bool = False
    """When all is sent."""
    asked: tuple[int, Any] | None = None
    """Serial number and message that wait for an answer."""


class Hub:
    """Behind ``listening``. ``run``: what clients must have the same, as words by key.

    ``folder`` keeps who has how many rows.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: ssl.SSLContext,
        tokens: Tokens,
        *,
        run: Mapping[str, str],
        folder: Path,
        say: Say,
    ) -> None:
        self._listening, self._context, self._tokens = listening, context, tokens
        self._run, self._say = dict(run), say
        self._like: Mapping[str, Tensor] = {}
        self._file = folder / "clients.json"
        self._rows: dict[str, int] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._numbers: dict[str, int] = {}
        self._named: dict[str, _Connection] = {}
        self._memories = NoMemories()
        self._gathering: Gathering | None = None
        self._work: WorkOf | None = None
        self._end: m.End | None = None
        self._gone: set[str] = set()
        """Clients that were told of the end and have hung up since."""
        self._selector = selectors.DefaultSelector()
        listening.setblocking(False)
        self._selector.register(listening, selectors.EVENT_READ, None)

    def enrol(self, is_asked_to_stop: Callable[[], bool]) -> dict[str, int] | None:
        """Wait until every client has said how many rows it has: by name, in their order; None if asked to stop."""
        reminded = time.monotonic() - _REMIND_S + 5.0
        while missing := [name for name in self._tokens.names if name not in self._rows]:
            if time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                self._say(f"waiting for {_some(missing)} to connect for the first time")
            if is_asked_to_stop():
                return None
            self._turn()
        self._numbers = {name: number for number, name in enumerate(self._tokens.names)}
        return {name: self._rows[name] for name in self._tokens.names}

    def begin(self, like: Mapping[str, Tensor]) -> None:
        """All are known, and so is the model: updates have to be like its parameters."""
        self._like = like
        bytes_each = sum(8 * tensor.numel() + 256 for tensor in like.values())
        self._most_bytes = 2 * bytes_each + (1 << 20)
        for connection in self._named.values():
            connection.inbox.most_bytes = self._most_bytes

    def gather(
        self,
        gathering: Gathering,
        work: WorkOf,
        *,
        deadline_s: float | None,
        is_asked_to_stop: Callable[[], bool],
    ) -> bool:
        """Run a round until all that is waited for has come; False if asked to stop before."""
        self._gathering, self._work = gathering, work
        stage, begun = gathering.stage, time.monotonic()
        reminded = begun
        self._answer_all()
        while not gathering.is_over:
            if is_asked_to_stop():
                return False
            now = time.monotonic()
            if gathering.stage != stage:
                stage, begun, reminded = gathering.stage, now, now
            if deadline_s is not None and now - begun > deadline_s:
                gathering.advance(is_late=True)
                self._answer_all()
            if now - reminded > _REMIND_S:
                reminded = now
                names = {number: name for name, number in self._numbers.items()}
                self._say(f"round {gathering.step}: waiting for {_some([names[i] for i in gathering.missing])}")
            if not gathering.is_over:
                self._turn()
        self._answer_all()
        return True

    def end(self, weights: Mapping[str, Tensor], *, wait_s: float) -> None:
        """Tell everyone that the run is over, and its weights; those that are not there within ``wait_s`` miss it."""
        self._end = m.End(dict(weights))
        self._answer_all()
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if self._gone >= set(self._tokens.names):
                return
            self._turn()

    def close(self) -> None:
        """Hang up."""
        for connection in [key.data for key in self._selector.get_map().values() if key.data is not None]:
            self._close(connection)
        self._selector.close()

    # Sockets.

    def _turn(self) -> None:
        """Whatever has happened by now."""
        for key, events in self._selector.select(timeout=_TICK_S):
            if key.data is None:
                self._accept()
            else:
                self._serve(key.data, events)
        for key in list(self._selector.get_map().values()):
            own = key.data
            if own is not None and own.name is None and time.monotonic() - own.since > _HELLO_S:
                self._close(own)

    def _accept(self) -> None:
        with suppress(OSError):
            accepted, peer = self._listening.accept()
            accepted.setblocking(False)
            plain = watched(without_delay(accepted))
            wrapped = self._context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
            connection = _Connection(wrapped, peer[0], time.monotonic())
            self._selector.register(wrapped, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if not connection.is_greeted and not self._shake(connection):
                return
            if connection.out:
                self._flush(connection)
            for header, body in connection.inbox.receive(connection.socket):
                serial, message = _read(header, body, self._memories)
                self._heard(connection, serial, message)
        except (OSError, ValueError) as error:
            if connection.name is None and not isinstance(error, ConnectionResetError):
                self._say(f"a connection from {connection.peer} was refused: {' '.join(str(error).split())}")
            self._close(connection)

    def _shake(self, connection: _Connection) -> bool:
        """Go on with the handshake of TLS; whether it is done."""
        wanted = selectors.EVENT_READ
        try:
            connection.socket.do_handshake()
            connection.is_greeted = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            wanted = selectors.EVENT_WRITE
        self._selector.modify(connection.socket, wanted, connection)
        return connection.is_greeted

    def _flush(self, connection: _Connection) -> None:
        send_some(connection.socket, connection.out)
        if connection.closes and not connection.out:
            self._close(connection)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.out else 0)
        self._selector.modify(connection.socket, wanted, connection)

    def _close(self, connection: _Connection) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.name is not None and self._named.get(connection.name) is connection:
            del self._named[connection.name]
            if self._end is not None and connection.asked is None and not connection.out:
                self._gone.add(connection.name)

    # Messages.

    def _heard(self, connection: _Connection, serial: int, message: Any) -> None:
        if connection.name is None:
            self._post(connection, serial, self._greeted(connection, message))
            return
        if isinstance(message, m.Hello):
            raise ConnectionAbortedError("said hello twice")
        connection.asked = serial, message
        stage = None if self._gathering is None else self._gathering.stage
        self._answer(connection)
        if self._gathering is not None and self._gathering.stage != stage:
            self._answer_all()

    def _greeted(self, connection: _Connection, hello: Any) -> m.Welcome | m.Refused:
        """Who a connection is from."""
        if not isinstance(hello, m.Hello) or not isinstance(hello.name, str) or not isinstance(hello.token, str):
            raise ConnectionAbortedError("the first message was no hello")
        connection.closes = True
        if not self._tokens.admits(hello.name, hello.token):
            self._say(f"a client from {connection.peer} was refused: the token of {hello.name[:64]!r} is wrong")
            return m.Refused(f"the server does not know {hello.name!r} by this token")
        if problem := self._differs(hello):
            self._say(f"{hello.name} was refused: {problem}")
            return m.Refused(problem)
        connection.closes = False
        connection.name = hello.name
        if self._like:
            connection.inbox.most_bytes = self._most_bytes
        if (older := self._named.get(hello.name)) is not None:
            self._close(older)
        self._named[hello.name] = connection
        if hello.name not in self._rows:
            self._rows[hello.name] = hello.rows
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._rows, indent=1))
            temporary.replace(self._file)
        self._say(f"{hello.name} is here, with {hello.rows} rows")
        return m.Welcome(len(self._tokens.names))

    def _differs(self, hello: m.Hello) -> str | None:
        """Why a client cannot take part in this run, or None."""
        for key, own in self._run.items():
            if (theirs := dict(hello.run).get(key)) != own:
                return f"the server runs {key}={own}, and {hello.name} {key}={theirs}. Use the same config file"
        if (known := self._rows.get(hello.name, hello.rows)) != hello.rows:
            return f"{hello.name} had {known} rows at first and has {hello.rows} now. Use the data of before"
        if not isinstance(hello.rows, int) or hello.rows < 1:
            return f"{hello.name} has no row to learn from"
        return None

    def _problem(self, said: Any) -> str | None:
        """Why what a client said cannot be taken, or None."""
        gathering = self._gathering
        like = self._like
        if gathering is not None and gathering.is_secure:
            numel = sum(tensor.numel() for tensor in like.values())
            like = {MASKED: torch.empty(4 * numel, dtype=torch.uint8, device="meta")}
        return problem_of(said, like)

    def _answer_all(self) -> None:
        """Until nothing more follows from what has been said."""
        while True:
            stage = None if self._gathering is None else self._gathering.stage
            for connection in list(self._named.values()):
                self._answer(connection)
            if self._gathering is None or self._gathering.stage == stage:
                return

    def _answer(self, connection: _Connection) -> None:
        """Answer what waits, if there is an answer by now."""
        if connection.asked is None or connection.name is None:
            return
        serial, message = connection.asked
        answer = self._answer_to(connection.name, message)
        if answer is not None:
            connection.asked = None
            with suppress(OSError):
                self._post(connection, serial, answer)

    def _answer_to(self, name: str, message: Any) -> Any:
        if self._end is not None:
            return self._end
        gathering, number = self._gathering, self._numbers.get(name)
        if gathering is None or number is None:
            return None
        if problem := self._problem(message):
            self._say(f"what {name} sent was refused: {problem}")
            return m.Refused(problem)
        if isinstance(message, m.Next):
            assert self._work is not None
            is_next = message.after != gathering.step and gathering.wants(number)
            return self._work(number) if is_next else None
        said: Said = message
        gathering.receive(number, said)
        return gathering.answer(number, said)

    def _post(self, connection: _Connection, serial: int, answer: Any) -> None:
        for buffer in frame(serial, answer):
            view = memoryview(buffer)
            # What has to wait must not change meanwhile, as parameters do.
            connection.out.append(view if view.readonly else memoryview(bytes(view)))
        self._flush(connection)


def listen(words: str) -> socket.socket:
    """A socket at HOST:PORT; ``PlanError`` if it cannot be had."""
    host, port = address(words, "--listen")
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise PlanError(f"--listen {words} cannot be opened: {error.strerror or error}; choose another port") from None


def address(words: str, option: str) -> tuple[str, int]:
    """HOST:PORT."""
    host, colon, port = words.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise PlanError(f"{option} {words}: expected HOST:PORT, such as 0.0.0.0:7440")
    return host.strip("[]"), int(port)


def _read(header: bytes, body: bytearray, memories: Memories) -> tuple[int, Any]:
    """A frame from another machine; ``ConnectionAbortedError`` for what is none."""
    try:
        return read_frame(header, body, memories)
    except OSError:
        raise
    except Exception as error:  # whatever strangers send
        raise ConnectionAbortedError(f"a message that cannot be read ({type(error).__name__})") from None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
