"""Line charts over training steps, drawn as SVG without a library.

All charts of a report share one ``Steps``: the same range, the same tokens beneath the ticks, the same marks. Colours
and type come from the page's style sheet by class name, so that one picture serves light, dark and paper.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from paceline.track.curves import Point, thin
from paceline.track.markup import Markup, element, join
from paceline.track.words import count, quantity

LEFT, RIGHT, TOP, BOTTOM = 48, 46, 18, 38
LABEL_PX = 13  # height of a line of labels
MOST_DOTS = 60


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step, shown on every chart."""

    step: int
    kind: Literal["resume", "checkpoint", "warning"]
    text: str


@dataclass(frozen=True)
class Steps:
    """The horizontal axis: steps from ``first`` to ``last``, tokens seen where known, and marks."""

    first: int
    last: int
    tokens_seen: Sequence[tuple[int, int]] = ()
    """(step, tokens seen), ascending."""
    marks: Sequence[Mark] = ()

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
class Line:
    """One curve: ``raw`` is faint, without a number at its end, ``dots`` are measurements, ``area`` is filled."""

    name: str
    points: Sequence[Point]
    style: Literal["main", "raw", "dots", "area"] = "main"


@dataclass(frozen=True)
class Chart:
    """A picture: curves of one unit, and levels to compare them with."""

    title: str
    unit: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = field(default=())
    from_zero: bool = False
    log_if_wide: bool = False
    """A logarithmic axis when the values span a factor of more than 30."""

    def values(self) -> list[float]:
        """Every number that is drawn as a curve."""
        return [y for line in self.lines for _, y in line.points if y is not None]


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


def draw(chart: Chart, steps: Steps, width: int = 372, height: int = 230) -> Markup:
    """The chart as an ``svg`` element of ``width`` x ``height`` pixels that scales with the page."""
    across = Scale(steps.first, steps.last, LEFT, width - RIGHT)
    up = _vertical(chart, height)
    parts = [
        *_grid(up, width, height),
        *_marks(steps.marks, across, height, named=width > 500),
        *(_line(line, across, up) for line in chart.lines),
        *_levels(chart, up, width),
        *_ends(chart, across, up),
        *_above(chart, up, width),
        *_bottom(steps, across, width, height),
    ]
    return element(
        "svg",
        element("title", f"{chart.title}, {chart.unit}"),
        element("desc", description(chart)),
        *parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
    )


def description(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    sentences = []
    for line in chart.lines:
        known = [(x, y) for x, y in line.points if y is not None]
        if known:
            (x0, y0), (x1, y1) = known[0], known[-1]
            low, high = min(y for _, y in known), max(y for _, y in known)
            sentences.append(
                f"{line.name}: {quantity(y0)} at step {x0:,.0f}, {quantity(y1)} at step {x1:,.0f}, "
                f"between {quantity(low)} and {quantity(high)}."
            )
    sentences += [f"{name}: {quantity(value)}." for name, value in chart.levels]
    return " ".join(sentences)


def _vertical(chart: Chart, height: int) -> Scale:
    values = sorted(chart.values())
    low, high = values[0], values[-1]
    log = chart.log_if_wide and low > 0 and high > 30 * low
    if not log:
        usual_low, usual = values[len(values) // 100], values[(len(values) * 99) // 100]
        if high > 2 * usual and high - usual > 4 * (usual - usual_low):
            high = usual + 0.5 * (usual - usual_low)  # a few extremes would flatten all else; they are named above
        low = min([low, *(value for _, value in chart.levels)])
        high = max([high, *(value for _, value in chart.levels)])
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = (min(low, 0.0) if chart.from_zero else low - pad), high + pad
    return Scale(low, high, height - BOTTOM, TOP, log=log)


def _grid(up: Scale, width: int, height: int) -> list[Markup]:
    most = height // 36
    places = log_ticks(up.low, up.high, most) if up.log else ticks(up.low, up.high, most)
    labels = [quantity(place).rstrip("0").rstrip(".") for place in places] if up.log else tick_labels(places)
    parts = []
    for place, label in zip(places, labels, strict=True):
        y = up(place)
        parts.append(element("line", class_="grid", x1=LEFT, x2=width - RIGHT, y1=y, y2=y))
        parts.append(element("text", label, class_="tick", x=LEFT - 6, y=y + 4, text_anchor="end"))
    return parts


def _levels(chart: Chart, up: Scale, width: int) -> list[Markup]:
    parts = []
    for name, value in chart.levels:
        y = up(value)
        parts.append(element("line", class_="level", x1=LEFT, x2=width - RIGHT, y1=y, y2=y))
        label = f"{name} {quantity(value)}"
        parts.append(element("text", label, class_="level", x=LEFT + 3, y=y - 4))
    return parts


def _marks(marks: Sequence[Mark], across: Scale, height: int, *, named: bool) -> list[Markup]:
    parts = []
    base = height - BOTTOM
    for mark in marks:
        x = across(mark.step)
        title = element("title", f"step {mark.step:,}: {mark.text}")
        if mark.kind == "checkpoint":
            shape = f"M{x:.1f},{base - 6}l3.5,6h-7z"
            parts.append(element("path", title, class_="checkpoint", d=shape))
            continue
        parts.append(element("line", title, class_=mark.kind, x1=x, x2=x, y1=TOP, y2=base))
        if named and mark.kind == "resume":
            parts.append(
                element("text", f"resumed at {mark.step:,}", class_="tick", x=x - 4, y=TOP + 9, text_anchor="end")
            )
    return parts


def _line(line: Line, across: Scale, up: Scale) -> Markup:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in thin(line.points):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((across(x), up(y)))
    runs = [run for run in runs if run]
    if line.style == "area":
        return element("path", class_="area", d="".join(_outline(run, up(up.low)) for run in runs))
    drawn = element("path", class_=line.style, d="".join("M" + _corners(run) for run in runs))
    places = [place for run in runs for place in run]
    if line.style != "dots" or len(places) > MOST_DOTS:
        places = [run[0] for run in runs if len(run) == 1]  # a path of one point would not be seen
    return join(drawn, *(element("circle", class_=line.style, cx=x, cy=y, r=2.5) for x, y in places))


def _corners(run: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f},{y:.1f}" for x, y in run)


def _outline(run: Sequence[tuple[float, float]], base: float) -> str:
    return f"M{run[0][0]:.1f},{base:.1f}L{_corners(run)}L{run[-1][0]:.1f},{base:.1f}z"


def _ends(chart: Chart, across: Scale, up: Scale) -> list[Markup]:
    """The last number of each curve beside its end, moved apart where they would overlap."""
    ends = []
    for line in chart.lines:
        known = [(x, y) for x, y in line.points if y is not None]
        if known and line.style != "raw":
            ends.append((up(known[-1][1]), across(known[-1][0]), quantity(known[-1][1]), line.style))
    parts: list[Markup] = []
    lowest = -math.inf
    for y, x, label, style in sorted(ends):
        lowest = max(y + 4, lowest + LABEL_PX)
        parts.append(element("text", label, class_=f"end {style}", x=x + 6, y=lowest))
    return parts


def _above(chart: Chart, up: Scale, width: int) -> list[Markup]:
    """What is cut off at the top, in words."""
    beyond = [[(y, x) for x, y in line.points if y is not None and y > up.high] for line in chart.lines]
    highest = max(beyond, key=lambda points: max(points, default=(up.high, 0)))
    if not highest:
        return []
    (y, x), number = max(highest), len(highest)
    words = f"{number} step{'s' * (number != 1)} above, up to {quantity(y)} at step {x:,.0f} \u2191"
    return [element("text", words, class_="tick", x=width - RIGHT, y=TOP - 6, text_anchor="end")]


def _bottom(steps: Steps, across: Scale, width: int, height: int) -> list[Markup]:
    base = height - BOTTOM
    parts = [element("line", class_="axis", x1=LEFT, x2=width - RIGHT, y1=base, y2=base)]
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
