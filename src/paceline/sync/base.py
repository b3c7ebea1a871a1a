"""What every sync strategy is, and what it may see.

A strategy decides what is exchanged, when, how and with whom. It sees the replica's local shards and the link to their
counterparts in the other replicas, never the layout that cut them: so every strategy works with every layout.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch

from paceline.comm.link import Link
from paceline.comm.replica import Finish, Replica, Shard
from paceline.errors import TrainError
from paceline.parallel.full import FullTensors
from paceline.plan.network import Network

Shapes = Mapping[str, Sequence[int]]
"""Local shapes of the trainable parameters by name."""

COUNT_BYTES = 8
"""Of a number in what replicas tell each other beside tensors."""


@dataclass(frozen=True, kw_only=True)
class SyncContext:
    """What a strategy is built with on one rank."""

    link: Link
    """To the counterparts of this rank: in all other replicas or, in a hierarchy, at this strategy's level."""
    steps: int
    """Of the whole run."""
    seed: int = 0
    full: FullTensors | None = None
    """How the ranks of the replica hold its parameters; None for a replica of one rank."""
    rank: int = 0
    """Of this rank in its replica."""
    clients: int = 0
    """Of a federated run, all of them."""
    are_processes: bool = False
    """Clients are processes of their own: what they hand in they have masked themselves, where it is to be."""
    secret: str | None = None
    """What noise follows from in place of the seed, where clients know that."""

    shapes: Shapes | None = None
    """Of all parameters of the whole model that learn; None if every rank has a part of each."""
    lookups: frozenset[str] = frozenset()
    """Parameters of the whole model of which a batch uses nothing but the rows of its tokens."""
    servers: Sequence[tuple[str, int]] = ()
    """Where server processes that were started beside the ranks listen."""
    meets: Callable[[int], bool] = field(default=lambda _: False)
    """After which steps weights are measured or saved, so that replicas have to hold the same."""
    clip_norm: float | None = None
    """What ``train.clip_norm`` asks for, where the strategy clips itself."""
    is_outermost: bool = True
    """Whether no other strategy stands above: what it names by ``begin`` divides the loss."""

    def full_tensors(self, shards: Sequence[Shard]) -> FullTensors:
        """Of some parameters, for what needs more of a tensor than a rank holds."""
        return self.full or FullTensors.alone({shard.name: shard.local for shard in shards})


class SyncConfig(Protocol):
    """The frozen config class of a strategy: what the plan asks before anything runs."""

    @property
    def keeps_equal(self) -> bool:
        """See ``SyncOptions``."""
        ...

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """Payload bytes one rank sends in a run of ``steps`` steps; ``value_bytes`` are those of a gradient in a sum.

        What replicas compare once at the start, and evaluations, are not in it.
        """
        ...

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """For how many delays of the link a rank waits in a run, one after the other (``plan.wire``).

        What is on its way while steps are computed does not count (see ``Timed``), nor does what ``wire_bytes`` leaves
        out.
        """
        ...

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Bytes the strategy needs on one rank at most: what it remembers, and what it sends from."""
        ...

    def build(self, context: SyncContext) -> "Sync":
        """The strategy at work."""
        ...


@dataclass(frozen=True, kw_only=True)
class Load:
    """What exchanges at one level come to, as far as the strategy does not say it."""

    shapes: Shapes
    members: int
    steps: int
    value_bytes: int
    """Of a gradient in a sum."""
    compute_s: float
    """Of a step, without its exchanges."""


@runtime_checkable
class Timed(Protocol):
    """The config of a strategy that takes another time than its bytes and delays one after the other."""

    def exchange_s(self, network: Network, load: Load) -> float:
        """Seconds that a rank waits for exchanges in a run: less, where steps are computed meanwhile."""
        ...


def exchange_s(options: SyncConfig, network: Network, load: Load) -> float:
    """Seconds that a rank waits for a strategy's exchanges in a run on a link."""
    if isinstance(options, Timed):
        return options.exchange_s(network, load)
    sent = options.wire_bytes(load.shapes, load.members, load.steps, load.value_bytes)
    return network.seconds(sent, options.delays(load.shapes, load.members, load.steps))


def step_s(options: SyncConfig, network: Network, load: Load) -> float:
    """Seconds of a step on average: what it computes, also to encode and decode what is sent, and its exchanges."""
    reducer: Any = getattr(options, "reducer", None)
    coded_s = 0.0
    if reducer is not None and load.members > 1:
        values = sum(math.prod(shape) for shape in load.shapes.values())
        coded_s = 1e-9 * reducer.ns_per_value * values / getattr(options, "every", 1)
    return load.compute_s + coded_s + exchange_s(options, network, load) / load.steps


class Stepping(Protocol):
    """What a step asks of a strategy, in the order in which its methods stand here."""

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """Before the backward pass: the targets by which the loss is divided, of the group that this strategy names.

        ``count`` is this replica's own number of targets. An optimizer may want other gradients of the batch besides:
        ``begin`` and ``reduce`` are called for each of them too, and ``update`` once, for the step.
        """
        ...

    def reduce(
        self, replica: Replica, values: torch.Tensor | None = None, stop: bool = False
    ) -> tuple[torch.Tensor, bool]:
        """After the backward pass: replace the gradients by those the step is taken with, if replicas share them.

        Besides, ``values``, a small fp64 vector, summed over the replicas that are reported together, and whether all
        stop after the step; ``stop``: this replica was asked to. Where replicas talk, this is on its way with the
        gradients. All give the same answer to ``stop``, which may have to wait until they next talk; if that is at the
        end of the step, ``update`` gives it (``Finish.stop``). Without ``values``, for another gradient of the batch,
        nothing is reported.
        """
        ...

    def update(self, replica: Replica) -> Finish:
        """Finish the step, and exchange what is exchanged after it.

        Replicas that share gradients vote: all take the step, or none does. A step that is not taken leaves what
        outlives it (residuals, momentum) as it was.
        """
        ...


class Sync(Stepping, Protocol):
    """A strategy at work on one rank."""

    def start(self, replica: Replica) -> None:
        """Before the first step: make sure that all replicas start from the same weights."""

    def is_agreed(self, step: int) -> bool:
        """Whether all replicas hold the same weights after ``step``."""
        ...

    def agreed(self, replica: Replica) -> Mapping[str, torch.Tensor]:
        """Weights that stand for all replicas where they differ, by the names of the shards; all call it together."""
        ...

    def state(self) -> Mapping[str, "SyncState"]:
        """What the strategy must remember between steps; a checkpoint keeps it and fills it in place.

        By name: ``PARAMETER/what`` for what is like a parameter.
        """
        ...


@runtime_checkable
class Remembering(Protocol):
    """A sync that keeps states of the optimizer besides that of its replica."""

    @property
    def remembered(self) -> dict[int, dict[str, torch.Tensor]]:
        """By a number, and as ``PARAMETER/what``; a checkpoint keeps them, and makes places for those that it has."""
        ...


@runtime_checkable
class Serving(Protocol):
    """A strategy whose servers hold what is otherwise the replica's."""

    at: int
    """The step after which this replica goes on; later than its last one where others have learned without it."""

    def restored(self) -> None:
        """Weights and the optimizer's state were set from outside: servers have to begin with these."""

    def gather(self, replica: Replica) -> None:
        """Before a save, on the ranks that write: make the replica hold what is to be saved."""

    def words(self) -> str | None:
        """What the report says of it at the end of a run."""
        ...


class Share(NamedTuple):
    """One replica's part of the batch of a step: ``part`` of as many as there are replicas."""

    step: int
    part: int


@runtime_checkable
class Claiming(Protocol):
    """A strategy whose replicas learn from what is next, in place of a part of each step: each takes as many steps of
    its own as it has time for. All parts of all steps are learned from once."""

    at: int
    """After a step: after how many steps of the run all have met."""
    pace: float
    """The speed of all replicas, in that of this one."""

    def claim(self, done: int, replica: Replica) -> Sequence[Share]:
        """Before a step: what this replica learns from in it, and may in those after it. All ranks of it call this.

        ``done``: after how many steps of the run all have met, which is where weights are measured and saved.
        """
        ...


@runtime_checkable
class Fetching(Protocol):
    """A strategy that gets what a step needs when it is known."""

    def fetch(self, replica: Replica, ids: torch.Tensor) -> None:
        """Before a step: ``ids`` are the tokens that this rank's batches look up, each once."""


@dataclass(frozen=True)
class SyncState:
    """One tensor of a strategy's state."""

    tensor: torch.Tensor
    like: str | None = None
    """The parameter as whose local part it is cut; None for what all ranks of the replica have alike or, with the name
    of a parameter in its own name, all ranks that hold parts of that."""
    owner: Literal["here", "elsewhere"] | None = None
    """Of what one rank of the stage has by itself: whether that is this one; if not, the tensor means nothing."""
    rule: Literal["mean", "clone", "fresh"] | None = None
    """What becomes of it when the number of replicas changes (``checkpoint.state``); None if they all have the same."""


NOTHING = torch.zeros(0, dtype=torch.float64)
"""What is reported of a gradient beside that of the step."""


def start_total(
    link: Link, values: torch.Tensor | None, stop: bool, device: torch.device
) -> Callable[[], tuple[torch.Tensor, bool]]:
    """Start what ``Sync.reduce`` reports where all replicas talk; what is returned waits for it."""
    if values is None:
        return lambda: (NOTHING, False)
    total = torch.cat([values, values.new_tensor([float(stop)])]).to(device)
    pending = link.all_reduce(total)

    def wait() -> tuple[torch.Tensor, bool]:
        pending.wait()
        return total[:-1], bool(total[-1] > 0)

    return wait


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
