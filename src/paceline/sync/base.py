"""What every sync strategy is, and what it may see.

A strategy decides what is exchanged, when, how and with whom. It sees the replica's local shards and the link to their
counterparts in the other replicas, never the layout that cut them: so every strategy works with every layout.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from paceline.comm.link import Link
from paceline.comm.replica import Finish, Replica
from paceline.errors import TrainError

Shapes = Mapping[str, Sequence[int]]
"""Local shapes of the trainable parameters by name."""


class SyncConfig(Protocol):
    """The frozen config class of a strategy: what the plan asks before anything runs."""

    def wire_bytes(self, shapes: Shapes, replicas: int, value_bytes: int = 4) -> float:
        """Payload bytes one rank sends in one step, on average; ``value_bytes`` are those of a gradient in a sum."""

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Bytes of state the strategy keeps on one rank."""

    def build(self, link: Link) -> "Sync":
        """The strategy at work over a link."""


class Sync(Protocol):
    """A strategy at work on one rank."""

    def start(self, replica: Replica) -> None:
        """Before the first step: make sure that all replicas start from the same weights."""

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """Before the backward pass: the number of targets in the group this strategy names, which divides the loss.

        ``count`` is this replica's own number of targets. An optimizer may want other gradients of the batch besides:
        then ``begin`` and ``update`` are called for each of them too, with a replica that keeps them and takes no step.
        """

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small fp64 vector over all replicas that are reported, and stop, together."""

    def update(self, replica: Replica) -> Finish:
        """After the backward pass: exchange what is left, and finish the step.

        Replicas that share gradients or weights vote: all take the step, or none does. A step that is not taken leaves
        what outlives it (residuals, momentum) as it was.
        """

    def state(self) -> Mapping[str, "SyncState"]:
        """What the strategy must remember between steps, by name; a checkpoint keeps it and fills it in place."""


@dataclass(frozen=True)
class SyncState:
    """One tensor of a strategy's state, and what it is; the words are those of ``checkpoint.state``."""

    tensor: torch.Tensor
    kind: Literal["parameter", "replicated", "per_replica", "opaque"]
    rule: Literal["mean", "clone", "fresh"] | None = None
    """Of ``per_replica`` state, what it becomes when the number of replicas changes."""


def check_equal_start(link: Link, replica: Replica) -> None:
    """Raise ``TrainError`` on every replica unless all hold bit-identical parameters at this rank's coordinates."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in replica.shards:
        digest.update(shard.name.encode())
        digest.update(shard.local.contiguous().cpu().view(torch.uint8).numpy().data)
    if others := differing(link, digest.digest(), replica.shards[0].local.device):
        raise TrainError(
            f"replica(s) {others} start with other weights than replica 0; build the model from the same seed or "
            "checkpoint in every process"
        )


def differing(link: Link, digest: bytes, device: torch.device) -> str:
    """The replicas whose 16-byte digest is not that of replica 0, as words; all replicas get the same answer."""
    numbers = [int.from_bytes(digest[i : i + 8], "little") >> 1 for i in (0, 8)]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    first = own.clone()
    link.broadcast(first).wait()
    different = torch.zeros(link.size, dtype=torch.int64, device=device)
    different[link.index] = int(not torch.equal(own, first))
    link.all_reduce(different).wait()
    return ", ".join(str(i) for i in different.nonzero().flatten().tolist())
