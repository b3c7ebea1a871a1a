"""What ``wan.py`` measures on a rank: what its link does, and how long its sync takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from emulator import sent_bytes

from paceline.comm.link import Link
from paceline.train.hooks import StepEvent

PROBE_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a link does before anything is trained."""

    small_s: float
    """An all-reduce of 4 bytes, one after the other: of two members that are not in step one waits twice, then not."""
    bits_per_s: float
    """What a rank sends in a large one."""


def probe(link: Link) -> Probe:
    """How long exchanges take, after one that opens the connections."""
    times: dict[int, float] = {}
    for n_bytes, tries in ((4, 4), (PROBE_BYTES, 2)):
        link.all_reduce(torch.zeros(n_bytes // 4)).wait()
        start = time.perf_counter()
        for _ in range(tries):
            link.all_reduce(torch.zeros(n_bytes // 4)).wait()
        times[n_bytes] = (time.perf_counter() - start) / tries
    share = 2 * (link.size - 1) / link.size
    return Probe(small_s=times[4], bits_per_s=8 * share * PROBE_BYTES / times[PROBE_BYTES])


class Meter:
    """A sync that takes the time it needs, and is otherwise the one it wraps; fills up the rest of each step."""

    def __init__(self, sync: Any, compute_s: float) -> None:
        self._sync, self._least_s = sync, compute_s
        self._inside_s = 0.0
        self._end = time.perf_counter()
        self.steps: list[tuple[float, float, int]] = []
        """Of each step: seconds in all, seconds outside of the sync, and bytes sent so far."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sync, name)

    def begin(self, *arguments: Any) -> Any:
        """See ``Sync``."""
        with self.counted(1):
            return self._sync.begin(*arguments)

    def reduce(self, *arguments: Any) -> Any:
        """See ``Sync``."""
        with self.counted(1):
            return self._sync.reduce(*arguments)

    def update(self, replica: Any) -> Any:
        """See ``Sync``; what the replica does to finish its step is not the sync's."""
        with self.counted(1):
            return self._sync.update(_Finishing(replica, self))

    def stepped(self, _: StepEvent) -> None:
        """At the end of each step: sleep until its computation has taken long enough."""
        outside = time.perf_counter() - self._end - self._inside_s
        time.sleep(max(0.0, self._least_s - outside))
        now = time.perf_counter()
        self.steps.append((now - self._end, now - self._end - self._inside_s, sent_bytes()))
        self._end, self._inside_s = now, 0.0

    @contextmanager
    def counted(self, sign: int) -> Iterator[None]:
        """Time that is the sync's (1), or is not after all (-1)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._inside_s += sign * (time.perf_counter() - start)


class _Finishing:
    """A replica whose own part of the step is not counted as the sync's."""

    def __init__(self, replica: Any, meter: Meter) -> None:
        self._replica, self._meter = replica, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replica, name)

    def finish(self, vote: Any) -> Any:
        with self._meter.counted(-1):
            return self._replica.finish(vote)
