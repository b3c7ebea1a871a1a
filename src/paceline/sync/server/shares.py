"""Shares of a run that workers take as they come to them, so that each is learned from exactly once.

A run of S steps and n workers has S n shares (``messages.Lease``). They are given out up to where all workers meet
next. What a worker that is gone had taken comes back, and is given to another.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from paceline.sync.server.messages import Lease


@dataclass
class Pool:
    """The shares up to the next meeting.

    ``blocks``: they are given out by blocks of ``every`` steps, of which a worker has its own part of each step where
    it can. Else in the order of the steps, so that all workers are at about the same step however fast they are.
    """

    workers: int
    every: int
    blocks: bool
    begin: int = 0
    end: int = 0
    """Shares from ``begin`` to ``end`` have never been given out."""
    free: list[Lease] = field(default_factory=list)
    """Besides these: what came back, and the rest of a block."""

    @property
    def left(self) -> int:
        """Shares that are not given out."""
        return self.end - self.begin + sum(lease.length for lease in self.free)

    @property
    def steps(self) -> int:
        """The step after which all meet."""
        return self.end // self.workers

    def open(self, until: int) -> None:
        """Give out what there is up to a step."""
        assert self.left == 0 and until * self.workers > self.end, (self, until)
        self.end = until * self.workers

    def close(self) -> None:
        """Meet as soon as it can be, after a whole step."""
        self.end = -(-self.begin // self.workers) * self.workers

    def take(self, worker: int, count: int) -> Lease:
        """Some shares, ``count`` at most and one at least."""
        assert self.left > 0 and count > 0, (self, count)
        if self.blocks:
            return self._take_of_block(worker)
        if not self.free:
            lease = Lease(self.begin, 1, min(count, self.end - self.begin))
            self.begin += lease.length
            return lease
        first, stride, held = self.free.pop(0)
        if held > count:
            self.free.insert(0, Lease(first + count * stride, stride, held - count))
        return Lease(first, stride, min(count, held))

    def give_back(self, lease: Lease) -> None:
        """Nobody has learned from these."""
        self.free = sorted([*self.free, lease])

    def saved(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "free": [list(lease) for lease in self.free]}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Pool":
        """As it was saved."""
        return cls(**{**saved, "free": [Lease(*lease) for lease in saved["free"]]})

    def _take_of_block(self, worker: int) -> Lease:
        if not self.free:
            steps = min(self.every, (self.end - self.begin) // self.workers)
            self.free = [Lease(self.begin + part, self.workers, steps) for part in range(self.workers)]
            self.begin += steps * self.workers
        own = [lease for lease in self.free if lease.first % self.workers == worker]
        lease = (own or self.free)[0]
        self.free.remove(lease)
        return lease


def length_by_speed(own: float, speeds: Mapping[int, float], *, every: int, least: int) -> int:
    """Local steps in proportion to a worker's speed: floor(H v / max v) (Liu et al. 2024), but ``least`` at least."""
    return min(every, max(least, int(every * own / max(speeds.values()))))


def dynamic_steps(worker: int, speeds: Mapping[int, float], left: int, *, every: int, least: int) -> int:
    """How many shares a worker takes of those that are left, by the speeds of all workers that are there.

    By its speed, so that a push takes all workers as long. Towards a meeting its part of what is left, so that all come
    to it at about the same time. 0: others will be done with all that is left before this one could be with any.
    """
    fastest, own = max(speeds.values()), speeds[worker]
    by_speed = length_by_speed(own, speeds, every=every, least=least)
    part = -int(-left * own // sum(speeds.values()))
    count = min(left, max(least, min(by_speed, part)))
    return 0 if left / fastest < count / own else count
