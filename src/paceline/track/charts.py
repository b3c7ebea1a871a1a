"""Line charts over training steps, or over another quantity, drawn as SVG without a library.

All charts of a report share one ``Steps``: the same range, the same tokens beneath the ticks, the same marks. Colours
and type come from a style sheet by class name (``charts.css``), so that one picture serves light, dark and paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from paceline.track.axes import LEFT, RIGHT, Mark, Quantity, Scale, Steps, bottom, log_ticks, tick_labels, ticks
from paceline.track.curves import Point, thin
from paceline.track.markup import Markup, element, join
from paceline.track.words import quantity

TOP, BOTTOM = 18, 38
LABEL_PX = 13  # height of a line of labels
MOST_DOTS = 60


@dataclass(frozen=True)
class Line:
    """One curve: ``raw`` is faint, without a number at its end, ``dots`` are measurements, ``area`` is filled.

    ``second`` to ``fifth`` are like ``main``, in other colours.
    """

    name: str
    points: Sequence[Point]
    style: Literal["main", "second", "third", "fourth", "fifth", "raw", "dots", "area"] = "main"


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
    is_named: bool = False
    """The names of the curves stand above them, in their colours: for a picture without a legend beside it."""

    def values(self) -> list[float]:
        """Every number that is drawn as a curve."""
        return [y for line in self.lines for _, y in line.points if y is not None]


def draw(chart: Chart, along: Steps | Quantity, width: int = 372, height: int = 230, style: str = "") -> Markup:
    """The chart as an ``svg`` element of ``width`` x ``height`` pixels that scales with the page.

    With a ``style`` sheet of its own (``charts.css``) the text is a whole SVG file.
    """
    across = Scale(along.first, along.last, LEFT, width - RIGHT, log=along.log)
    up = _vertical(chart, height)
    parts = [
        *_grid(up, width, height),
        *_marks(along.marks, across, height, named=width > 500),
        *(_line(line, across, up) for line in chart.lines),
        *_levels(chart, up, width),
        *_ends(chart, across, up),
        *_above(chart, along, up, width),
        *bottom(along, across, width, height - BOTTOM),
        *(_names(chart, width) if chart.is_named else ()),
    ]
    return element(
        "svg",
        *([element("style", Markup(style))] if style else []),
        element("title", ", ".join(filter(None, (chart.title, chart.unit)))),
        element("desc", description(chart, along)),
        *parts,
        xmlns="http://www.w3.org/2000/svg" if style else None,
        viewBox=f"0 0 {width} {height}",
        role="img",
    )


def description(chart: Chart, along: Steps | Quantity) -> str:
    """The chart in words, for those who do not see it."""
    sentences = []
    for line in chart.lines:
        known = [(x, y) for x, y in line.points if y is not None]
        if known:
            (x0, y0), (x1, y1) = known[0], known[-1]
            low, high = min(y for _, y in known), max(y for _, y in known)
            sentences.append(
                f"{line.name}: {quantity(y0)} at {along.words(x0)}, {quantity(y1)} at {along.words(x1)}, "
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
        title = element("title", f"step {mark.step:,}: {mark.text}" if mark.kind != "chosen" else mark.text)
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


def _above(chart: Chart, along: Steps | Quantity, up: Scale, width: int) -> list[Markup]:
    """What is cut off at the top, in words."""
    beyond = [[(y, x) for x, y in line.points if y is not None and y > up.high] for line in chart.lines]
    highest = max(beyond, key=lambda points: max(points, default=(up.high, 0)))
    if not highest:
        return []
    (y, x), number = max(highest), len(highest)
    words = f"{number} step{'s' * (number != 1)} above, up to {quantity(y)} at {along.words(x)} \u2191"
    return [element("text", words, class_="tick", x=width - RIGHT, y=TOP - 6, text_anchor="end")]


def _names(chart: Chart, width: int) -> list[Markup]:
    """The names of the curves in one line above them."""
    spans: list[Markup] = []
    for line in chart.lines:
        if line.name and line.style != "raw":
            spans.append(element("tspan", line.name, class_=f"end {line.style}", dx="14" if spans else None))
    return [element("text", *spans, x=LEFT, y=TOP - 6)]
