"""What a server remembers of itself, so that it comes back with nothing lost and nothing twice."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Log(Protocol):
    """A snapshot, and what happened since. A record is kept before what follows from it is told to anyone."""

    def append(self, record: Any) -> None:
        """Keep one more record."""

    keeps: bool
    """Whether anything is kept."""

    def replace(self, snapshot: Mapping[str, Any]) -> None:
        """Keep a state, in place of all records up to now: in one step, or not at all."""

    def read(self) -> tuple[Mapping[str, Any] | None, Iterator[Any]]:
        """The newest snapshot, if there is one, and the records after it."""
        ...

    @property
    def is_long(self) -> bool:
        """Whether a snapshot is due."""
        ...


class NoLog:
    """Of a server whose death ends the run."""

    keeps = is_long = False

    def append(self, record: Any) -> None:
        """Forget it."""

    def replace(self, snapshot: Mapping[str, Any]) -> None:
        """Forget it."""

    def read(self) -> tuple[Mapping[str, Any] | None, Iterator[Any]]:
        """Nothing."""
        return None, iter(())


class MemoryLog:
    """In this process: it outlives the server object, not the process. For simulations."""

    keeps = True

    def __init__(self, longest: int = 1_000_000) -> None:
        self.snapshot: Mapping[str, Any] | None = None
        self.records: list[Any] = []
        self._longest = longest

    @property
    def is_long(self) -> bool:
        """As soon as there are ``longest`` records."""
        return len(self.records) >= self._longest

    def append(self, record: Any) -> None:
        """Keep it."""
        self.records.append(record)

    def replace(self, snapshot: Mapping[str, Any]) -> None:
        """Keep it alone."""
        self.snapshot, self.records = snapshot, []

    def read(self) -> tuple[Mapping[str, Any] | None, Iterator[Any]]:
        """All of it."""
        return self.snapshot, iter(list(self.records))
