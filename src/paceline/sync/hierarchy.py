"""A hierarchy: replicas agree in groups by one strategy, groups with each other by another, and so on.

The group that a level makes is a replica to the level above. So in a step targets, losses and gradients go up from the
innermost level, and only then is the step finished, from the outermost level down:

    begin, reduce    inner, then outer with what inner gave
    update           outer.update(group) -> group.finish -> inner.update(replica) -> replica.finish

Every replica of a group has its own link to its counterparts in the other groups, and its own copy of the outer state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from paceline.comm.link import Link
from paceline.comm.replica import Finish, Replica, Shard, Vote
from paceline.errors import PlanError
from paceline.sync.base import Sync, SyncConfig, SyncContext, SyncState


def build_sync(levels: Sequence[SyncConfig], links: Sequence[Link], *, steps: int, seed: int, **other: Any) -> Sync:
    """The strategies of all levels at work, innermost first, each over its own link.

    ``other`` are further fields of their contexts. Raises ``PlanError`` for a group whose replicas differ: it is not
    one replica to the level above.
    """
    for level in levels[:-1]:
        if not level.keeps_equal:
            raise PlanError(
                f"sync: {type(level).__name__} below another level is not built, for its replicas differ between "
                "exchanges. Use it as the last of the list, or all_reduce in its place"
            )
    contexts = [
        SyncContext(link=link, steps=steps, seed=seed, is_outermost=i == len(links) - 1, **other)
        for i, link in enumerate(links)
    ]
    sync, *above = [level.build(context) for level, context in zip(levels, contexts, strict=True)]
    for outer in above:
        sync = Hierarchy(sync, outer)
    return sync


class _Group:
    """The replicas of an inner level as one replica of the outer level."""

    def __init__(self, replica: Replica, inner: Sync) -> None:
        self.shards, self.reduction = replica.shards, replica.reduction
        self._replica, self._inner = replica, inner
        self._listener: Callable[[Shard], None] = lambda _: None

    @property
    def rate(self) -> float:
        """That of its replicas."""
        return self._replica.rate

    @property
    def gradient_scale(self) -> float:
        """That of its replicas."""
        return self._replica.gradient_scale

    def outgoing(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``Replica``."""
        return self._replica.outgoing(gradients)

    def on_gradient_ready(self, fn: Callable[[Shard], None]) -> None:
        """Gradients are the group's own after the inner level's ``reduce``."""
        self._listener = fn

    def tell(self) -> None:
        """All gradients are final in the group."""
        for shard in reversed(self.shards):  # in the order in which a backward pass tells of them, more or less
            self._listener(shard)

    def finish(self, vote: Vote) -> Finish:
        """Finish the step of the group's replicas, all of which decide alike."""
        return self._inner.update(_Voting(self._replica, vote))

    def refresh(self) -> None:
        """See ``Replica``."""
        self._replica.refresh()

    def norms(self, values: Mapping[str, Tensor]) -> Mapping[str, float]:
        """See ``Replica``; the replicas of the group have the same."""
        return self._replica.norms(values)


class _Voting:
    """A replica whose wish to step goes through one more vote."""

    def __init__(self, replica: Replica, vote: Vote) -> None:
        self.shards, self.reduction, self.rate = replica.shards, replica.reduction, replica.rate
        self.gradient_scale, self.outgoing = replica.gradient_scale, replica.outgoing
        self.on_gradient_ready, self.refresh, self.norms = replica.on_gradient_ready, replica.refresh, replica.norms
        self._replica, self._vote = replica, vote

    def finish(self, vote: Vote) -> Finish:
        """See ``Replica``."""
        return self._replica.finish(lambda wish: self._vote(vote(wish)))


class Hierarchy:
    """Two levels at work on one rank; the inner one may be a hierarchy itself."""

    def __init__(self, inner: Sync, outer: Sync) -> None:
        self._inner, self._outer = inner, outer
        self._group: _Group

    def start(self, replica: Replica) -> None:
        """Make both levels ready."""
        self._inner.start(replica)
        self._group = _Group(replica, self._inner)
        self._outer.start(self._group)

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """The targets that the outer level names, of those of the group."""
        return self._outer.begin(step, self._group, self._inner.begin(step, replica, count))

    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """Up the levels: who is asked to stop asks again until all levels have heard."""
        sums, stops = self._inner.reduce(replica, values, stop)
        self._group.tell()
        return self._outer.reduce(self._group, None if values is None else sums, stops)

    def update(self, replica: Replica) -> Finish:
        """Down the levels."""
        return self._outer.update(_Group(replica, self._inner))

    def is_agreed(self, step: int) -> bool:
        """Groups always are; so it is for the outer level to say."""
        return self._outer.is_agreed(step)

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """What the outer level has."""
        return self._outer.agreed(self._group)

    def state(self) -> Mapping[str, SyncState]:
        """Of both levels, told apart by a prefix."""
        return {
            _at(prefix, key): state
            for prefix, level in (("inner", self._inner), ("outer", self._outer))
            for key, state in level.state().items()
        }


def _at(prefix: str, key: str) -> str:
    """``PARAMETER/what`` stays a name of that form."""
    parameter, slash, what = key.rpartition("/")
    return f"{parameter}{slash}{prefix}.{what}"
