import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.track.curves import History, Smoother, smooth, spikes, stalls, thin

curve = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=60)


def test_the_moving_average_starts_without_bias_and_forgets() -> None:
    smoother = Smoother(10)
    assert smoother.add(None) is None
    assert smoother.add(8.0) == 8.0
    assert smoother.add(None) == 8.0
    for _ in range(200):
        last = smoother.add(2.0)
    assert last == pytest.approx(2.0)


@given(curve, st.integers(1, 20))
def test_a_smoothed_curve_has_the_same_gaps_and_stays_between_the_extremes(
    values: list[float | None], reach: int
) -> None:
    smoothed = smooth(values, reach)
    known = [value for value in values if value is not None]
    assert [value is None for value in smoothed] == [value is None for value in values]
    assert all(min(known) - 1e-3 <= value <= max(known) + 1e-3 for value in smoothed if value is not None)


def test_smoothing_has_no_lag_and_is_not_moved_by_one_leap() -> None:
    straight = [float(step) for step in range(50)]
    assert smooth(straight, 6)[:40] == pytest.approx(straight[:40])
    leap = [*([2.0] * 20), 90.0, *([2.0] * 20)]
    assert smooth(leap, 3) == [2.0] * 41


@given(curve, st.sampled_from([2, 10, 11]))
def test_thinned_points_are_few_in_order_and_keep_the_extremes(values: list[float | None], limit: int) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    kept = thin(points, limit)
    assert len(kept) <= max(limit, 2)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    known = [value for value in values if value is not None]
    if known:
        left = [value for _, value in kept if value is not None]
        assert (min(left), max(left)) == (min(known), max(known))


def test_a_gap_wider_than_a_bin_stays_a_gap() -> None:
    points = [(float(x), None if 40 <= x < 60 else 1.0 + x % 2) for x in range(100)]
    assert None in [y for _, y in thin(points, 20)]


def test_a_history_keeps_the_course_in_few_numbers() -> None:
    history = History(width=8)
    assert history.bars(10) == ""
    for value in range(10_000):
        history.add(10_000.0 - value)
    assert len(history._values) < 16
    bars = history.bars(6)
    assert len(bars) == 6
    assert bars[0] == "\u2588"
    assert bars[-1] == "\u2581"
    assert list(bars) == sorted(bars, reverse=True)


def test_a_level_history_is_a_low_line() -> None:
    history = History()
    for _ in range(5):
        history.add(1.5)
    assert history.bars(40) == "\u2581" * 5


def test_spikes_are_found_in_noise_and_noise_is_not() -> None:
    noise = random.Random(0)
    values: list[float | None] = [3.0 + noise.gauss(0, 0.05) for _ in range(2000)]
    assert spikes(values) == []
    values[700], values[701], values[900] = 4.0, None, 2.0
    assert spikes(values) == [700]


def test_stalls_are_found_but_for_the_first_steps_of_a_session() -> None:
    seconds: list[float | None] = [9.0, 1.0, *([0.2] * 30), 9.0, *([0.2] * 30), 1.5]
    assert stalls(seconds) == [32, 63]
    assert stalls(seconds, starts=[0, 32]) == [63]
    assert stalls([0.1, 0.1, 0.1, 5.0]) == []
