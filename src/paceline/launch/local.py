"""The ranks of a run as processes of this machine, watched by the one that started them."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous
from paceline.errors import WorkerError
from paceline.workers.process import Child, Line, Message, told_error, torch_start_method

RankMain = Callable[[Coordinates, Rendezvous, Line], None]
_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One started rank."""

    coordinates: Coordinates
    pid: int
    log: Path


class Servers(Protocol):
    """What is started beside the ranks, and ends with them."""

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where ranks find them."""
        ...

    def __call__(self, line: Line) -> None:
        """Run, in a process of its own."""


class LocalRun:
    """A run's ranks on this machine.

    ``messages()`` yields what they send until all have finished. If one dies or reports an error the others are ended
    and ``WorkerError`` (or the rank's own message) names it; nothing is left running. The first Ctrl-C or SIGTERM asks
    the ranks to stop; a Ctrl-C after that ends them at once, with ``KeyboardInterrupt``. ``is_elastic``: a replica of
    which a rank dies is ended alone, unless it is the first, and a message says so.
    """

    def __init__(
        self,
        main: RankMain,
        coordinates: Sequence[Coordinates],
        *,
        port: int,
        logs: Path,
        debug: bool = False,
        servers: Servers | None = None,
        is_elastic: bool = False,
    ) -> None:
        self._is_elastic = is_elastic
        # All are forked before this process has any thread: the store's is started after them.
        self._beside: list[Child] = []
        if servers is not None:
            log = logs / "parameter-servers.log"
            self._beside = [Child("the parameter servers", servers, log, method=torch_start_method(), debug=debug)]
        self._children = {
            c.global_rank: Child(
                f"rank {c.global_rank} (replica {c.replica})",
                _RankStart(main, c),
                logs / f"rank-{c.global_rank:04d}.log",
                method=torch_start_method(),
                debug=debug,
            )
            for c in coordinates
        }
        self.ranks = [
            Rank(
                coordinates=c, pid=self._children[c.global_rank].process.pid or 0, log=self._children[c.global_rank].log
            )
            for c in coordinates
        ]
        try:
            self._store = Rendezvous(port=port).host_store()
        except BaseException:
            self.kill()
            raise
        addresses = servers.addresses if servers is not None else []
        for child in self._children.values():
            child.line.send("store", port=self._store.port, servers=addresses)
        self._abandoned = False

    def messages(self) -> Iterator[tuple[int, Message]]:
        """What the ranks send, as (global rank, message), until all have finished."""
        with signals(self.stop, self.abandon):
            while pending := {r: c for r, c in self._children.items() if not c.finished}:
                yield from self._receive(pending)
                if self._abandoned:
                    raise KeyboardInterrupt
                yield from self._lose()
                self._raise_failures()
        for child in self._children.values():
            child.process.join(_GRACE_S)
        self.kill()

    def stop(self) -> None:
        """Ask every rank to finish its step, save and exit."""
        for child in self._children.values():
            if child.process.is_alive():
                child.process.terminate()

    def kill(self) -> None:
        """End every rank at once, and what runs beside them."""
        every = [*self._children.values(), *self._beside]
        for child in every:
            child.process.kill()
        for child in every:
            child.process.join()

    def _receive(self, pending: dict[int, Child]) -> Iterator[tuple[int, Message]]:
        by_handle = {child.line.connection: (rank, child) for rank, child in pending.items()}
        by_handle |= {child.line.connection: (-1, child) for child in self._beside if not child.finished}
        for handle in wait(list(by_handle), timeout=1.0):
            rank, child = by_handle[handle]  # type: ignore[index]
            try:
                message = child.line.receive()
            except (EOFError, ConnectionResetError):
                child.process.join()
                child.finished = True
                if child.error is None:
                    child.error = {"message": f"{child.name} died: {child.death()}", "died": True}
                continue
            if message["kind"] == "finished":
                child.finished = True
            elif message["kind"] == "error":
                child.error = message
                child.finished = True
            else:
                yield rank, message

    def _lose(self) -> Iterator[tuple[int, Message]]:
        """Go on without replicas of which a rank has died, where that can be."""
        replica_of = {rank.coordinates.global_rank: rank.coordinates.replica for rank in self.ranks}
        dead = {replica_of[r]: child for r, child in self._children.items() if child.error and child.error.get("died")}
        for replica, child in dead.items():
            if not self._is_elastic or replica == 0:
                continue
            assert child.error is not None
            message = f"{child.error['message']}; the others go on without replica {replica}. Its log: {child.log}"
            for rank, other in self._children.items():
                if replica_of[rank] == replica:
                    other.process.kill()
                    other.finished, other.error = True, None
            yield 0, {"kind": "lost", "message": message}

    def _raise_failures(self) -> None:
        for child in self._beside:
            if child.error:
                self.kill()
                raise told_error({"expected": True, "type": "WorkerError", "traceback": None, **child.error}, child.log)
        if not any(child.error for child in self._children.values()):
            return
        self._collect_errors()
        self.kill()
        failed = [(rank, child) for rank, child in self._children.items() if child.error]
        _, child = min(failed, key=lambda item: (_blame(item[1]), item[0]))
        assert child.error is not None
        if child.error.get("died"):
            raise WorkerError(f"{child.error['message']}; the other ranks were ended. Its log: {child.log}")
        raise told_error(child.error, child.log)

    def _collect_errors(self) -> None:
        """Give the other ranks a moment to say what they know: the first to speak is seldom the one at fault."""
        deadline = time.monotonic() + _GRACE_S
        while (left := deadline - time.monotonic()) > 0:
            pending = {r: c for r, c in self._children.items() if not c.finished}
            if not pending or any(c.error and _blame(c) == 0 for c in self._children.values()):
                return
            if wait([c.line.connection for c in pending.values()], timeout=min(left, 0.2)):
                for _ in self._receive(pending):
                    pass

    def abandon(self) -> None:
        """End all at once; ``messages`` raises ``KeyboardInterrupt``."""
        self._abandoned = True
        self.kill()


@contextmanager
def signals(stop: Callable[[], None], abandon: Callable[[], None]) -> Iterator[None]:
    """While it lasts, the first Ctrl-C or SIGTERM calls ``stop``, and a Ctrl-C after that ``abandon``."""
    count = 0

    def ask(number: int, _: object) -> None:
        nonlocal count
        count += 1
        if count > 1 and number == signal.SIGINT:
            abandon()
        else:
            stop()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _RankStart:
    """Waits for the store's port, then runs the rank. A class, so that a spawned process can receive it."""

    main: RankMain
    coordinates: Coordinates

    def __call__(self, line: Line) -> None:
        os.environ["LOCAL_RANK"] = str(self.coordinates.local_rank)
        message = line.receive()
        servers = tuple((host, port) for host, port in message["servers"])
        self.main(self.coordinates, Rendezvous(port=message["port"], servers=servers), line)


def _blame(child: Child) -> int:
    """Lower is nearer the cause: a death or an error of its own, before the loss of a peer."""
    assert child.error is not None
    if child.error.get("died") or child.error.get("type") not in {"LinkError", "NonFiniteElsewhere"}:
        return 0
    return 1
