"""Long-lived processes that run a function on several ranks at once: for proofs and tests.

Importing torch and transformers takes seconds; a pool pays for it once, in a fork server from which workers are forked.
"""

import itertools
import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from paceline.errors import WorkerError

PRELOAD = ("torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama")
CALLS = 8
"""After so many a worker is replaced: groups of torch.distributed leave threads behind, which take turns for ever."""


@dataclass(frozen=True)
class Member:
    """What a function on the pool knows of itself: its index, how many run it, and a store of their own."""

    index: int
    size: int
    store: Store


class Pool:
    """Up to ``size`` workers on the processor, one thread each; a worker that dies is replaced before the next call.

    ``preload`` names modules that functions will need; the first pool of a process says it for all.
    """

    def __init__(self, size: int, preload: tuple[str, ...] = ()) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, *preload])
        self._calls = itertools.count()
        self._workers = [self._start() for _ in range(size)]
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(self, function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call ``function(member, *arguments)`` on ``ranks`` workers at once; their results in the order of the ranks.

        ``function`` is importable by name. Raises ``WorkerError`` with the worker's traceback, or when one dies or
        the time is over; the workers of a failed call are replaced.
        """
        call = next(self._calls)
        assert ranks <= len(self._workers), f"the pool has {len(self._workers)} workers, {ranks} were asked for"
        for index in range(ranks):
            if self._workers[index].calls == CALLS:
                self._replace(index)
        members = self._workers[:ranks]
        for index, worker in enumerate(members):
            worker.calls += 1
            worker.connection.send((function, index, ranks, self._store.port, call, timeout_s, arguments))
        results: dict[int, Any] = {}
        try:
            while missing := {w.connection: i for i, w in enumerate(members) if i not in results}:
                ready = wait(list(missing), timeout=timeout_s)
                if not ready:
                    raise WorkerError(f"ranks {sorted(missing.values())} gave no result within {timeout_s:g} s")
                for connection in ready:
                    index = missing[connection]  # type: ignore[index]
                    ok, value = self._receive(members[index], index)
                    if not ok:
                        raise WorkerError(f"rank {index} of the pool: {value}")
                    results[index] = value
        except WorkerError:
            for index in range(ranks):
                self._replace(index)
            raise
        return [results[i] for i in range(ranks)]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> "_Worker":
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _replace(self, index: int) -> None:
        self._workers[index].process.kill()
        self._workers[index].process.join()
        self._workers[index] = self._start()

    @staticmethod
    def _receive(worker: "_Worker", index: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            raise WorkerError(f"rank {index} of the pool died with exit code {worker.process.exitcode}") from None
        return answer


@dataclass
class _Worker:
    process: Any
    connection: Connection
    calls: int = 0


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, index, size, port, call, timeout_s, arguments = connection.recv()
        except EOFError:
            return
        try:
            store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
            value = function(Member(index, size, PrefixStore(f"call/{call}", store)), *arguments)
            connection.send((True, value))
        except BaseException:
            connection.send((False, traceback.format_exc()))
