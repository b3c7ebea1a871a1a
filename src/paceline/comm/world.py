"""The torch.distributed world of one replica, and the store through which ranks find each other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from paceline.comm import link
from paceline.comm.device import Device
from paceline.comm.link import Link
from paceline.comm.mesh import Mesh
from paceline.comm.ranks import Coordinates
from paceline.errors import LinkError, PlanError
from paceline.plan.layout import Grid, data_rank


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where a run's store is: hosted outside the replicas, by the launcher, so that no replica's death ends it."""

    host: str = "127.0.0.1"
    port: int = 0
    timeout_s: float = 600.0
    loopback: bool = True
    """All ranks are on this machine: their sockets are bound to the loopback address."""
    attempt: str = "0"
    """Told apart in the store's keys, which outlive a restart of the ranks."""
    servers: tuple[tuple[str, int], ...] = ()
    """Where servers that were started beside the ranks listen."""

    def host_store(self) -> TCPStore:
        """Serve the store from this process; ``PlanError`` if the port is taken."""
        try:
            return TCPStore(
                self.host, self.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self.timeout_s)
            )
        except (RuntimeError, OSError) as error:
            raise PlanError(
                f"train.port={self.port} cannot be opened on {self.host} (is another run using it?); "
                "choose another port, or 0 for a free one"
            ) from error

    def connect(self) -> Store:
        """A client of the store; ``LinkError`` if it does not answer in time."""
        try:
            store = TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=self.timeout_s))
        except (RuntimeError, OSError) as error:
            raise LinkError(f"the rendezvous store at {self.host}:{self.port} does not answer") from error
        return PrefixStore(f"paceline/{self.attempt}", store)


@dataclass(frozen=True, kw_only=True)
class World:
    """What a rank knows of the others: those of its own replica by the mesh, other replicas by the link."""

    coordinates: Coordinates
    device: Device
    store: Store | None
    mesh: Mesh
    link: Link
    """To this rank's counterparts in all other replicas."""
    group_sizes: tuple[int, ...]
    """How many replicas, or groups of the level below, agree at each level of a hierarchy, innermost first."""
    links: tuple[Link, ...]
    """One for each level: to those with which this one agrees there. Of a single level it is ``link``."""
    servers: tuple[tuple[str, int], ...] = ()
    """Where server processes listen; none if nobody has started any."""

    @property
    def data_rank(self) -> int:
        """This rank's place among those that learn from different rows."""
        return data_rank(self.coordinates.replica, self.group_sizes, self.mesh.shard.index)

    @property
    def data_ranks(self) -> int:
        """How many there are."""
        return self.coordinates.replicas * self.mesh.shard.size


@contextmanager
def join(
    coordinates: Coordinates,
    device: Device,
    rendezvous: Rendezvous | None,
    grid: Grid,
    group_sizes: Sequence[int] | None = None,
) -> Iterator[World]:
    """Join the replica's own world, a grid of ranks, and the links to this rank's counterparts in other replicas.

    ``group_sizes``: how many replicas, or groups of the level below, agree at each level; by default one level of all.
    """
    timeout_s, loopback = (rendezvous.timeout_s, rendezvous.loopback) if rendezvous is not None else (0.0, True)
    store = rendezvous.connect() if rendezvous is not None else None
    servers = rendezvous.servers if rendezvous is not None else ()
    with enter(
        coordinates,
        device,
        store,
        grid,
        timeout_s=timeout_s,
        loopback=loopback,
        group_sizes=group_sizes,
        servers=servers,
    ) as world:
        yield world


@contextmanager
def enter(
    coordinates: Coordinates,
    device: Device,
    store: Store | None,
    grid: Grid,
    *,
    timeout_s: float,
    loopback: bool,
    group_sizes: Sequence[int] | None = None,
    servers: tuple[tuple[str, int], ...] = (),
) -> Iterator[World]:
    """``join`` through a store that is connected already; None for a run of one rank."""
    assert grid.ranks == coordinates.ranks, (grid, coordinates)
    if coordinates.ranks > 1:
        assert store is not None
        dist.init_process_group(
            device.backend,
            store=PrefixStore(f"replica/{coordinates.replica}", store),
            rank=coordinates.rank,
            world_size=coordinates.ranks,
            timeout=timedelta(seconds=timeout_s),
        )
    connect = partial(
        link.connect,
        store,
        coordinate=coordinates.rank,
        backend=device.backend,
        timeout_s=timeout_s,
        loopback=loopback,
    )
    try:
        everyone = connect(index=coordinates.replica, size=coordinates.replicas)
        sizes = tuple(group_sizes or (coordinates.replicas,))
        groups = coordinates.groups(sizes)
        yield World(
            coordinates=coordinates,
            device=device,
            store=store,
            mesh=Mesh.make(grid, coordinates.rank, device.torch_device.type),
            link=everyone,
            servers=servers,
            group_sizes=sizes,
            links=(everyone,)
            if len(groups) == 1
            else tuple(connect(index=group.index, size=group.size, name=group.name) for group in groups),
        )
    finally:
        if coordinates.ranks > 1:
            dist.destroy_process_group()
