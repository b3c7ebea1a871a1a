"""What is computed from a curve before it is looked at: smoothing, thinning, spikes and stalls.

A curve is a list of numbers, one a step, with None where there is none.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Sequence
from itertools import accumulate
from statistics import median

Values = Sequence[float | None]
Point = tuple[float, float | None]


def smoothing_steps(steps: int) -> int:
    """How far a curve of ``steps`` steps is smoothed: 2 % of it, and 3 steps at least."""
    return max(3, steps // 50)


class Smoother:
    """Exponential moving average without the bias of its start: the first value comes out as it went in."""

    def __init__(self, steps: int) -> None:
        self._keep = 1 - 1 / max(1, steps)
        self._sum = self._weight = 0.0

    def add(self, value: float | None) -> float | None:
        """Take the next value (None is passed over) and return the average; None before there is any."""
        if value is not None:
            self._sum = self._sum * self._keep + value
            self._weight = self._weight * self._keep + 1
        return self._sum / self._weight if self._weight else None


def smooth(values: Values, reach: int) -> list[float | None]:
    """The curve without its noise, None where it has no value: the median of ``reach`` values on each side of each
    place, which no single leap can move, and then the mean of half as many.

    Without lag: as many values after a place as before it, but near the end of the curve, where there are fewer.
    """
    known = [value for value in values if value is not None]
    rest = iter(_means(_medians(known, reach), reach // 2))
    return [None if value is None else next(rest) for value in values]


def _window(place: int, reach: int, length: int) -> tuple[int, int]:
    """First and end of what is looked at around a place; neither ever moves back."""
    return place - min(reach, place), place + min(reach, place, length - 1 - place) + 1


def _medians(values: Sequence[float], reach: int) -> list[float]:
    window: list[float] = []  # values[low:high], sorted
    low = high = 0
    medians = []
    for place in range(len(values)):
        first, end = _window(place, reach, len(values))
        for value in values[high:end]:
            insort(window, value)
        for value in values[low:first]:
            del window[bisect_left(window, value)]
        low, high = first, end
        medians.append((window[(len(window) - 1) // 2] + window[len(window) // 2]) / 2)
    return medians


def _means(values: Sequence[float], reach: int) -> list[float]:
    sums = [0.0, *accumulate(values)]
    windows = (_window(place, reach, len(values)) for place in range(len(values)))
    return [(sums[end] - sums[first]) / (end - first) for first, end in windows]


def thin(points: Sequence[Point], limit: int = 1000) -> list[Point]:
    """At most ``limit`` points that draw the same picture: the lowest and the highest of each of ``limit // 2`` bins.

    Both stand in their order. A bin in which every value is None keeps one None, so that the gap stays visible.
    """
    if len(points) <= limit:
        return list(points)
    bins = limit // 2
    kept: list[Point] = []
    for place in range(bins):
        part = points[place * len(points) // bins : (place + 1) * len(points) // bins]
        known = [(y, x) for x, y in part if y is not None]
        if not known:
            kept.append((part[0][0], None))
            continue
        extremes = sorted({(x, y) for y, x in (min(known), max(known))})
        kept += extremes
    return kept


class History:
    """The course of a value in at most ``2 * width`` numbers: when there are more, they are averaged in pairs."""

    def __init__(self, width: int = 256) -> None:
        self._width = width
        self._each = 1
        self._open: list[float] = []
        self._values: list[float] = []

    def add(self, value: float) -> None:
        """Take the next value."""
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self._values.append(sum(self._open) / self._each)
        self._open.clear()
        if len(self._values) == 2 * self._width:
            self._values = [(a + b) / 2 for a, b in zip(self._values[::2], self._values[1::2], strict=True)]
            self._each *= 2

    def bars(self, width: int) -> str:
        """The course as at most ``width`` block characters, from the lowest value (a low block) to the highest."""
        values = self._values + ([sum(self._open) / len(self._open)] if self._open else [])
        columns = min(width, len(values))
        cells = [
            values[place * len(values) // columns : (place + 1) * len(values) // columns] for place in range(columns)
        ]
        means = [sum(cell) / len(cell) for cell in cells]
        if not means:
            return ""
        low, high = min(means), max(means)
        return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low))] if high > low else "▁" for mean in means)


LEAST_LEAP = 0.1
"""Of the median: a smaller rise is no leap, however steady the curve was."""


def leaps(value: float, before: Collection[float], threshold: float = 10.0) -> bool:
    """Whether a value lies above the median of those before it by more than ``threshold`` times their usual distance
    from it (the median of the distances), and by more than a tenth of it."""
    leap = value - (middle := median(before))
    return leap > LEAST_LEAP * abs(middle) and leap > threshold * median(abs(x - middle) for x in before)


def spikes(values: Values, window: int = 50) -> list[int]:
    """Places where a curve leaps up from the ``window`` values before."""
    found = []
    before: deque[float] = deque(maxlen=window)
    for place, value in enumerate(values):
        if value is None:
            continue
        if len(before) >= 10 and leaps(value, before):
            found.append(place)
        before.append(value)
    return found


def stalls(seconds: Values, starts: Sequence[int] = (0,), warm_up: int = 3) -> list[int]:
    """Places where a step took over 5 times the median step, but for the first ``warm_up`` after each of ``starts``."""
    warm = {start + place for start in starts for place in range(warm_up)}
    known = [(place, value) for place, value in enumerate(seconds) if value is not None and place not in warm]
    if len(known) < 10:
        return []
    limit = 5 * median(value for _, value in known)
    return [place for place, value in known if value > limit]
