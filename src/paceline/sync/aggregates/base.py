"""What a robust rule is, and the updates it looks at.

A rule sees the updates of all clients of a round at once, as this rank holds them: parts of tensors. What it computes
of single coordinates it computes by itself; lengths and distances are sums over the ranks of the replica. Replicas give
each other their clients' updates, in the order of the round's clients, so that all compute the same bits whatever their
number.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from paceline.comm.link import Link
from paceline.comm.replica import VisitedReplica
from paceline.config import Natural, Options
from paceline.data.rounds import Round, Visit
from paceline.sync.aggregation import Update
from paceline.sync.base import SyncState


class Updates:
    """Updates of n clients: by name (n, ...) fp32 or fp64, this rank's parts.

    One that is not finite anywhere on the replica is ``lost``: its values are zero, and it is far from all others.
    """

    def __init__(self, by_name: Mapping[str, Tensor], replica: VisitedReplica) -> None:
        self.by_name, self._replica = dict(by_name), replica
        self._count = len(next(iter(by_name.values())))
        self.lost = ~self.squared_norms().isfinite()
        for index in self.lost.nonzero().flatten().tolist():
            for tensor in self.by_name.values():
                tensor[index].zero_()

    def __len__(self) -> int:
        """How many clients."""
        return self._count

    def squared_norms(self, center: Update | None = None) -> Tensor:
        """Squared L2 distances (n,) from a center, or from zero: fp64, on the CPU."""
        return self._replica.square_sums(
            {name: tensor[i] - center[name] if center else tensor[i] for name, tensor in self.by_name.items()}
            for i in range(len(self))
        )

    def squared_distances(self) -> Tensor:
        """Squared L2 distances (n, n) from each other: fp64, on the CPU; infinite from a lost one to any other."""
        n = len(self)
        first, second = torch.triu_indices(n, n, 1).unbind()
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        told = self._replica.square_sums(
            {name: tensor[i] - tensor[j] for name, tensor in self.by_name.items()} for i, j in pairs
        )
        distances = torch.zeros(n, n, dtype=torch.float64)
        distances[first, second] = distances[second, first] = told
        lost = self.lost.unsqueeze(0) | self.lost.unsqueeze(1)
        return distances.masked_fill(lost & ~torch.eye(n, dtype=torch.bool), torch.inf)

    def mean(self, weights: Tensor) -> dict[str, Tensor]:
        """Sum of weights (n,) times updates, in the order of the clients."""
        return {
            name: sum((w * t for w, t in zip(weights.tolist(), tensor, strict=True)), start=torch.zeros_like(tensor[0]))
            for name, tensor in self.by_name.items()
        }

    def chosen(self, clients: Sequence[int]) -> dict[str, Tensor]:
        """Those of some clients, by name (m, ...)."""
        return {name: tensor[list(clients)] for name, tensor in self.by_name.items()}


class Rule(Protocol):
    """A rule at work on one rank."""

    def start(self, like: Mapping[str, Tensor]) -> None:
        """Make what is remembered for parameters like these."""

    def combine(self, updates: Updates) -> Update:
        """One update for all."""
        ...

    def state(self) -> Mapping[str, SyncState]:
        """As in ``Sync.state``."""
        ...


class RobustOptions(Options):
    """Base of the config classes of robust rules."""

    faulty: Natural = 1
    """f, how many of a round's clients may send anything at all."""

    is_robust: ClassVar[bool] = True
    needs: ClassVar[str] = "2f + 1"
    """The fewest clients of a round, as a formula."""

    @property
    def fewest(self) -> int:
        """The same as a number."""
        return 2 * self.faulty + 1

    def refused(self, clients: int) -> str | None:
        """Why so many clients of a round will not do, or None."""
        if clients >= self.fewest:
            return None
        return (
            f"aggregate={type(self).__name__} with faulty={self.faulty} needs {self.needs} = {self.fewest} clients a "
            f"round, and there are {clients}. Use more of them, or a smaller faulty"
        )


class Memoryless:
    """What rules share that remember nothing."""

    def start(self, like: Mapping[str, Tensor]) -> None:
        """Nothing to make."""

    def state(self) -> Mapping[str, SyncState]:
        """Nothing is remembered."""
        return {}


class Collected:
    """All updates of a round on every replica, then the rule. See ``Aggregation``."""

    def __init__(self, link: Link, rule: Rule) -> None:
        self._link, self._rule = link, rule
        self._own: list[dict[str, Tensor]] = []

    def start(self, replica: VisitedReplica) -> None:
        """Make what the rule remembers."""
        self._replica = replica
        self._like = {s.name: torch.empty_like(s.local, dtype=_wide(s.local.dtype)) for s in replica.shards}
        self._rule.start(self._like)

    def open(self, whole: Round, step: int) -> None:
        """Whoever comes is kept."""

    def take(self, visit: Visit, update: Update, *, weight: float, scale: float, loss: float) -> None:
        """Keep it; weights have no meaning to a rule."""
        self._own.append({name: tensor * scale for name, tensor in update.items()})

    def told(self) -> Sequence[float]:
        """Nothing is summed."""
        return ()

    def result(self, told: Sequence[float], visits: Sequence[Visit], step: int) -> Update:
        """See ``Aggregation``."""
        n, replicas = len(visits), self._link.size
        each = -(-n // replicas)
        started = []
        for name, like in self._like.items():
            own = like.new_zeros(each, *like.shape)
            for place, update in enumerate(self._own):
                own[place] = update.pop(name)
            everyone = like.new_empty(replicas, each, *like.shape)
            # Ranks that share a small tensor may hold nothing of it.
            pending = self._link.all_gather(everyone, own) if own.numel() else None
            started.append((name, everyone, own, pending))
        together = {}
        for name, everyone, _, pending in started:
            if pending is not None:
                pending.wait()
            together[name] = everyone.transpose(0, 1).reshape(replicas * each, *everyone.shape[2:])[:n]
        self._own = []
        return self._rule.combine(Updates(together, self._replica))

    def state(self) -> Mapping[str, SyncState]:
        """What the rule remembers."""
        return self._rule.state()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
