"""The axes of a chart: what runs along it, how values become pixels, and which of them are labelled."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from paceline.track.markup import Markup, element
from paceline.track.words import count, quantity, rate

LEFT, RIGHT = 48, 46
"""Pixels beside the curves."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step, shown on every chart."""

    step: float
    """Or another place on the axis, of what was ``chosen`` there."""
    kind: Literal["resume", "checkpoint", "warning", "chosen"]
    text: str


@dataclass(frozen=True)
class Steps:
    """The horizontal axis: steps from ``first`` to ``last``, tokens seen where known, and marks."""

    first: int
    last: int
    tokens_seen: Sequence[tuple[int, int]] = ()
    """(step, tokens seen), ascending."""
    marks: Sequence[Mark] = ()

    log: ClassVar[bool] = False

    def words(self, step: float) -> str:
        """A place in words."""
        return f"step {step:,.0f}"

    def tokens_at(self, step: float) -> float | None:
        """Tokens seen at a step, between known steps by a straight line; None outside of them."""
        place = bisect_left(self.tokens_seen, (step, 0))
        if place == len(self.tokens_seen):
            return None
        right, right_tokens = self.tokens_seen[place]
        if right == step or place == 0:
            return right_tokens if right == step else None
        left, left_tokens = self.tokens_seen[place - 1]
        return left_tokens + (right_tokens - left_tokens) * (step - left) / (right - left)


@dataclass(frozen=True)
class Quantity:
    """A horizontal axis of something else than steps, from ``first`` to ``last``; of powers of ten with ``log``."""

    name: str
    first: float
    last: float
    log: bool = False
    marks: Sequence[Mark] = ()

    def words(self, value: float) -> str:
        """A place in words."""
        return f"{self.name} {quantity(value)}"


class Scale:
    """Maps ``low..high`` to ``start..end`` pixels; a range of no width maps to the middle."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside are held at the edge."""
        if self.high == self.low:
            return (self._start + self._end) / 2
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self._start + share * (self._end - self._start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers (1, 2 or 5 times a power of ten) within ``low..high``, evenly spaced."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [place * step for place in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` numbers within ``low..high``: 1, 2 and 5 of each power of ten, or every so many powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of evenly spaced ticks, all with the digits that tell them apart and the same unit."""
    largest = max(abs(value) for value in values)
    if 0 < largest < 0.0095:
        return [f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0" for value in values]
    units = [(1e9, "B"), (1e6, "M"), (1e3, "k")]
    divisor, unit = next(((size, name) for size, name in units if largest >= 10 * size), (1.0, ""))
    spacing = min((b - a for a, b in pairwise(values)), default=largest) / divisor
    digits = max(0, -math.floor(math.log10(spacing) + 1e-9)) if spacing else 0
    return [f"{value / divisor:,.{digits}f}{unit}" if value else "0" for value in values]


def bottom(along: Steps | Quantity, across: Scale, width: int, base: int) -> list[Markup]:
    """The horizontal axis, ``base`` pixels from the top, with its labels."""
    line = element("line", class_="axis", x1=LEFT, x2=width - RIGHT, y1=base, y2=base)
    if isinstance(along, Steps):
        return [line, *_steps(along, across, width, base)]
    return [line, *_quantities(along, across, width, base)]


def _quantities(along: Quantity, across: Scale, width: int, base: int) -> list[Markup]:
    most = width // 70
    places = log_ticks(along.first, along.last, most) if along.log else ticks(along.first, along.last, most)
    labels = [rate(place).replace(".00", "") for place in places] if along.log else tick_labels(places)
    name = element(
        "text", along.name, class_="tick name", x=(LEFT + width - RIGHT) / 2, y=base + 31, text_anchor="middle"
    )
    parts = [name]
    for place, label in zip(places, labels, strict=True):
        x = across(place)
        parts.append(element("line", class_="axis", x1=x, x2=x, y1=base, y2=base + 3))
        parts.append(element("text", label, class_="tick", x=x, y=base + 15, text_anchor="middle"))
    return parts


def _steps(steps: Steps, across: Scale, width: int, base: int) -> list[Markup]:
    parts = []
    parts.append(element("text", "step", class_="tick name", x=LEFT - 6, y=base + 15, text_anchor="end"))
    if steps.tokens_seen:
        parts.append(element("text", "tokens", class_="tick name", x=LEFT - 6, y=base + 29, text_anchor="end"))
    places = [place for place in ticks(steps.first, steps.last, width // 85) if place == round(place)]
    for place in places:
        x = across(place)
        parts.append(element("line", class_="axis", x1=x, x2=x, y1=base, y2=base + 3))
        parts.append(element("text", f"{place:,.0f}", class_="tick", x=x, y=base + 15, text_anchor="middle"))
        tokens = steps.tokens_at(place)
        if tokens is not None:
            parts.append(element("text", count(tokens), class_="tick name", x=x, y=base + 29, text_anchor="middle"))
    return parts
