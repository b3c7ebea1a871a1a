"""A link with a clock: how often members wait, one time after the other, whatever the machine and whatever they send.

Every member has a clock. What it starts is told to the others with the time on its own; when it waits for that, its
clock goes on to when the result would be there, were each thing that is sent to take 1 and nothing else any time:

    large sum          to hear that there is room, and to arrive, at each place of a ring: 4 (n - 1)
    small sum          1: all send to all, who keep room ahead
    gathering          1
    all to all         2
    copy down a tree   2 for each level
    message            2

after the last who takes part has started. These are written out here once more, so that formulas of plans are compared
with something else than themselves. What is small is smaller here (``SMALL_BYTES``), as the models of tests are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.comm.link import Link, Pending

SMALL_BYTES = 256
"""For a sum to go to all directly; in place of ``plan.wire.direct_bytes``."""
_TOLD = 1000
"""Added to the tag of a message, for the time that goes with it."""


@dataclass
class Clock:
    """Of one member."""

    now: float = 0.0

    def wait_until(self, time: float) -> None:
        """Nothing is to be had before."""
        self.now = max(self.now, time)


@dataclass
class _Timed:
    """An exchange on its way, and what its end says of the time."""

    pending: Sequence[Pending]
    arrive: Callable[[], None]

    def wait(self) -> None:
        for pending in self.pending:
            pending.wait()
        self.arrive()


class Clocked:
    """The link it wraps, whose waits a clock counts."""

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link, self._clock = link, clock
        self.index, self.size = link.index, link.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """See ``Link``."""
        takes = 1 if tensor.nbytes <= SMALL_BYTES else 4 * (self.size - 1)
        return self._together(self._link.all_reduce(tensor), takes)

    def all_gather(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """See ``Link``."""
        return self._together(self._link.all_gather(into, tensor), 1)

    def all_to_all(self, into: torch.Tensor, tensor: torch.Tensor, **rows: Any) -> Pending:
        """See ``Link``."""
        return self._together(self._link.all_to_all(into, tensor, **rows), 2 if self.size > 1 else 0)

    def reduce_scatter(self, into: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """See ``Link``."""
        return self._together(self._link.reduce_scatter(into, tensor), 2 if self.size > 1 else 0)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> Pending:
        """See ``Link``; the root itself waits for nobody."""
        levels = 0
        while 2**levels < self.size:
            levels += 1
        return self._together(self._link.broadcast(tensor, root), 0 if self.index == root else 2 * levels, of=root)

    def send(self, tensor: torch.Tensor, to: int, *, tag: int = 0) -> Pending:
        """See ``Link``; who sends does not wait."""
        now = torch.tensor([self._clock.now], dtype=torch.float64)
        return _Timed([self._link.send(tensor, to, tag=tag), self._link.send(now, to, tag=tag + _TOLD)], lambda: None)

    def receive(self, tensor: torch.Tensor, source: int, *, tag: int = 0) -> Pending:
        """See ``Link``."""
        own, theirs = self._clock.now, torch.zeros(1, dtype=torch.float64)
        pending = [self._link.receive(tensor, source, tag=tag), self._link.receive(theirs, source, tag=tag + _TOLD)]
        return _Timed(pending, lambda: self._clock.wait_until(max(own, theirs.item()) + 2))

    def sub(self, members: Sequence[int]) -> "Clocked":
        """See ``Link``."""
        return Clocked(self._link.sub(members), self._clock)

    def _together(self, pending: Pending, takes: float, of: int | None = None) -> Pending:
        """After the last member has started, or one of them."""
        if self.size == 1:
            return pending
        starts = torch.zeros(self.size, dtype=torch.float64)
        starts[self.index] = self._clock.now
        told = self._link.all_reduce(starts)

        def arrive() -> None:
            self._clock.wait_until(float(starts.max() if of is None else starts[of]) + takes)

        return _Timed([pending, told], arrive)
