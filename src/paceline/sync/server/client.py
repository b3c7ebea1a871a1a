"""What a worker says to a server, as exchanges without input or output.

An exchange is a generator: it yields requests, each with whom it is for, and is sent their answers. Who drives it asks
again until every request is answered, with the same words. So what runs over sockets and what is simulated is the same.
"""

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar

from paceline.errors import LinkError
from paceline.sync.server import messages as m

T = TypeVar("T")


class GivenUp(LinkError):
    """This worker was taken for dead: what it has staged and not committed is void. It may join again."""


COORDINATOR = -1
"""Whom a request is for, where it is for no shard."""
Asked: TypeAlias = list[tuple[int, m.Request]]
Exchange: TypeAlias = Generator[Asked, Sequence[m.Answer], T]


class Client:
    """One rank of a worker. Its leader joins, commits and asks for turns; every rank stages and pulls its own."""

    def __init__(self, worker: int, life: int, rank: int, *, shards: int, staleness: int | None) -> None:
        self.worker, self.life, self.rank = worker, life, rank
        self._shards = range(shards)
        self._staleness = staleness

    def join(self) -> Exchange[m.Joined]:
        """Say that this worker is here."""
        return self._one(m.Join(self.worker, self.life), m.Joined)

    def leave(self) -> Exchange[m.Done]:
        """Say that it ends."""
        return self._one(m.Leave(self.worker, self.life), m.Done)

    def stage(self, number: int, payloads: Sequence[Any]) -> Exchange[None]:
        """Give each shard this rank's part of push ``number``."""
        push = m.Push(self.worker, self.life, number)
        answers = yield [(shard, m.Stage(push, self.rank, payloads[shard])) for shard in self._shards]
        _check(answers, m.Done)

    def commit(
        self, number: int, *, clock: int, targets: float, rate: float, stop: bool = False, seconds: float = 0.0
    ) -> Exchange[m.Committed]:
        """All ranks have staged it."""
        push = m.Push(self.worker, self.life, number)
        return self._one(m.Commit(push, clock, targets, rate, stop, seconds), m.Committed)

    def turn(self, clock: int, *, meet: int = 0) -> Exchange[m.Granted]:
        """Wait until a clock may begin; the bound on staleness is checked here again.

        The clock before which the run ends is always a meeting.
        """
        granted = yield from self._one(m.Turn(self.worker, self.life, clock, meet), m.Granted)
        if granted.stop == granted.clock and not meet:
            granted = yield from self._one(m.Turn(self.worker, self.life, granted.clock, 1), m.Granted)
        if self._staleness is not None and granted.clock - granted.floor > self._staleness:
            raise LinkError(
                f"the server let worker {self.worker} begin clock {granted.clock} while the slowest is at "
                f"{granted.floor}: that is more than staleness={self._staleness}, and should never happen"
            )
        return granted

    def lease(self, clock: int, *, until: int | None = None) -> Exchange[m.Granted]:
        """What to learn from next, or that all have met. After that: where they meet next."""
        turn = m.Turn(self.worker, self.life, clock, until is not None, until or 0)
        return self._one(turn, m.Granted)

    def pull(self, granted: m.Granted, wanted: Sequence[Any]) -> Exchange[list[Any]]:
        """This rank's parts of the version granted, from each shard."""
        answers = yield [
            (shard, m.Pull(self.worker, self.life, self.rank, granted.entry, granted.version, wanted[shard]))
            for shard in self._shards
        ]
        _check(answers, m.Values)
        assert all(answer.version == granted.version for answer in answers)  # type: ignore[union-attr]
        return [answer.payload for answer in answers]  # type: ignore[union-attr]

    def _one(self, request: m.Request, kind: type[T]) -> Exchange[T]:
        (answer,) = yield [(COORDINATOR, request)]
        _check([answer], kind)
        return answer  # type: ignore[return-value]


def _check(answers: Sequence[m.Answer], kind: type) -> None:
    for answer in answers:
        if isinstance(answer, m.Refused):
            raise (GivenUp if answer.join else LinkError)(f"the parameter server refused: {answer.reason}")
        assert isinstance(answer, kind), (answer, kind)
