"""The mixture: every prefix keeps every weight to within one sample, by random access."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.data.mixture import LONGEST_PERIOD, Mixture
from paceline.errors import ConfigError

weight = st.integers(1, 999).map(lambda hundredths: hundredths / 100)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(weight, min_size=1, max_size=8))
@example([0.01, 9.99])
@example([1.0] * 8)
@example([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
def test_every_prefix_is_within_one_sample_of_the_weights(weights: list[float]) -> None:
    mixture = Mixture(weights)
    length = 2 * mixture.period + 3
    sources, _ = mixture(np.arange(length))
    exact = [Fraction(str(w)) for w in weights]
    position = np.arange(1, length + 1)
    for source, share in enumerate(w / sum(exact) for w in exact):
        drawn = np.cumsum(sources == source)
        # |drawn - share * position| < 1, in whole numbers
        assert np.all(np.abs(drawn * share.denominator - position * share.numerator) < share.denominator)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(weight, min_size=1, max_size=8), st.integers(0, 10**12), st.integers(1, 40))
def test_random_access_continues_each_source_where_the_prefix_left_it(
    weights: list[float], first: int, count: int
) -> None:
    mixture = Mixture(weights)
    sources, index = mixture(np.arange(first, first + count))
    expected = mixture.counts(first).tolist()
    assert sum(expected) == first
    for source, place in zip(sources.tolist(), index.tolist(), strict=True):
        assert place == expected[source]
        expected[source] += 1
    assert mixture.counts(first + count).tolist() == expected


def test_a_weight_means_its_decimal_text() -> None:
    assert Mixture([0.1, 0.2, 0.7]).period == 10
    assert Mixture([1e-3, 1.0]).period == 1001


def test_only_the_proportion_of_the_weights_counts() -> None:
    samples = np.arange(100)
    assert np.array_equal(Mixture([1, 3])(samples), Mixture([0.25, 0.75])(samples))


def test_one_source_gives_everything() -> None:
    sources, index = Mixture([0.3])(np.array([0, 5, 10**15]))
    assert sources.tolist() == [0, 0, 0]
    assert index.tolist() == [0, 5, 10**15]


def test_the_longest_period_is_allowed_and_exact() -> None:
    mixture = Mixture([0.333333, 0.666667])
    assert mixture.period == LONGEST_PERIOD
    assert mixture.counts(LONGEST_PERIOD).tolist() == [333_333, 666_667]


def test_a_longer_period_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.3333333, 0\.6666667 repeat only after 10000000 .* fewer digits"):
        Mixture([0.3333333, 0.6666667])
