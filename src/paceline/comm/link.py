"""Links: the only thing between replicas.

A process group never leaves its replica. A link joins the ranks that hold the same coordinates in every replica, or in
some of them; it is counted, and it can be aborted and formed anew without touching the replicas' own worlds. One file
knows the transports; a sync sees the protocol.
"""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from paceline.comm.mailbox import Exchange, Mailbox
from paceline.comm.shared import LEAST_BYTES, SharedSums, shared_sums
from paceline.errors import LinkError
from paceline.plan.wire import all_gather_bytes, all_reduce_bytes, all_to_all_bytes, broadcast_bytes, direct_bytes

_NEVER_SENT = 2**20
"""A tag that no exchange has."""
_AT_ONCE = 4
"""Exchanges of a gloo group that are under way at once. A sum of 6.4 MB at 100 Mbit/s and 25 ms waits for eight delays:
0.72 s for 0.51 s of bytes. Cut in four, the others' bytes fill its pauses: 0.57 s. Eight at once gain nothing more."""
_PIECE_BYTES = 2 * 2**20
"""A sum goes in pieces of at most this for each member. Gloo cuts a tensor in parts of 1 MiB, two of a member under way
at a time, and waits for two delays in every place of the ring for each two: with more than two a large tensor waits
longer than a small one. Pieces under way together do not."""


class Pending(Protocol):
    """An exchange on its way."""

    def wait(self) -> None:
        """Return when the result stands in the tensor; ``LinkError`` if a peer was lost."""


class Link(Protocol):
    """Exchanges between the counterparts of one rank in several replicas.

    Tensors are plain, contiguous local tensors on the rank's device, and as large on every member where nothing else is
    said. Exchanges are matched by the order in which they are started, which must be the same on every member; ``send``
    and ``receive`` by that of the same two members and tag.
    """

    index: int
    """This member's place, 0-based."""
    size: int
    """Members."""

    @property
    def sent_bytes(self) -> int:
        """Payload bytes this member has put on the wire since the link was made, by the formulas of ``plan.wire``."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start the sum of ``tensor`` over all members, in place."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> Pending:
        """Start the copy of the root's ``tensor`` to all members, in place."""

    def all_gather(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """Start to collect every member's ``tensor`` in ``into`` (members, ...), in their order."""

    def all_to_all(
        self,
        into: torch.Tensor,
        tensor: torch.Tensor,
        *,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> Pending:
        """Start to send the first ``sent[0]`` rows to member 0, the next to member 1, ...; ``into`` is what comes in.

        It comes in the order of the members, ``received[i]`` rows from member i. Without numbers all are equal.
        """

    def reduce_scatter(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """Start the sum of piece i of every member's ``tensor`` (members, ...) to its owner i, in ``into``.

        The owner adds in the order of the members, so the sum is the same whoever owns it.
        """

    def send(self, tensor: torch.Tensor, to: int, *, tag: int = 0) -> Pending:
        """Start to send ``tensor`` to a member, which receives it."""

    def receive(self, tensor: torch.Tensor, source: int, *, tag: int = 0) -> Pending:
        """Start to receive what a member sends, into ``tensor``."""

    def sub(self, members: Sequence[int]) -> "Link":
        """A link among some members, in this order; they all call it. It ends with this one, which counts its bytes."""

    def count(self, n_bytes: int) -> None:
        """Count payload that this member has sent to other members by way of servers."""

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

    def all_gather(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """The only piece is its own."""
        into.view(-1).copy_(tensor.view(-1))
        return _Done()

    def all_to_all(
        self,
        into: torch.Tensor,
        tensor: torch.Tensor,
        *,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> Pending:
        """All that is sent comes back."""
        return self.all_gather(into, tensor)

    def reduce_scatter(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """The only piece is its own."""
        return self.all_gather(into, tensor)

    def send(self, tensor: torch.Tensor, to: int, *, tag: int = 0) -> Pending:
        """There is nobody to send to."""
        raise AssertionError(f"a link of one member has no member {to} beside it")

    receive = send

    def sub(self, members: Sequence[int]) -> Link:
        """The same again."""
        assert list(members) == [0], members
        return self

    def count(self, n_bytes: int) -> None:
        """There is nobody to send to."""
        raise AssertionError(n_bytes)

    def abort(self) -> None:
        """Nothing to break."""


class _All:
    """Exchanges of which none is needed alone."""

    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = pending

    def wait(self) -> None:
        for pending in self._pending:
            pending.wait()


class _Work:
    """A work of a group whose failure is a ``LinkError``; what is ``left`` to do is done when it has ended."""

    def __init__(self, work: Pending, describe: Callable[[], str], left: Callable[[], object]) -> None:
        self._work = work
        self._describe = describe
        self._left = left

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise LinkError(f"{self._describe()}: {_reason(error)}") from error
        self._left()


class GroupLink:
    """A link over a gloo or NCCL group made directly, outside any torch.distributed world.

    ``store`` must not live in a replica that may die: it dies with its host. ``timeout_s`` bounds every exchange.
    """

    def __init__(
        self, store: Store, *, index: int, size: int, backend: str, timeout_s: float, loopback: bool = False
    ) -> None:
        self.index = index
        self.size = size
        self._sent_bytes = 0
        self._store = store
        self._how = {"backend": backend, "timeout_s": timeout_s, "loopback": loopback}
        self._subs: dict[str, list[Link]] = {}
        try:
            self._group = _make_group(store, index, size, backend, timedelta(seconds=timeout_s), loopback)
        except RuntimeError as error:
            raise LinkError(f"{self._describe()} could not be formed: {_reason(error)}") from error
        self._mailbox = Mailbox(self._group, index, size, direct_bytes(size)) if backend == "gloo" else None
        is_one_host = backend == "gloo" and loopback
        self._shared: SharedSums | None = shared_sums(index, self._tell) if is_one_host else None

    @property
    def sent_bytes(self) -> int:
        """Of this link and those among some of its members."""
        return self._sent_bytes + sum(sub.sent_bytes for sub in chain(*self._subs.values()))

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start the sum over all members: a small one directly, a large one in memory that they share, if they do."""
        sent = all_reduce_bytes(tensor.nbytes, self.size)
        if self._shared is not None and tensor.nbytes >= LEAST_BYTES:
            assert tensor.is_contiguous()
            self._sent_bytes += sent
            return Exchange(self._shared.start(tensor))
        if (mailbox := self._mailbox) is not None and 0 < tensor.nbytes <= direct_bytes(self.size):
            return self._start(sent, lambda: mailbox.all_reduce(tensor), tensor)
        most = self.size * _PIECE_BYTES
        if tensor.nbytes <= most or self._how["backend"] != "gloo":
            return self._start(sent, lambda: self._group.allreduce([tensor]), tensor)
        assert tensor.is_contiguous()
        self._sent_bytes += sent
        pieces = tensor.view(-1).split(most // tensor.itemsize)
        return _All([self._start(0, partial(self._group.allreduce, [piece]), piece) for piece in pieces])

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> Pending:
        """Start the copy of the root's tensor."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        sent = broadcast_bytes(tensor.nbytes, self.size, (self.index - root) % self.size)
        return self._start(sent, lambda: self._group.broadcast([tensor], options), tensor)

    def all_gather(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """Start to collect every member's tensor."""
        sent = all_gather_bytes(tensor.nbytes, self.size)
        if (mailbox := self._mailbox) is not None and tensor.nbytes > 0:
            return self._start(sent, lambda: mailbox.all_gather(into, tensor), into, tensor)
        return self._start(sent, lambda: self._group._allgather_base(into.view(-1), tensor.view(-1)), into, tensor)

    def all_to_all(
        self,
        into: torch.Tensor,
        tensor: torch.Tensor,
        *,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> Pending:
        """Start to send rows to their members."""
        rows = tensor.shape[0] // self.size if sent is None else sent[self.index]
        n_bytes = tensor.nbytes - rows * (tensor[:1].nbytes)
        counts = list(received or ()), list(sent or ())
        return self._start(n_bytes, lambda: self._group.alltoall_base(into, tensor, *counts), into, tensor)

    def reduce_scatter(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """Start the sums: gloo's own would send as much as an all-reduce, and add in another order for each owner."""
        assert tensor.shape[0] == self.size, (tensor.shape, self.size)
        pieces = torch.empty_like(tensor)
        return self._start(
            all_to_all_bytes(tensor.nbytes, self.size),
            lambda: self._group.alltoall_base(pieces, tensor, [], []),
            tensor,
            left=lambda: _add_in_order(into, pieces),
        )

    def send(self, tensor: torch.Tensor, to: int, *, tag: int = 0) -> Pending:
        """Start to send."""
        assert to != self.index
        return self._start(tensor.nbytes, lambda: self._group.send([tensor], to, tag), tensor)

    def receive(self, tensor: torch.Tensor, source: int, *, tag: int = 0) -> Pending:
        """Start to receive."""
        assert source != self.index
        return self._start(0, lambda: self._group.recv([tensor], source, tag), tensor)

    def sub(self, members: Sequence[int]) -> Link:
        """A group of its own among some members."""
        among = "-".join(map(str, members))
        before = self._subs.setdefault(among, [])
        store = PrefixStore(f"sub/{among}/{len(before)}", self._store)
        before.append(_form(store, list(members).index(self.index), len(members), **self._how))
        return before[-1]

    def count(self, n_bytes: int) -> None:
        """Count what went by way of servers."""
        self._sent_bytes += n_bytes

    def abort(self) -> None:
        """Break the link, and those among some of its members."""
        for sub in chain(*self._subs.values()):
            sub.abort()
        self._group.abort()
        if self._how["backend"] == "gloo":
            # Its abort does nothing in torch 2.13. A wait that is over closes all connections of the group.
            never = self._group.recv([torch.empty(1)], (self.index + 1) % self.size, _NEVER_SENT)
            with suppress(RuntimeError):
                never.wait(timedelta(milliseconds=1))

    def _tell(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to tell all members a small tensor, which counts for nothing; what is returned waits for theirs."""
        into = tensor.new_empty(self.size, *tensor.shape)
        told = self._start(0, lambda: self._group._allgather_base(into.view(-1), tensor), into, tensor)

        def wait() -> torch.Tensor:
            told.wait()
            return into

        return wait

    def _start(
        self,
        sent_bytes: int,
        launch: Callable[[], Pending],
        *tensors: torch.Tensor,
        left: Callable[[], object] = lambda: None,
    ) -> Pending:
        assert all(tensor.is_contiguous() for tensor in tensors)
        self._sent_bytes += sent_bytes
        try:
            return _Work(launch(), self._describe, left)
        except RuntimeError as error:
            raise LinkError(f"{self._describe()}: {_reason(error)}") from error

    def _describe(self) -> str:
        return f"link of replica {self.index} to the {self.size - 1} other(s)"


def connect(
    store: Store | None,
    *,
    index: int,
    size: int,
    coordinate: int,
    backend: str,
    timeout_s: float,
    loopback: bool,
    name: str = "all",
) -> Link:
    """The link between the ranks at ``coordinate`` of all replicas, or of those that agree on another ``name``."""
    assert size == 1 or store is not None, "links between replicas need a store"
    prefixed = PrefixStore(f"link/{coordinate}/{name}", store) if store is not None else None
    return _form(prefixed, index, size, backend=backend, timeout_s=timeout_s, loopback=loopback)


def _form(store: Store | None, index: int, size: int, **how: Any) -> Link:
    if size == 1:
        return LocalLink()
    assert store is not None
    return GroupLink(store, index=index, size=size, **how)


def _add_in_order(into: torch.Tensor, pieces: torch.Tensor) -> None:
    into.view(-1).copy_(pieces[0].reshape(-1))
    for piece in pieces[1:]:
        into.view(-1).add_(piece.reshape(-1))


def _make_group(store: Store, index: int, size: int, backend: str, timeout: timedelta, loopback: bool) -> Any:
    if backend == "nccl":
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        return dist.ProcessGroupNCCL(store, index, size, nccl_options)
    make: Any = dist.ProcessGroupGloo
    options = make._Options()
    options._devices = _devices(make, loopback)
    options._timeout = timeout
    options._threads = _AT_ONCE
    return make(store, index, size, options)


def _devices(make: Any, loopback: bool) -> list[Any]:
    """The interfaces of this machine that gloo uses: as torch chooses them for the groups that it makes itself."""
    if loopback:  # without a name gloo resolves the host's own, which fails where that is not in any table
        return [make.create_device(hostname="127.0.0.1")]
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [make.create_device(interface=name.strip()) for name in names.split(",")]
    return [make.create_default_device()]


def _reason(error: RuntimeError) -> str:
    """The first sentence of a backend's message, without the source file it came from."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^\[[^\]]*:\d+\]\s*", "", line).partition(". This is")[0]
