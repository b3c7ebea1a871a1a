"""The order of samples: a function of the position alone, which loses and repeats nothing."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.data.mixture import Mixture
from paceline.data.order import FileOrder, Order, SampleOrder

FILES = [30, 7, 0, 12, 25, 25, 1, 18, 22, 9]


def draw(order: Order, counts: list[int], first: int = 0) -> list[tuple[int, int]]:
    """(source, row) of consecutive steps of these sizes."""
    drawn = []
    for count in counts:
        sources, rows = order.draw(first, count)
        drawn += list(zip(sources.tolist(), rows.tolist(), strict=True))
        first += count
    return drawn


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(5, 60))
@example([3, 2], 1)
def test_changing_the_batch_loses_and_repeats_nothing(batches: list[int], length: int) -> None:
    total = sum(batches)
    order = SampleOrder([length], [1.0], seed=3)
    drawn = draw(order, batches)
    assert drawn == draw(SampleOrder([length], [1.0], seed=3), [total])
    for epoch in range(0, total, length):
        rows = sorted(row for _, row in drawn[epoch : epoch + length])
        assert len(set(rows)) == len(rows)
        if epoch + length <= total:
            assert rows == list(range(length))


@pytest.mark.parametrize("position", [0, 1, 99, 100, 101, 250, 299, 12_345])
def test_a_run_resumed_in_any_epoch_continues_its_permutation(position: int) -> None:
    whole = draw(SampleOrder([100], [1.0], seed=0), [13_000])
    assert draw(SampleOrder([100], [1.0], seed=0), [8] * 10, first=position) == whole[position : position + 80]


def test_every_epoch_has_an_order_of_its_own() -> None:
    rows = np.array([row for _, row in draw(SampleOrder([500], [1.0], seed=0), [2000])]).reshape(4, 500)
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 4 / np.sqrt(500)


def test_seed_and_stream_name_the_order() -> None:
    drawn = {
        tuple(draw(SampleOrder([200], [1.0], seed, stream), [200]))
        for seed, stream in [(0, "train"), (1, "train"), (0, "client 1"), (1, "client 1")]
    }
    assert len(drawn) == 4


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [0.05, 0.05, 0.9]])
def test_sources_keep_weights_epochs_and_order_of_their_own(weights: list[float]) -> None:
    lengths = [50, 11, 200]
    drawn = draw(SampleOrder(lengths, weights, seed=5), [700])
    assert [source for source, _ in drawn] == Mixture(weights)(np.arange(700))[0].tolist()
    by_itself = draw(SampleOrder(lengths, [1.0, 1.0, 1.0], seed=5), [2000])
    for source, length in enumerate(lengths):
        rows = [row for s, row in drawn if s == source]
        # Other weights change when a source is drawn, never what it gives.
        other = [row for s, row in by_itself if s == source]
        shared = min(len(rows), len(other))
        assert rows[:shared] == other[:shared]
        for epoch in range(len(rows) // length):
            assert sorted(rows[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_sources_of_equal_length_have_different_orders() -> None:
    drawn = draw(SampleOrder([100, 100], [1.0, 1.0], seed=0), [200])
    assert [row for source, row in drawn if source == 0] != [row for source, row in drawn if source == 1]


def test_epochs_are_counted_by_source() -> None:
    order = SampleOrder([100, 10], [3.0, 1.0], seed=0)
    assert order.epoch(0) == (0.0, 0.0)
    assert order.epoch(400) == (3.0, 10.0)
    assert order.warning is None


def test_one_source_is_dealt_as_it_stands() -> None:
    assert SampleOrder([100], [1.0], seed=0).slots(24, 8).tolist() == list(range(24, 32))


def test_a_mixture_is_dealt_so_that_every_rank_gets_every_source() -> None:
    order = SampleOrder([100, 100], [1.0, 1.0], seed=0)
    seen, dealt_before = np.zeros((2, 2), int), np.arange(8)  # seen by rank and source
    for first in range(0, 800, 8):
        slots = order.slots(first, 8)
        assert sorted(slots.tolist()) == list(range(first, first + 8))
        assert np.array_equal(slots, SampleOrder([100, 100], [1.0, 1.0], seed=0).slots(first, 8))
        sources, _ = order.draw(first, 8)
        np.add.at(seen, (np.arange(8) % 2, sources[slots - first]), 1)
        assert not np.array_equal(slots - first, dealt_before)
        dealt_before = slots - first
    assert seen.sum() == 800
    assert np.abs(seen - 200).max() < 40


@pytest.mark.parametrize("streams", [1, 4, 5])
@pytest.mark.parametrize("batches", [[500], [8] * 30 + [12] * 20, [1, 7, 64, 3, 3, 200]], ids=["one", "two", "many"])
def test_files_lose_and_repeat_nothing_within_an_epoch_of_their_stream(batches: list[int], streams: int) -> None:
    order, total = FileOrder(FILES, streams, seed=3), sum(batches)
    drawn = [row for _, row in draw(order, batches)]
    assert drawn == [row for _, row in draw(FileOrder(FILES, streams, seed=3), [total])]
    for stream in range(streams):
        rows = drawn[stream::streams]
        size = round(len(rows) / order.epoch(total)[stream])
        for epoch in range(0, len(rows), size):
            passed = rows[epoch : epoch + size]
            assert len(set(passed)) == len(passed)
            assert len(passed) < size or set(passed) == set(rows)


def test_streams_hold_all_rows_of_whole_files() -> None:
    order = FileOrder(FILES, 4, seed=0)
    drawn = draw(order, [4 * sum(FILES)])
    file_of_row = np.repeat(np.arange(len(FILES)), FILES)
    rows = [{row for _, row in drawn[stream::4]} for stream in range(4)]
    files = [{int(file_of_row[row]) for row in mine} for mine in rows]
    assert set().union(*rows) == set(range(sum(FILES)))
    assert sum(map(len, files)) == len(set().union(*files)) == 9  # the file without rows is of no stream


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("sequences", [4, 8, 12])
def test_a_rank_reads_only_the_files_of_its_streams(ranks: int, sequences: int) -> None:
    order = FileOrder(FILES, 4, seed=0)
    file_of_row = np.repeat(np.arange(len(FILES)), FILES)
    files: list[set[int]] = [set() for _ in range(ranks)]
    for first in range(0, 100 * sequences, sequences):
        _, rows = order.draw(first, sequences)
        dealt = order.slots(first, sequences) - first
        for rank in range(ranks):
            files[rank] |= set(file_of_row[rows[dealt[rank::ranks]]].tolist())
    assert sum(map(len, files)) == len(set().union(*files)) == 9


def test_file_streams_shuffle_anew_in_every_epoch() -> None:
    drawn = np.array([row for _, row in draw(FileOrder([300], 1, seed=0), [900])]).reshape(3, 300)
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 4 / np.sqrt(300)
    assert not np.array_equal(drawn[0], FileOrder([300], 1, seed=1).draw(0, 300)[1])


def test_streams_of_equal_size_have_different_orders() -> None:
    _, rows = FileOrder([100, 100], 2, seed=0).draw(0, 200)
    assert {tuple(rows[::2] // 100), tuple(rows[1::2] // 100)} == {(0,) * 100, (1,) * 100}
    assert not np.array_equal(rows[::2] % 100, rows[1::2] % 100)


def test_streams_are_balanced_and_say_so_where_they_are_not() -> None:
    even = FileOrder([10, 20, 30, 40, 50, 60, 70, 80], 4, seed=0)
    assert even.warning is None
    assert even.epoch(4 * 90) == (1.0, 1.0, 1.0, 1.0)
    uneven = FileOrder([100, 10, 10], 2, seed=0)
    assert uneven.epoch(41) == (21 / 100, 20 / 20)
    assert uneven.warning is not None and "20 to 100 rows" in uneven.warning


def test_there_are_at_most_as_many_streams_as_files_with_rows() -> None:
    assert FileOrder(FILES, 64, seed=0).streams == 9
    assert FileOrder(FILES, 2, seed=0).streams == 2


def test_the_order_of_old_runs_is_kept() -> None:
    """A change of these numbers reorders the data of every run that is resumed."""
    assert draw(SampleOrder([100, 7], [0.6, 0.4], seed=1), [5], first=10) == [(0, 15), (1, 3), (0, 20), (0, 41), (1, 6)]
    assert SampleOrder([100, 7], [0.6, 0.4], seed=1).slots(10, 5).tolist() == [11, 14, 13, 10, 12]
    assert FileOrder(FILES, 4, seed=1).draw(40, 8)[1].tolist() == [27, 55, 83, 123, 32, 49, 142, 102]
