from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.track.axes import Mark, Quantity, Scale, Steps, log_ticks, tick_labels, ticks
from paceline.track.charts import Chart, Line, description, draw

STEPS = Steps(1, 100, [(1, 1000), (51, 51_000), (100, 100_000)])


def parse(chart: Chart, steps: Steps = STEPS, **size: int) -> ElementTree.Element:
    return ElementTree.fromstring(draw(chart, steps, **size))


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in svg.iter("text")]


def points(values: list[float | None]) -> list[tuple[float, float | None]]:
    return [(float(step), value) for step, value in enumerate(values, start=1)]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_ticks_are_few_round_and_inside(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    assert len(found) <= most
    assert all(low - 1e-6 * width <= place <= low + width * (1 + 1e-6) for place in found)
    assert len(set(tick_labels(found))) == len(found) if found and width > 1e-6 * abs(low) else True


@pytest.mark.parametrize(
    ("low", "high", "places"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (1, 550, [100, 200, 300, 400, 500]), (2.5, 2.5, [2.5]), (0, 1e-3, [0, 5e-4, 1e-3])],
)
def test_ticks_at_round_numbers(low: float, high: float, places: list[float]) -> None:
    assert ticks(low, high, 6 if low == 0 and high == 10 else 5) == pytest.approx(places)


def test_logarithmic_ticks() -> None:
    assert log_ticks(0.5, 60, 8) == [0.5, 1, 2, 5, 10, 20, 50]
    assert log_ticks(0.5, 60, 4) == [1, 3, 10, 30]
    assert len(log_ticks(1e-12, 1e12, 6)) <= 6


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 2, 4], ["0", "2", "4"]),
        ([0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([0, 2e-4, 4e-4], ["0", "2e-4", "4e-4"]),
        ([0, 5000, 10_000, 15_000], ["0", "5k", "10k", "15k"]),
        ([1e6, 1.5e6, 2e6], ["1,000k", "1,500k", "2,000k"]),
        ([1200, 1400], ["1,200", "1,400"]),
        ([0], ["0"]),
    ],
)
def test_tick_labels_tell_ticks_apart_in_one_unit(values: list[float], labels: list[str]) -> None:
    assert tick_labels(values) == labels


def test_a_scale_holds_what_is_outside_at_the_edge_and_the_middle_when_it_has_no_width() -> None:
    scale = Scale(0, 10, 100, 200)
    assert [scale(value) for value in (-5, 0, 5, 10, 50)] == [100, 100, 150, 200, 200]
    assert Scale(3, 3, 0, 80)(3) == 40
    assert Scale(1, 100, 0, 80, log=True)(10) == pytest.approx(40)


@pytest.mark.parametrize(("step", "tokens"), [(1, 1000), (26, 26_000), (100, 100_000), (0.5, None), (101, None)])
def test_tokens_between_known_steps(step: float, tokens: float | None) -> None:
    assert STEPS.tokens_at(step) == tokens


def test_a_chart_says_what_it_shows() -> None:
    values = [5 - 0.02 * step for step in range(100)]
    chart = Chart("Loss", "nats per token", [Line("model", points(values))], [("gzip", 3.5)])
    svg = parse(chart)
    assert svg.findtext("title") == "Loss, nats per token"
    assert svg.get("role") == "img"
    assert svg.findtext("desc") == description(chart, STEPS)
    assert (
        description(chart, STEPS) == "model: 5.000 at step 1, 3.020 at step 100, between 3.020 and 5.000. gzip: 3.500."
    )
    shown = texts(svg)
    for text in ("step", "tokens", "50", "50,000", "gzip 3.500", "3.020", "4.0"):
        assert text in shown


def test_a_gap_splits_the_line_and_a_lone_point_is_a_dot() -> None:
    svg = parse(Chart("Loss", "", [Line("model", points([3.0, 2.9, None, 2.8, None, 2.7, 2.6]))]))
    (path,) = [node for node in svg.iter("path") if node.get("class") == "main"]
    assert (path.get("d") or "").count("M") == 3
    assert len(list(svg.iter("circle"))) == 1


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [0.0, 0.0], [None, 5.0], [-3.0, 4.0]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_few_or_equal_values_make_a_chart_with_everything_inside(values: list[float | None], from_zero: bool) -> None:
    svg = parse(Chart("x", "", [Line("x", points(values))], from_zero=from_zero), Steps(1, max(1, len(values))))
    for node in svg.iter("circle"):
        assert 0 <= float(node.get("cx") or "nan") <= 372
        assert 0 <= float(node.get("cy") or "nan") <= 230


def test_a_few_extremes_are_named_instead_of_flattening_the_rest() -> None:
    values: list[float | None] = [0.2 + 0.0001 * (step % 7) for step in range(300)]
    values[0], values[200] = 4.0, 9.5
    svg = parse(Chart("Step time", "s", [Line("each", points(values), "raw")]), Steps(1, 300))
    assert "2 steps above, up to 9.500 at step 201 \u2191" in texts(svg)


def test_a_wide_range_turns_the_axis_logarithmic_when_asked() -> None:
    line = Line("norm", points([0.5, 1.0, 100.0]))
    assert "10" in texts(parse(Chart("Norm", "", [line], log_if_wide=True), Steps(1, 3)))
    assert "10" not in texts(parse(Chart("Norm", "", [line]), Steps(1, 3)))


def test_ends_that_would_overlap_are_moved_apart() -> None:
    lines = [Line("a", points([3.0, 2.0]), "main"), Line("b", points([3.0, 2.001]), "dots")]
    svg = parse(Chart("Loss", "", lines), Steps(1, 2))
    ends = sorted(
        float(node.get("y") or "nan") for node in svg.iter("text") if "end" in (node.get("class") or "").split()
    )
    assert ends[1] - ends[0] >= 12


def test_marks_carry_their_text_and_only_a_wide_chart_names_a_resume() -> None:
    marks = [Mark(40, "resume", "from <b>40"), Mark(60, "checkpoint", "saved"), Mark(80, "warning", "slow")]
    steps = Steps(1, 100, (), marks)
    chart = Chart("Loss", "", [Line("model", points([1.0] * 100))])
    narrow, wide = parse(chart, steps), parse(chart, steps, width=776)
    titles = [node.text for node in narrow.iter("title")][1:]
    assert titles == ["step 40: from <b>40", "step 60: saved", "step 80: slow"]
    assert "resumed at 40" in texts(wide)
    assert "resumed at 40" not in texts(narrow)
    assert "tokens" not in texts(narrow)


def test_another_quantity_runs_along_in_powers_of_ten() -> None:
    along = Quantity("learning rate", 1e-5, 1.0, log=True, marks=[Mark(3e-3, "chosen", "suggested: 3e-3")])
    line = Line("loss", [(10.0**power, 5.0 - abs(power + 2)) for power in range(-5, 1)])
    svg = ElementTree.fromstring(draw(Chart("Range", "nats", [line], is_named=True), along, 700, 300))
    assert {"1e-5", "1e-3", "1e0", "learning rate", "loss"} <= set(texts(svg))
    assert "5.000 at learning rate 0.01" not in (desc := str(svg.findtext("desc")))
    assert desc == "loss: 2.000 at learning rate 1.00e-5, 3.000 at learning rate 1.000, between 2.000 and 5.000."
    (mark,) = [node for node in svg.iter("line") if node.get("class") == "chosen"]
    across = Scale(1e-5, 1.0, 48, 700 - 46, log=True)
    assert float(str(mark.get("x1"))) == pytest.approx(across(3e-3), abs=0.06)
    assert "".join(mark.itertext()) == "suggested: 3e-3"


def test_a_picture_with_a_style_sheet_is_a_whole_file() -> None:
    chart = Chart("A", "", [Line("one", points([1.0, 2.0])), Line("two", points([2.0, 1.0]), "third")], is_named=True)
    svg = ElementTree.fromstring(draw(chart, Quantity("place", 1, 2), style="path.third { stroke: green }"))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert svg.findtext("{*}style") == "path.third { stroke: green }"
    names = [(node.text, node.get("class")) for node in svg.iter("{http://www.w3.org/2000/svg}tspan")]
    assert names == [("one", "end main"), ("two", "end third")]
