"""Which source gives sample i of a weighted mixture: exact, by random access, without random numbers.

After any number of samples each source has given its weight's share to within one sample. The shares are exact
fractions, so the pattern repeats after a period of L samples and is kept as a table of one period. Within it, source
with share w gives its sample c in a slot not before floor(c / w) and before ceil((c + 1) / w); serving the earliest
deadline first always meets these windows when the shares sum to one, and the windows are what keeps every prefix within
one sample (Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", Algorithmica 1996).
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from paceline.data.rows import Ints
from paceline.errors import ConfigError

LONGEST_PERIOD = 1_000_000


class Mixture:
    """The order in which weighted sources take turns.

    Weights are positive numbers of any scale; each means exactly its decimal text. Raises ``ConfigError`` where the
    period would be longer than a million samples.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        parts = _parts(weights)
        self.period = sum(parts)
        if self.period > LONGEST_PERIOD:
            raise ConfigError(
                f"data.source: the weights {', '.join(map(str, weights))} repeat only after {self.period} samples, "
                f"more than {LONGEST_PERIOD}; write them with fewer digits"
            )
        self._parts = np.array(parts, np.int64)  # (sources,) samples of each source in a period
        self._turns = _earliest_deadline_first(self._parts)  # (period,) whose turn it is
        self._within = np.empty(self.period, np.int64)  # (period,) how many turns that source had before in the period
        for source, part in enumerate(parts):
            self._within[self._turns == source] = np.arange(part)

    def __call__(self, samples: Ints) -> tuple[Ints, Ints]:
        """Source (k,) and index within that source (k,) of global samples (k,)."""
        periods, slots = np.divmod(samples, self.period)
        sources = self._turns[slots]
        return sources, periods * self._parts[sources] + self._within[slots]

    def counts(self, position: int) -> Ints:
        """How many of the first ``position`` samples each source gives, (sources,)."""
        periods, slots = divmod(position, self.period)
        return periods * self._parts + np.bincount(self._turns[:slots], minlength=self._parts.size)


def _parts(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportion of the weights."""
    exact = [Fraction(str(weight)) for weight in weights]
    assert exact and min(exact) > 0, weights
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    return [int(share * period) for share in shares]


def _earliest_deadline_first(parts: Ints) -> Ints:
    """One slot for each turn of each source inside its window; ties go to the source named first."""
    period, sources = int(parts.sum()), len(parts)
    source = np.repeat(np.arange(sources), parts)
    turn = np.concatenate([np.arange(part) for part in parts])
    release = turn * period // parts[source]
    deadline = -(-(turn + 1) * period // parts[source])
    by_release = np.argsort(release, kind="stable")
    urgency = (deadline * sources + source)[by_release].tolist()  # one whole number: deadline, then source
    released = np.searchsorted(release[by_release], np.arange(period), side="right").tolist()
    waiting: list[int] = []
    turns = np.empty(period, np.int64)
    pushed = 0
    for slot in range(period):
        for job in urgency[pushed : released[slot]]:
            heapq.heappush(waiting, job)
        pushed = released[slot]
        turns[slot] = heapq.heappop(waiting) % sources
    return turns
