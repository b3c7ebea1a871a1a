"""Ranks started by torchrun (or anything that sets the same variables): this process is one of them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous
from paceline.errors import PlanError


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys()


def is_leader(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first rank that torchrun started, or was not started by it."""
    return not started_by_torchrun(environment) or environment["RANK"] == "0"


def coordinates(replicas: int, ranks: int, environment: Mapping[str, str] = os.environ) -> Coordinates:
    """This process's place; ``PlanError`` unless torchrun started exactly the ranks that the config asks for."""
    world = int(environment["WORLD_SIZE"])
    if world != replicas * ranks:
        raise PlanError(
            f"torchrun started {world} processes, but replicas={replicas} x {ranks} rank(s) each makes "
            f"{replicas * ranks}. Start {replicas * ranks}, or set replicas={max(1, world // ranks)}."
        )
    return Coordinates.of(
        int(environment["RANK"]),
        replicas=replicas,
        ranks=ranks,
        local_rank=int(environment.get("LOCAL_RANK", 0)),
        local_ranks=int(environment.get("LOCAL_WORLD_SIZE", 1)),
    )


@contextmanager
def rendezvous(place: Coordinates, environment: Mapping[str, str] = os.environ) -> Iterator[Rendezvous]:
    """Where the store is: with the torchrun agent, or, under a plain launcher, hosted by the first rank meanwhile."""
    at = Rendezvous(
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        loopback=environment["MASTER_ADDR"] in {"127.0.0.1", "localhost"},
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
    agent_hosts = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = None if agent_hosts or not place.is_leader else at.host_store()
    try:
        yield at
    finally:
        del store
