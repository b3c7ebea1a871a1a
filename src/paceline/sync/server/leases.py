"""Which workers are to be given up: those whose connection to the coordinator has been gone for too long.

A worker that ends, or is killed, hangs up; of a machine that vanishes the kernel says so after half a minute, for it
asks (``wire.watched``). A worker that is slow keeps its connection, and is waited for.
"""

from collections.abc import Mapping
from typing import Any


class Leases:
    """``lease_s`` None: none is ever given up. ``lives``: of the workers that a server knows when it comes back; they
    have the whole time to be heard of again."""

    def __init__(self, lease_s: float | None, lives: Mapping[int, int], now_s: float) -> None:
        self._lease_s = lease_s
        self._at: dict[int, tuple[int, Any]] = {}
        """By worker: its life, and the connection on which it was heard last."""
        self._lost: dict[int, tuple[int, float]] = {worker: (life, now_s) for worker, life in lives.items()}

    def heard(self, worker: int, life: int, connection: Any) -> None:
        """Of a worker's request."""
        self._at[worker] = life, connection
        self._lost.pop(worker, None)

    def hung_up(self, connection: Any, now_s: float) -> None:
        """Of a connection that is gone."""
        for worker, (life, at) in list(self._at.items()):
            if at is connection:
                del self._at[worker]
                self._lost[worker] = life, now_s

    def over(self, now_s: float) -> list[tuple[int, int]]:
        """Workers to be given up now, and their lives; each is named once."""
        if self._lease_s is None:
            return []
        gone = [(worker, life) for worker, (life, since) in self._lost.items() if now_s - since > self._lease_s]
        for worker, _ in gone:
            del self._lost[worker]
        return gone
