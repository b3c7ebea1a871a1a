"""Links: the only thing between replicas.

A process group never leaves its replica. A link joins the ranks that hold the same coordinates in every replica; it is
counted, and it can be aborted and formed anew without touching the replicas' own worlds. One file knows the transports;
a sync sees the protocol.
"""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from paceline.errors import LinkError


class Pending(Protocol):
    """An exchange on its way."""

    def wait(self) -> None:
        """Return when the result stands in the tensor; ``LinkError`` if a peer was lost."""


class Link(Protocol):
    """Sums and copies between the counterparts of one rank in all replicas.

    Tensors are plain, contiguous local tensors on the rank's device. Exchanges are matched by the order in which they
    are started, which must be the same on every member.
    """

    index: int
    """This member's place, 0-based: its replica."""
    size: int
    """Members: replicas."""
    sent_bytes: int
    """Payload bytes this member has put on the wire (ring formula for sums), since it was made."""

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start the sum of ``tensor`` over all members, in place."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> Pending:
        """Start the copy of the root's ``tensor`` to all members, in place."""

    def abort(self) -> None:
        """Break the link: pending exchanges fail with ``LinkError``."""


class _Done:
    def wait(self) -> None:
        """Nothing to wait for."""


class LocalLink:
    """The link of a single replica: nothing is sent."""

    index = 0
    size = 1
    sent_bytes = 0

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """The sum over one member is the tensor itself."""
        return _Done()

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> Pending:
        """The only member already holds it."""
        return _Done()

    def abort(self) -> None:
        """Nothing to break."""


class _Work:
    """A torch.distributed work whose failure is a ``LinkError``."""

    def __init__(self, work: dist.Work, describe: Callable[[], str]) -> None:
        self._work = work
        self._describe = describe

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise LinkError(f"{self._describe()}: {_reason(error)}") from error


class GroupLink:
    """A link over a gloo or NCCL group made directly, outside any torch.distributed world.

    ``store`` must not live in a replica that may die: it dies with its host. ``timeout_s`` bounds every exchange.
    """

    def __init__(
        self, store: Store, *, index: int, size: int, backend: str, timeout_s: float, loopback: bool = False
    ) -> None:
        self.index = index
        self.size = size
        self.sent_bytes = 0
        try:
            self._group = _make_group(store, index, size, backend, timedelta(seconds=timeout_s), loopback)
        except RuntimeError as error:
            raise LinkError(f"{self._describe()} could not be formed: {_reason(error)}") from error

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start the sum over all members; a ring sends 2 (n-1)/n of the tensor."""
        assert tensor.is_contiguous()
        self.sent_bytes += all_reduce_bytes(tensor.nbytes, self.size)
        return self._start(lambda: self._group.allreduce([tensor]))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> Pending:
        """Start the copy of the root's tensor."""
        assert tensor.is_contiguous()
        self.sent_bytes += tensor.nbytes if self.index == root else 0
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._start(lambda: self._group.broadcast([tensor], options))

    def abort(self) -> None:
        """Break the link."""
        self._group.abort()

    def _start(self, launch: Callable[[], dist.Work]) -> Pending:
        try:
            return _Work(launch(), self._describe)
        except RuntimeError as error:
            raise LinkError(f"{self._describe()}: {_reason(error)}") from error

    def _describe(self) -> str:
        return f"link of replica {self.index} to the {self.size - 1} other(s)"


def all_reduce_bytes(n_bytes: int, size: int) -> int:
    """Bytes one member sends when ``n_bytes`` are summed over ``size`` members by a ring (Patarasuk & Yuan 2009)."""
    return 2 * (size - 1) * n_bytes // size


def connect(
    store: Store | None, *, index: int, size: int, coordinate: int, backend: str, timeout_s: float, loopback: bool
) -> Link:
    """The link between the ranks at ``coordinate`` of all replicas."""
    if size == 1:
        return LocalLink()
    assert store is not None, "links between replicas need a store"
    store = PrefixStore(f"link/{coordinate}", store)
    return GroupLink(store, index=index, size=size, backend=backend, timeout_s=timeout_s, loopback=loopback)


def _make_group(store: Store, index: int, size: int, backend: str, timeout: timedelta, loopback: bool) -> Any:
    if backend == "nccl":
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        return dist.ProcessGroupNCCL(store, index, size, nccl_options)
    make: Any = dist.ProcessGroupGloo
    options = make._Options()
    # Without a name gloo resolves the host's own name, which fails on machines whose name is not in any table.
    options._devices = [make.create_device(hostname="127.0.0.1") if loopback else make.create_default_device()]
    options._timeout = timeout
    options._threads = 2
    return make(store, index, size, options)


def _reason(error: RuntimeError) -> str:
    """The first sentence of a backend's message, without the source file it came from."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^\[[^\]]*:\d+\]\s*", "", line).partition(". This is")[0]
