"""What every sync strategy is, and what it may see.

A strategy decides what is exchanged, when, how and with whom. It sees the replica's local shards and the link to their
counterparts in the other replicas, never the layout that cut them: so every strategy works with every layout.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from paceline.comm.link import Link
from paceline.comm.replica import Finish, Replica
from paceline.errors import TrainError

Shapes = Mapping[str, Sequence[int]]
"""Local shapes of the trainable parameters by name."""


class SyncConfig(Protocol):
    """The frozen config class of a strategy: what the plan asks before anything runs."""

    def wire_bytes(self, shapes: Shapes, replicas: int) -> float:
        """Payload bytes one rank sends in one step, on average."""

    def state_bytes(self, shapes: Shapes) -> int:
        """Bytes of state the strategy keeps on one rank."""

    def build(self, link: Link) -> "Sync":
        """The strategy at work over a link."""


class Sync(Protocol):
    """A strategy at work on one rank."""

    def start(self, replica: Replica) -> None:
        """Before the first step: make sure that all replicas start from the same weights."""

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """Before the backward pass: the number of targets in the group this strategy names, which divides the loss.

        ``count`` is this replica's own number of targets.
        """

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small fp64 vector over all replicas that are reported, and stop, together."""

    def update(self, replica: Replica) -> Finish:
        """After the backward pass: exchange what is left, and finish the step."""


def check_equal_start(link: Link, replica: Replica) -> None:
    """Raise ``TrainError`` on every replica unless all hold bit-identical parameters at this rank's coordinates."""
    device = replica.shards[0].local.device
    own = torch.tensor(checksum(replica), dtype=torch.int64, device=device)
    first = own.clone()
    link.broadcast(first).wait()
    different = torch.zeros(link.size, dtype=torch.int64, device=device)
    different[link.index] = int(not torch.equal(own, first))
    link.all_reduce(different).wait()
    if different.any():
        others = ", ".join(str(i) for i in different.nonzero().flatten().tolist())
        raise TrainError(
            f"replica(s) {others} start with other weights than replica 0; build the model from the same seed or "
            "checkpoint in every process"
        )


def checksum(replica: Replica) -> list[int]:
    """Two 63-bit numbers that stand for the names and bytes of all parameters held by this rank."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in replica.shards:
        digest.update(shard.name.encode())
        digest.update(shard.local.contiguous().cpu().view(torch.uint8).numpy().data)
    raw = digest.digest()
    return [int.from_bytes(raw[i : i + 8], "little") >> 1 for i in (0, 8)]
