"""What strategies have in common whose parameters are held by servers."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from paceline.comm.replica import Remote, Replica, Shard
from paceline.errors import PlanError
from paceline.plan.wire import all_reduce_bytes
from paceline.sync.base import SyncContext
from paceline.sync.server.ask import Caller
from paceline.sync.server.channel import Channel
from paceline.sync.server.keep import ServerThreads
from paceline.sync.server.place import Places
from paceline.sync.server.rules import Rules


class Servers:
    """The servers of one rank: those that were started beside the ranks, or threads of the first rank of all."""

    def __init__(self, context: SyncContext, servers: int, timeout_s: float) -> None:
        self._context, self._link, self._count, self._timeout_s = context, context.link, servers, timeout_s
        self._threads: ServerThreads | None = None
        self.caller: Caller

    def find(self, replica: Remote) -> None:
        """Know where they are; all ranks call this, unless servers were started beside them."""
        addresses = list(self._context.servers) or self._own(replica)
        self.caller = Caller(addresses, timeout_s=self._timeout_s)
        self._shared = all(host.startswith("127.") for host, _ in addresses)

    def channel(
        self,
        replica: Remote,
        rules: Rules,
        shapes: Mapping[str, tuple[int, ...]],
        tables: Set[str] = frozenset(),
    ) -> Channel:
        """To the servers, for the tensors of this rank; ``shapes`` are those of whole parameters, of ``tables`` rows
        are pushed."""
        dtype = dtype_of(replica)
        return Channel(
            self.caller,
            Places(shapes, self._count, dtype.itemsize, tables=frozenset(tables)),
            {shard.name: shard.part for shard in replica.shards},
            dtype=dtype,
            worker=self._link.index,
            rank=replica.rank,
            rules=rules,
            shared=self._shared,
        )

    def stage(self, channel: Channel, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Give the servers this rank's part of a push; the link counts what was sent."""
        before = self.caller.sent_bytes
        channel.stage(number, tensors)
        self._link.count(self.caller.sent_bytes - before)

    def barrier(self, replica: Remote) -> None:
        """All ranks of all replicas are here."""
        replica.sum_of(torch.zeros(1))
        nothing = torch.zeros(1, device=_device(replica))
        self._link.all_reduce(nothing).wait()
        self._link.count(-all_reduce_bytes(nothing.nbytes, self._link.size))  # it carries no payload
        replica.sum_of(torch.zeros(1))

    def _own(self, replica: Remote) -> list[tuple[str, int]]:
        """Threads of the first rank of all; others hear of their ports."""
        ports = torch.zeros(self._count, dtype=torch.float64)
        if self._link.index == 0 and replica.is_first:
            self._threads = ServerThreads(self._count)
            ports = torch.tensor([port for _, port in self._threads.addresses], dtype=torch.float64)
        ports = replica.sum_of(ports).to(_device(replica))
        self._link.broadcast(ports).wait()
        return [("127.0.0.1", int(port)) for port in ports.tolist()]


def as_remote(replica: Replica) -> Remote:
    """A replica that is one worker."""
    assert isinstance(replica, Remote), "a group of replicas is not one worker: the config class refuses it"
    return replica


def dtype_of(replica: Remote) -> torch.dtype:
    """Of all parameters; ``PlanError`` if they are of several."""
    dtypes = {shard.local.dtype for shard in replica.shards}
    if len(dtypes) > 1:
        raise PlanError(f"servers that hold parameters of {len(dtypes)} dtypes are not built; use one")
    return dtypes.pop() if dtypes else torch.float32


def owned(replica: Remote) -> list[Shard]:
    """What this rank gives the servers: of ranks with equal values exactly one does."""
    return [shard for shard in replica.shards if replica.owns(shard.name)]


def _device(replica: Remote) -> torch.device:
    return replica.shards[0].local.device if replica.shards else torch.device("cpu")
