"""Parameter servers in processes of their own, for tests that kill them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paceline.sync.server.keep import ServerProcesses
from paceline.sync.server.serve import Address, Durability


@contextmanager
def processes(servers: int, folder: Path) -> Iterator[tuple[int, list[Address]]]:
    """The pid of who keeps the servers, whose children they are, and where they listen."""
    keep = ServerProcesses(servers, Durability(folder=folder))
    keeper = os.fork()
    if keeper == 0:
        try:
            keep(None)
        finally:
            os._exit(1)
    try:
        yield keeper, keep.addresses
    finally:
        os.kill(keeper, signal.SIGTERM)
        os.waitpid(keeper, 0)
        keep.close()


def children(pid: int) -> list[int]:
    """The pids of a process's children, in the order in which they were started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
