"""The keyed permutation: a bijection of every range, different for every key, the same for ever."""

import math

import numpy as np
import pytest

from paceline.data.permute import LARGEST, Permutation


def ranks_correlate(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's correlation of two permutations of the same range."""
    return float(np.corrcoef(left, right)[0, 1])


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 997, 4095, 4096, 4097, 65_537, 100_003, 1_000_000])
def test_is_a_bijection(n: int) -> None:
    image = Permutation(n, (7, "train"))(np.arange(n))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


@pytest.mark.parametrize("n", [LARGEST, LARGEST - 1, LARGEST // 2 + 1, 10**10])
def test_large_ranges_stay_inside_and_do_not_collide(n: int) -> None:
    index = np.unique(
        np.concatenate([np.arange(5000), n - 1 - np.arange(5000), np.linspace(0, n - 1, 5000, dtype=int)])
    )
    image = Permutation(n, (0, "train"))(index)
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(index)
    # Uniform over the range: the mean of k images has a standard deviation of n / sqrt(12 k).
    assert abs(image.mean() / n - 0.5) < 4 / np.sqrt(12 * len(index))


@pytest.mark.parametrize("n", [0, LARGEST + 1])
def test_sizes_outside_are_refused(n: int) -> None:
    with pytest.raises(AssertionError):
        Permutation(n, (0,))


def test_an_element_does_not_depend_on_what_is_asked_with_it() -> None:
    permutation = Permutation(1000, (3, "epoch", 1))
    whole = permutation(np.arange(1000))
    some = np.array([999, 0, 0, 512, 17])
    assert np.array_equal(permutation(some), whole[some])
    assert np.array_equal(some, [999, 0, 0, 512, 17]), "the argument was written to"
    assert permutation(np.empty(0, np.int64)).size == 0


@pytest.mark.parametrize("n", [1000, 12_345, 65_536])
def test_different_keys_are_unrelated(n: int) -> None:
    index = np.arange(n)
    keys = [(0,), (1,), (0, "train", 0), (0, "train", 1), (0, "held out", 0), (2**63, "train", 0)]
    orders = [index, *(Permutation(n, key)(index) for key in keys)]
    for i, left in enumerate(orders):
        for right in orders[:i]:
            assert abs(ranks_correlate(left, right)) < 4 / np.sqrt(n)


def test_neighbours_are_sent_apart() -> None:
    image = Permutation(12_345, (0, "train"))(np.arange(12_345))
    assert abs(ranks_correlate(image[:-1], image[1:])) < 4 / np.sqrt(12_345)


@pytest.mark.parametrize("n", [3, 4])
def test_all_orders_of_a_tiny_range_are_equally_likely(n: int) -> None:
    draws = 600
    orders = np.stack([Permutation(n, (seed, "train"))(np.arange(n)) for seed in range(draws)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == math.factorial(n)
    expected = draws / math.factorial(n)
    # A chi-square of k degrees of freedom has mean k and variance 2 k.
    free = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < free + 4 * math.sqrt(2 * free)


def test_each_part_of_a_key_counts_and_its_kind_too() -> None:
    keys = [(1, 1), (11,), (1, "1"), ("1", 1), ("1", "1"), ("11",), (1, 1, ""), (1, -1)]
    orders = {tuple(Permutation(50, key)(np.arange(50)).tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_a_numpy_integer_is_the_same_key_as_an_int() -> None:
    index = np.arange(50)
    assert np.array_equal(Permutation(50, (np.int64(5), "a"))(index), Permutation(50, (5, "a"))(index))


def test_the_order_of_old_runs_is_kept() -> None:
    """A change of these numbers reorders the data of every run that is resumed."""
    assert Permutation(10, (0, "train"))(np.arange(10)).tolist() == [9, 5, 8, 1, 0, 7, 4, 6, 3, 2]
    few = Permutation(10**9, (1, "train", 2))(np.arange(4))
    assert few.tolist() == [365_794_112, 738_247_062, 50_434_704, 240_519_552]
