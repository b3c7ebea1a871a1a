"""Which clients take part in a round of a federated run, from which of their samples on: a function of (seed, round).

Clients are drawn uniformly and without replacement. How quick they are is simulated: a client's local step takes
exp(spread z) seconds, z a normal number drawn from (seed, client); so a client of median speed takes one. With
over-selection more are asked than are needed, and those that come last are not waited for; nor are those that come
after the deadline, but for the quickest of all.

With a buffer (FedBuff, Nguyen et al. 2022, arXiv 2106.06639, algorithm 1) there are no common rounds: so many clients
are always at work, each from the weights of the time at which it began; whoever is done hands in its update, and the
next idle client begins. A round is then the arrival of as many updates as the buffer holds. An update is stale by the
rounds that ended since it began; one that is too stale is thrown away.
"""

import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import NormalDist

import numpy as np

from paceline.data.permute import Permutation
from paceline.data.rows import Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A client's part in a round."""

    client: int
    place: int
    """Among the clients of the round, from 0."""
    first: int
    """Samples that it drew before."""
    rows: int
    """Samples that it learns from in this round, over all its local steps."""
    steps: int
    """Local steps."""
    data_rows: int
    """Rows that it has."""
    staleness: int = 0
    """Rounds that ended since it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Whose updates a round takes, and when it ends on the simulated clock."""

    visits: tuple[Visit, ...]
    time_s: float
    late: tuple[int, ...] = ()
    """Clients that were asked and not waited for."""

    @property
    def rows(self) -> int:
        """Samples that are learned from."""
        return sum(visit.rows for visit in self.visits)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rounds are made."""

    clients: int
    """Of a round; with a buffer, at work at the same time."""
    sequences: int
    """Of a local step."""
    local_steps: int | None
    """Of each client, or None for ``epochs`` over its own rows."""
    epochs: int = 1
    over_selection: float = 0.0
    """Share of clients that are asked on top."""
    deadline_s: float | None = None
    spread: float = 0.0
    buffer: int | None = None
    """Updates of a round that has no cohort."""
    max_staleness: int = 0


class Rounds:
    """All rounds of a run, found one after the other. ``data_rows`` (clients,): rows of each client."""

    def __init__(self, data_rows: Ints, rules: Rules, seed: int) -> None:
        self._data_rows, self._rules, self._seed = data_rows, rules, seed
        quick = NormalDist()
        self._pace_s = [
            math.exp(rules.spread * quick.inv_cdf(_uniform(seed, "speed", client))) if rules.spread else 1.0
            for client in range(len(data_rows))
        ]
        self._restart()

    def at(self, number: int) -> Round:
        """Round ``number``, 1-based; those asked for in their order cost least."""
        if number < self._number:
            self._restart()
        while self._number < number:
            self._number += 1
            self._round = self._buffered() if self._rules.buffer else self._cohort()
        return self._round

    def asked(self, number: int) -> tuple[Visit, ...]:
        """All clients that are asked in a round, in the order in which they were drawn, whoever of them comes."""
        self.at(number)
        return self._asked

    def _restart(self) -> None:
        self._number = 0
        self._round = Round(visits=(), time_s=0.0)
        self._asked: tuple[Visit, ...] = ()
        self._drawn = np.zeros(len(self._data_rows), np.int64)
        self._now_s, self._begun = 0.0, 0
        self._at_work: list[tuple[float, int, int, Visit]] = []
        self._idle = list(range(len(self._data_rows)))

    def _visit(self, client: int, place: int) -> Visit:
        """The client goes on in its own samples."""
        rules, data_rows = self._rules, int(self._data_rows[client])
        rows = rules.epochs * data_rows if rules.local_steps is None else rules.local_steps * rules.sequences
        first = int(self._drawn[client])
        self._drawn[client] += rows
        steps = -(-rows // rules.sequences)
        return Visit(client=client, place=place, first=first, rows=rows, steps=steps, data_rows=data_rows)

    def _cohort(self) -> Round:
        rules, clients = self._rules, len(self._data_rows)
        asked = min(clients, math.ceil(rules.clients * (1 + rules.over_selection)))
        drawn = Permutation(clients, (self._seed, "cohort", self._number))(np.arange(asked)).tolist()
        begun = [self._visit(client, place) for place, client in enumerate(drawn)]
        self._asked = tuple(begun)
        taken_s = [visit.steps * self._pace_s[visit.client] for visit in begun]
        quickest = sorted(range(asked), key=lambda place: (taken_s[place], place))[: rules.clients]
        limit_s = math.inf if rules.deadline_s is None else rules.deadline_s
        kept = [place for place in quickest if taken_s[place] <= limit_s] or quickest[:1]
        self._now_s += max(taken_s[place] for place in kept)
        return made_of(begun, {begun[place].client for place in kept}, self._now_s)

    def _buffered(self) -> Round:
        rules = self._rules
        assert rules.buffer is not None
        while len(self._at_work) < min(rules.clients, len(self._data_rows)):
            self._begin()
        arrived: list[Visit] = []
        while len(arrived) < rules.buffer:
            self._now_s, _, began_in, visit = heapq.heappop(self._at_work)
            staleness = self._number - began_in
            if staleness <= rules.max_staleness:
                arrived.append(_placed(visit, len(arrived), staleness))
            self._idle.append(visit.client)
            # Who begins after the last update of the buffer has the weights of the next round.
            self._begin(later=len(arrived) == rules.buffer)
        return Round(visits=tuple(arrived), time_s=self._now_s)

    def _begin(self, *, later: bool = False) -> None:
        """The next idle client begins."""
        self._begun += 1
        at = int(_uniform(self._seed, "begins", self._begun) * len(self._idle))
        self._idle[at], self._idle[-1] = self._idle[-1], self._idle[at]
        client = self._idle.pop()
        visit = self._visit(client, 0)
        done_s = self._now_s + visit.steps * self._pace_s[client]
        heapq.heappush(self._at_work, (done_s, self._begun, self._number + later, visit))


def made_of(asked: Sequence[Visit], came: Collection[int], time_s: float) -> Round:
    """The round of those that were asked and came, given by client."""
    kept = [visit for visit in asked if visit.client in came]
    late = tuple(visit.client for visit in asked if visit.client not in came)
    return Round(visits=tuple(_placed(visit, i) for i, visit in enumerate(kept)), time_s=time_s, late=late)


def _placed(visit: Visit, place: int, staleness: int = 0) -> Visit:
    return Visit(
        client=visit.client,
        place=place,
        first=visit.first,
        rows=visit.rows,
        steps=visit.steps,
        data_rows=visit.data_rows,
        staleness=staleness,
    )


def _uniform(*key: object) -> float:
    """Between 0 and 1, both excluded: a function of the key alone."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8, person=b"paceline-rounds").digest()
    return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52
