"""A client's end of the wire: it asks, and asks again in the same words where a connection broke."""

import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from paceline.errors import LinkError
from paceline.sync.remote.hub import NoMemories
from paceline.sync.server import messages as m
from paceline.sync.server.wire import Inbox, frame, read_frame, readable, watched, without_delay

_AGAIN_S = (0.05, 5.0)
"""Before the next try to connect: at first, and at most; it doubles."""
_SHAKE_S = 30.0


class Server:
    """The server at ``address``, whose certificate ``context`` checks. ``hello`` is said first on each connection.

    ``LinkError`` if it refuses this client, is not who it should be, or is away for ``patience_s``.
    """

    def __init__(
        self,
        address: tuple[str, int],
        context: ssl.SSLContext,
        hello: m.Hello,
        *,
        patience_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._address, self._context, self._hello = address, context, hello
        self._patience_s, self._say = patience_s, say
        self._connection: ssl.SSLSocket | None = None
        self._inbox = Inbox()
        self._serial = 0
        self._memories = NoMemories()

    def ask(self, request: Any) -> Any:
        """The answer, whenever it comes."""
        while True:
            if self._connection is None:
                self._connect()
            try:
                answer = self._asked(request)
            except OSError as error:
                self._say(f"the connection to {self._at} broke ({_words(error)}): asking again")
                self.close()
                continue
            if isinstance(answer, m.Refused):
                raise LinkError(f"the server at {self._at} refused: {answer.reason}")
            return answer

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._inbox = None, Inbox()

    @property
    def _at(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def _connect(self) -> None:
        """Connect and say hello; tries for as long as there is patience."""
        pause_s, most_s = _AGAIN_S
        deadline = time.monotonic() + self._patience_s
        told = False
        while True:
            try:
                plain = watched(without_delay(socket.create_connection(self._address, timeout=_SHAKE_S)))
                self._connection = self._context.wrap_socket(plain, server_hostname=self._address[0])
                answer = self._asked(self._hello)
            except ssl.SSLCertVerificationError as error:
                raise LinkError(
                    f"the server at {self._at} is not the one that ca.pem knows: {error.verify_message}"
                ) from None
            except OSError as error:
                self.close()
                if time.monotonic() > deadline:
                    raise LinkError(
                        f"the server at {self._at} was away for {self._patience_s:g} s: {_words(error)}"
                    ) from None
                if not told:
                    self._say(f"the server at {self._at} is not there ({_words(error)}): waiting for it")
                told = True
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, most_s)
                continue
            if isinstance(answer, m.Refused):
                self.close()
                raise LinkError(f"the server at {self._at} refused: {answer.reason}")
            return

    def _asked(self, request: Any) -> Any:
        connection = self._connection
        assert connection is not None
        self._serial += 1
        connection.settimeout(None)
        for buffer in frame(self._serial, request):
            connection.sendall(buffer)
        connection.setblocking(False)
        while True:
            for header, body in self._inbox.receive(connection):
                serial, answer = read_frame(header, body, self._memories)
                if serial == self._serial:
                    return answer
            readable(connection)


def _words(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split()) or type(error).__name__
