"""What the family of local SGD shares: replicas learn by themselves and agree every so many steps.

    steps 1 .. every    each replica takes steps of its own, with its own gradient, optimizer and moments
    step  every         mean of the replicas' parameters, each weighted by the targets it learned from since the last;
                        where the strategy has an outer rule, that says how far to go from the parameters agreed on
                        before towards the mean; all replicas go on from the result, with the moments they have

The last step of a run ends with an exchange too, whatever its number. A request to stop is agreed on when replicas
next talk. Between exchanges the weights that stand for all are those agreed on last, where they are kept; else the mean
of the moment.

A step that is not taken gives its replica no weight in the mean. What is agreed on is what all go on from, after
parameters of 16 bits were rounded to.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from paceline.comm.replica import Finish, Replica
from paceline.plan.wire import all_reduce_bytes, all_reduce_delays
from paceline.sync.alone import Alone, exchanges, share_of, wide
from paceline.sync.base import COUNT_BYTES, Shapes, SyncContext, SyncState
from paceline.sync.reducers.base import Reducer, ReducerConfig


class Outer(Protocol):
    """Where to go from the parameters agreed on before, given the mean of those of now."""

    def start(self, like: Mapping[str, Tensor]) -> None:
        """Make what is remembered for parameters like these."""

    def step(self, name: str, before: Tensor, mean: Tensor, rate: float) -> Tensor:
        """A parameter's next value. ``rate``: the mean of the optimizer's rates since the last exchange."""
        ...

    def state(self) -> Mapping[str, SyncState]:
        """As in ``Sync.state``."""
        ...


def periodic_wire_bytes(reducer: ReducerConfig, every: int, shapes: Shapes, members: int, steps: int) -> int:
    """Payload bytes of one rank: at each exchange two numbers, then the sums."""
    once = reducer.wire_bytes(shapes, members) + all_reduce_bytes(2 * COUNT_BYTES, members)
    return exchanges(every, steps) * once


def periodic_delays(reducer: ReducerConfig, every: int, shapes: Shapes, members: int, steps: int) -> int:
    """At each exchange the two numbers, then the sums."""
    numbers = all_reduce_delays(2 * COUNT_BYTES, members)
    return exchanges(every, steps) * (numbers + reducer.delays(shapes, members))


def periodic_state_bytes(reducer: ReducerConfig, shapes: Shapes, *, copies: int) -> int:
    """Bytes on one rank: what the reducer needs, copies of the fp32 parameters, and the window."""
    return reducer.state_bytes(shapes) + copies * sum(4 * math.prod(shape) for shape in shapes.values()) + 24


class PeriodicSync(Alone):
    """A strategy of the family on one rank. ``first`` steps of the run are not its own."""

    def __init__(
        self,
        context: SyncContext,
        *,
        every: int,
        reducer: Reducer,
        is_exact: bool,
        outer: Outer | None = None,
        first: int = 0,
    ) -> None:
        super().__init__(context)
        self._every, self._first = every, first
        self._reducer, self._is_exact, self._outer = reducer, is_exact, outer
        self._agreed: dict[str, Tensor] = {}
        self._window = torch.zeros(3, dtype=torch.float64)  # since the last exchange: targets, sum of rates, steps
        self._is_asked_to_stop = self._all_stop = False

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and keep the parameters they start from if they will be needed."""
        super().start(replica)
        self._reducer.start(replica.shards)
        if self._outer is not None or not self._is_exact:
            self._agreed = {shard.name: shard.local.clone() for shard in replica.shards}
        if self._outer is not None:
            self._outer.start(self._agreed)

    def follow(self, replica: Replica) -> None:
        """All replicas have agreed on the parameters of now in another way."""
        for shard in replica.shards if self._agreed else ():
            self._agreed[shard.name].copy_(shard.local)

    def total(self, values: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """This replica's own values. All stop, if one was asked to, when replicas talk: ``update`` says so."""
        self._is_asked_to_stop = stop
        return values, stop and self._link.size == 1

    def update(self, replica: Replica) -> Finish:
        """Step; then exchange if it is time, and say whether all stop."""
        self._all_stop = False
        finish = super().update(replica)
        return replace(finish, stop=self._all_stop)

    def is_agreed(self, step: int) -> bool:
        """Whether ``step`` ends with an exchange."""
        return step == self._steps or (step - self._first) % self._every == 0

    _talks = is_agreed

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """Those agreed on last where they are kept; else the mean of now."""
        return self._agreed or self._mean(replica, self._sum(float(self._window[0])).item())

    def state(self) -> Mapping[str, SyncState]:
        """The window, the parameters agreed on, and what outer rule and reducer remember."""
        agreed = {f"{name}/agreed": SyncState(tensor, like=name) for name, tensor in self._agreed.items()}
        outer = self._outer.state() if self._outer is not None else {}
        return {"window": SyncState(self._window, rule="fresh")} | agreed | {**outer} | {**self._reducer.state()}

    def _stepped(self, replica: Replica, targets: int) -> None:
        self._window += torch.tensor([targets, replica.rate, 1.0], dtype=torch.float64)
        if self.is_agreed(self._step):
            learned, is_asked = float(self._window[0]), float(self._is_asked_to_stop)
            all_targets, stops = self._sum(learned, is_asked).tolist()
            self._all_stop = stops > 0
            self._exchange(replica, all_targets)

    @torch.no_grad()
    def _exchange(self, replica: Replica, targets: float) -> None:
        mean = self._mean(replica, targets)
        rate = float(self._window[1] / self._window[2])
        for shard in replica.shards:
            after = mean[shard.name]
            if self._outer is not None:
                after = self._outer.step(shard.name, wide(self._agreed[shard.name]), after, rate)
            self._put(shard, after)
            if self._agreed:
                self._agreed[shard.name].copy_(shard.local)
        self._reducer.settle()
        self._window.zero_()
        replica.refresh()

    def _mean(self, replica: Replica, targets: float) -> Mapping[str, Tensor]:
        """Of the parameters of all replicas, by the targets that each learned from since the last exchange."""
        share = share_of(float(self._window[0]), targets, self._link.size)
        own = {shard.name: wide(shard.local) for shard in replica.shards}
        if self._is_exact:
            return self._reducer.weighted_sum(own, share, self._step)
        moved = {name: wide(self._agreed[name]) - tensor for name, tensor in own.items()}
        mean = self._reducer.weighted_sum(moved, share, self._step)
        return {name: wide(self._agreed[name]) - mean[name] for name in own}
