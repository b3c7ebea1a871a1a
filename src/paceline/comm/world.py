"""The torch.distributed world of one replica, and the store through which ranks find each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from paceline.comm import link
from paceline.comm.device import Device
from paceline.comm.link import Link
from paceline.comm.mesh import Mesh
from paceline.comm.ranks import Coordinates
from paceline.errors import LinkError, PlanError
from paceline.plan.layout import Grid


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

    @property
    def data_rank(self) -> int:
        """This rank's place among those that learn from different rows."""
        return self.coordinates.replica * self.mesh.shard.size + self.mesh.shard.index

    @property
    def data_ranks(self) -> int:
        """How many there are."""
        return self.coordinates.replicas * self.mesh.shard.size


@contextmanager
def join(coordinates: Coordinates, device: Device, rendezvous: Rendezvous | None, grid: Grid) -> Iterator[World]:
    """Join the replica's own world, a grid of ranks, and the link to this rank's counterparts in other replicas."""
    timeout_s, loopback = (rendezvous.timeout_s, rendezvous.loopback) if rendezvous is not None else (0.0, True)
    store = rendezvous.connect() if rendezvous is not None else None
    with enter(coordinates, device, store, grid, timeout_s=timeout_s, loopback=loopback) as world:
        yield world


@contextmanager
def enter(
    coordinates: Coordinates, device: Device, store: Store | None, grid: Grid, *, timeout_s: float, loopback: bool
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
    try:
        yield World(
            coordinates=coordinates,
            device=device,
            store=store,
            mesh=Mesh.make(grid, coordinates.rank, device.torch_device.type),
            link=link.connect(
                store,
                index=coordinates.replica,
                size=coordinates.replicas,
                coordinate=coordinates.rank,
                backend=device.backend,
                timeout_s=timeout_s,
                loopback=loopback,
            ),
        )
    finally:
        if coordinates.ranks > 1:
            dist.destroy_process_group()
