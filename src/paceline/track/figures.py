"""Which pictures a report shows, each from the records of a run."""

from paceline.track.charts import Chart, Line, draw
from paceline.track.curves import smooth, smoothing_steps
from paceline.track.folder import RunFolder
from paceline.track.markup import Markup, element, join
from paceline.track.verdict import baselines

LEGEND = {"raw": "each step", "main": "smoothed", "dots": "held-out", "area": "waiting for data"}
MARKS = {"resume": "continued from a checkpoint", "checkpoint": "checkpoint", "warning": "warning"}


def figures(run: RunFolder) -> Markup:
    """Every picture there is data for, the loss twice as wide as the others where the page allows."""
    if not (run.metrics or run.evaluations):
        return Markup()
    steps = run.steps()
    shown = []
    for chart in _charts(run):
        if not chart.values():
            continue
        pictures = [draw(chart, steps)]
        if chart.title == "Loss":
            pictures = [
                element("div", draw(chart, steps, 776, 300), class_="for-wide"),
                element("div", *pictures, class_="for-narrow"),
            ]
        if chart.title == "Held-out":
            pictures = [draw(chart, steps, 372, 300)]
        caption = element("figcaption", element("b", chart.title), " ", chart.unit, _legend(chart))
        shown.append(element("figure", caption, *pictures, class_="wide" if chart.title == "Loss" else None))
    kinds = {mark.kind for mark in steps.marks}
    keys = [element("span", words, class_=f"key {kind}") for kind, words in MARKS.items() if kind in kinds]
    return join(element("div", *shown, class_="figures"), element("p", *keys, class_="keys") if keys else "")


def _legend(chart: Chart) -> Markup:
    """The names of the curves: all of them for the loss, elsewhere those that are not told there."""
    told = set() if chart.title == "Loss" else {"raw", "main", "dots"}
    keys = [element("span", line.name, class_=f"key {line.style}") for line in chart.lines if line.style not in told]
    return element("span", *keys, class_="legend") if keys else Markup()


def _charts(run: RunFolder) -> list[Chart]:
    return [
        Chart("Loss", "nats per token", _loss_lines(run)),
        _held_out(run),
        Chart("Learning rate", "", [_line(run, "lr", "learning rate")], from_zero=True),
        Chart("Gradient norm", "global, before clipping", _smoothed(run, "gradient_norm"), log_if_wide=True),
        Chart(
            "Loss scale", "halved where a step was skipped", [_line(run, "loss_scale", "loss scale")], log_if_wide=True
        ),
        Chart("Speed", "tokens per second", _smoothed(run, "tokens_per_s"), from_zero=True),
        _memory(run),
        _step_time(run),
    ]


def _loss_lines(run: RunFolder) -> list[Line]:
    held_out = run.held_out("loss")
    return [*_smoothed(run, "loss"), *([Line("held-out", held_out, "dots")] if held_out else [])]


def _held_out(run: RunFolder) -> Chart:
    measured = run.held_out("bits_per_byte")
    return Chart("Held-out", "bits per byte", [Line("model", measured, "dots")] if measured else [], baselines(run))


def _memory(run: RunFolder) -> Chart:
    largest = max((value for value in run.column("memory_bytes") if value is not None), default=0)
    unit, power = ("GiB", 30) if largest >= 2**30 else ("MiB", 20)
    return Chart("Memory", unit, [_line(run, "memory_bytes", "memory", scale=2.0**-power)], from_zero=True)


def _step_time(run: RunFolder) -> Chart:
    lines = _smoothed(run, "step_s", scale=1000)
    waits = _line(run, "data_wait_s", LEGEND["area"], scale=1000)
    known = any(value is not None for _, value in waits.points)
    area = [Line(waits.name, waits.points, "area")] if known else []
    return Chart("Step time", "milliseconds", [*area, *lines], from_zero=True)


def _line(run: RunFolder, key: str, name: str, scale: float = 1.0) -> Line:
    values = [None if value is None else value * scale for value in run.column(key)]
    return Line(name, run.points(values))


def _smoothed(run: RunFolder, key: str, scale: float = 1.0) -> list[Line]:
    raw = _line(run, key, LEGEND["raw"], scale)
    average = smooth([value for _, value in raw.points], smoothing_steps(len(raw.points)))
    return [Line(raw.name, raw.points, "raw"), Line(LEGEND["main"], run.points(average))]
