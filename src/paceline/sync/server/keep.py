"""Who keeps servers alive: threads of this process, or processes that are started again when they die."""

import os
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Self

import torch

from paceline.errors import LinkError
from paceline.sync.server.files import DamagedLog
from paceline.sync.server.serve import Address, Durability, Server
from paceline.sync.server.wire import end_with_parent

_MOST_DEATHS = 100
_DAMAGED = "damaged.txt"
"""In the folder of the logs: why a server cannot come back."""


def listen(servers: int, host: str = "127.0.0.1") -> list[socket.socket]:
    """Sockets for so many servers, each at a free port."""
    return [socket.create_server((host, 0), backlog=128) for _ in range(servers)]


def address(listening: socket.socket) -> Address:
    """Where it is."""
    host, port = listening.getsockname()[:2]
    return host, port


class ServerThreads:
    """Servers in threads of this process: where nobody started processes for them. They end with it."""

    def __init__(self, servers: int, host: str = "127.0.0.1", durability: Durability | None = None) -> None:
        self._sockets = listen(servers, host)
        durability = durability or Durability()
        self.addresses = [address(listening) for listening in self._sockets]
        self._servers = [
            Server(i, listening, self.addresses[0], _own(durability, i)) for i, listening in enumerate(self._sockets)
        ]
        self._threads = [threading.Thread(target=server.run, daemon=True) for server in self._servers]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End them."""
        for server in self._servers:
            with suppress(OSError):
                server.stop()
        for thread, listening in zip(self._threads, self._sockets, strict=True):
            thread.join()
            listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ServerProcesses:
    """Servers in processes of their own, which are started again when they die; to be called in a process beside the
    ranks. The sockets are made here, so that their addresses are known before."""

    def __init__(self, servers: int, durability: Durability, host: str = "127.0.0.1") -> None:
        self._sockets, self._durability = listen(servers, host), durability

    @property
    def addresses(self) -> list[Address]:
        """Where they listen."""
        return [address(listening) for listening in self._sockets]

    def __call__(self, line: object) -> None:
        """Keep them, until this process is ended."""
        keep_processes(self._sockets, self._durability)

    def close(self) -> None:
        """Let the sockets of this process go."""
        for listening in self._sockets:
            listening.close()


def keep_processes(sockets: Sequence[socket.socket], durability: Durability) -> None:
    """Fork a server for each socket and fork it again when it dies, until this process is told to end (SIGTERM).

    The process must have no threads. A death without a log is the end, and so is a log that is damaged: ``LinkError``.
    """
    children: dict[int, int] = {}

    def end(*_: object) -> None:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    for number in range(len(sockets)):
        children[_fork(number, sockets, durability)] = number
    for _ in range(_MOST_DEATHS):
        pid, status = os.wait()
        number = children.pop(pid)
        how = os.waitstatus_to_exitcode(status)
        print(f"parameter server {number} (pid {pid}) died: {how}", flush=True)
        if durability.folder is None:
            raise LinkError(f"parameter server {number} died (exit code {how}) and kept no log")
        if (words := durability.folder / _DAMAGED).exists():
            raise LinkError(f"parameter server {number} cannot come back: {words.read_text(encoding='utf-8')}")
        children[_fork(number, sockets, durability)] = number
    raise LinkError(f"parameter servers died {_MOST_DEATHS} times; see their log")


def _fork(number: int, sockets: Sequence[socket.socket], durability: Durability) -> int:
    pid = os.fork()
    if pid:
        print(f"parameter server {number}: pid {pid}", flush=True)
        return pid
    try:
        end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        Server(number, sockets[number], address(sockets[0]), _own(durability, number)).run()
    except DamagedLog as error:
        assert durability.folder is not None
        (durability.folder / _DAMAGED).write_text(str(error), encoding="utf-8")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def _own(durability: Durability, number: int) -> Durability:
    folder = durability.folder
    return durability if folder is None else replace(durability, folder=folder / f"server-{number}")
