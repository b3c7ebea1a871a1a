"""What a coordinator is to hold to (``coordinator.py`` says what each mode is)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["sync", "async", "stale", "local"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a coordinator is to hold to."""

    workers: int
    shards: int
    mode: Mode = "sync"
    staleness: int = 0
    """Of ``stale``: by how many clocks a worker may be ahead of the slowest."""
    backups: int = 0
    """Of ``sync``: for how many workers a clock does not wait."""
    scaled: bool = False
    """Of ``async``: divide an update by its staleness + 1."""
    clip_norm: float | None = None
    """Of ``sync`` and ``stale``: the most that the norm of an update's gradient may be."""
    first_clock: int = 0
    """Of all workers, in a run that goes on; of ``local`` the steps of the run that are done."""
    local: "LocalRules | None" = None
    """Of ``local``."""

    @property
    def measures(self) -> bool:
        """Whether updates wait for the norm of their gradient."""
        return self.mode in {"sync", "stale"}

    @property
    def bound(self) -> int | None:
        """By how many clocks a worker may be ahead of the slowest, if there is a bound."""
        return self.staleness if self.measures else None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Rules":
        """From what ``dataclasses.asdict`` gives, also where it went through JSON."""
        local = plain["local"]
        return cls(**{**plain, "local": None if local is None else LocalRules(**local)})


@dataclass(frozen=True, kw_only=True)
class LocalRules:
    """What of ``local`` a coordinator holds to besides, and how far it has come where a run goes on."""

    every: int = 1
    """Local steps between two pushes of a worker."""
    dynamic: bool = False
    """Slower workers take fewer."""
    least: int = 1
    """But so many at least."""
    ordered: bool = False
    """Pushes are applied in the order of the workers, whatever comes first."""
    delay: int = 1
    """Pushes in a window of delayed Nesterov."""
    window: tuple[float, float, float] = (0, 0.0, 0.0)
    """``Window`` without its delay."""
    speeds: tuple[float, ...] = ()
    """Of the workers, steps a second; 0 where it is not known."""
    steps: tuple[int, ...] = ()
    """Local steps of each worker so far."""
    histogram: tuple[tuple[int, int], ...] = ()
    """Pushes so far by their staleness."""
