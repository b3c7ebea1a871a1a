"""Rows: every token stands where it should, exactly once, and documents begin where they say."""

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.pack import PackedRows, PairedRows
from paceline.data.rows import Row
from paceline.data.tokens import TokenSet
from paceline.errors import DataError

lengths_of_documents = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def token_set(lengths: list[int], files: list[int] | None = None, first: int = 0, **more: TokenSet) -> TokenSet:
    """Documents of these lengths whose tokens count up from ``first``, so that each token tells its own place."""
    offsets = np.array([0, *accumulate(lengths)], np.int64)
    tokens = np.arange(first, first + offsets[-1]).astype(np.uint16)
    return TokenSet(tokens, offsets, np.array(files or [0] * len(lengths), np.int32), n_bytes=0, **more)


def all_rows(rows: PackedRows | PairedRows) -> list[Row]:
    return [rows.row(index, index) for index in range(len(rows))]


def starts_in_tokens(rows: list[Row]) -> list[int]:
    """The tokens at which the rows say a document begins, each once."""
    return sorted({int(row.tokens[start]) for row in rows for start in row.starts})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths_of_documents, st.integers(2, 9), st.sampled_from([0, 1, 3]), st.booleans())
def test_rows_are_the_joined_documents_cut_at_equal_distances(
    lengths: list[int], row_tokens: int, overlap: int, keep_tail: bool
) -> None:
    overlap = min(overlap, row_tokens - 1)
    total, stride = sum(lengths), row_tokens - overlap
    begins = [begin for begin in range(0, total, stride) if begin + row_tokens <= total]
    if keep_tail:
        begins = [begin for begin in range(0, total, stride) if begin + overlap < total]
    if not keep_tail and not begins:
        with pytest.raises(DataError):
            PackedRows(token_set(lengths), row_tokens, overlap)
        return
    rows = PackedRows(token_set(lengths), row_tokens, overlap, keep_tail=keep_tail)
    expected = [list(range(begin, min(begin + row_tokens, total))) for begin in begins]
    assert [row.tokens.tolist() for row in all_rows(rows)] == expected
    held = {token for row in expected for token in row}
    assert rows.dropped_tokens == total - len(held)
    assert starts_in_tokens(all_rows(rows)) == sorted(held & {0, *accumulate(lengths[:-1])})
    for row in all_rows(rows):
        assert np.all(np.diff(row.starts) > 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths_of_documents, st.integers(1, 8))
def test_every_token_but_the_first_is_predicted_exactly_once(lengths: list[int], sequence_tokens: int) -> None:
    rows = PackedRows(token_set(lengths), sequence_tokens + 1, 1, keep_tail=True)
    predicted = [token for row in all_rows(rows) for token in row.tokens[1:].tolist()]
    assert predicted == list(range(1, sum(lengths)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths_of_documents, st.integers(2, 9), st.integers(0, 3))
def test_shuffled_documents_stay_whole(lengths: list[int], row_tokens: int, seed: int) -> None:
    plain = token_set(lengths)
    rows = all_rows(PackedRows(plain, row_tokens, 0, shuffle_key=(seed, "documents"), keep_tail=True))
    joined = [token for row in rows for token in row.tokens.tolist()]
    assert sorted(joined) == list(range(sum(lengths)))
    breaks = [i + 1 for i, (left, right) in enumerate(pairwise(joined)) if right != left + 1]
    begins = sorted(row.sequence * row_tokens + int(start) for row in rows for start in row.starts)
    assert {joined[begin] for begin in begins} == set(plain.offsets[:-1].tolist())
    assert set(breaks) <= set(begins)


def test_the_key_decides_the_order_of_the_documents() -> None:
    plain = token_set([3] * 100)

    def order(seed: int) -> list[int]:
        return [int(row.tokens[0]) for row in all_rows(PackedRows(plain, 3, 0, shuffle_key=(seed, "documents")))]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1)) == plain.offsets[:-1].tolist()


def test_rows_by_file_never_mix_files() -> None:
    lengths, files = [5, 4, 3, 9, 1, 2, 8], [0, 0, 2, 2, 2, 5, 7]
    plain = token_set(lengths, files)
    rows = PackedRows(plain, 4, 1, by_file=True)
    file_of_token = np.repeat(files, lengths)
    for row in all_rows(rows):
        assert len(row.tokens) == 4
        assert len(set(file_of_token[row.tokens].tolist())) == 1
    assert rows.rows_per_part.tolist() == [2, 4, 0, 2]
    assert rows.dropped_tokens == (9 - 7) + (13 - 13) + 2 + (8 - 7)
    assert len({int(row.tokens[0]) for row in all_rows(rows)}) == 8
    tails = all_rows(PackedRows(plain, 4, 0, by_file=True, keep_tail=True))
    assert [row.tokens.tolist() for row in tails[:4]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8], [9, 10, 11, 12]]
    assert [token for row in tails for token in row.tokens.tolist()] == list(range(sum(lengths)))


def test_files_out_of_order_are_a_mistake_of_the_programmer() -> None:
    with pytest.raises(AssertionError, match="order of their files"):
        PackedRows(token_set([5, 5, 5], [0, 1, 0]), 4, 0, by_file=True)


def test_a_row_is_a_copy_that_may_be_changed(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(20, dtype=np.uint16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    rows = PackedRows(TokenSet(mapped, np.array([0, 20]), np.zeros(1, np.int32), n_bytes=0), 5, 0)
    row = rows.row(1, 77)
    assert (row.sequence, row.weight, row.target) == (77, 1.0, None)
    assert row.tokens.dtype == row.starts.dtype == np.int64
    row.tokens[0] = 0
    assert rows.row(1, 77).tokens.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("index", [-1, 4])
def test_there_is_no_row_outside(index: int) -> None:
    with pytest.raises(AssertionError):
        PackedRows(token_set([20]), 5, 0).row(index, 0)


def test_too_little_data_is_refused_with_its_size() -> None:
    with pytest.raises(
        DataError, match=r"the data gives 37 tokens, fewer than the 512 .* \(batch.sequence_tokens\); use"
    ):
        PackedRows(token_set([30, 7]), 512, 0)
    with pytest.raises(DataError, match=r"gives 512 tokens, fewer than the 513 that one sequence takes"):
        PackedRows(token_set([512]), 513, 1)
    with pytest.raises(DataError, match=r"the longest file of the data gives 30 tokens"):
        PackedRows(token_set([30, 7], [0, 1]), 32, 0, by_file=True)
    with pytest.raises(DataError, match=r"gives 0 tokens"):
        PackedRows(token_set([]), 512, 0, shuffle_key=(0,))


@pytest.mark.parametrize("options", [{}, {"by_file": True}, {"shuffle_key": (0, "documents")}])
def test_an_empty_held_out_part_has_no_rows(options: dict[str, bool]) -> None:
    assert len(PackedRows(token_set([]), 512, 1, keep_tail=True, **options)) == 0
    alone = PackedRows(token_set([1]), 512, 1, keep_tail=True, **options)
    assert (len(alone), alone.dropped_tokens) == (0, 1)


def test_pairs_stay_together_and_are_cut() -> None:
    rows = PairedRows(token_set([2, 6, 3], target=token_set([5, 1, 4], first=100)), row_tokens=4)
    pairs = [(row.tokens.tolist(), row.target.tolist()) for row in all_rows(rows) if row.target is not None]
    assert pairs == [([0, 1], [100, 101, 102, 103]), ([2, 3, 4, 5], [105]), ([8, 9, 10], [106, 107, 108, 109])]
    assert rows.dropped_tokens == 3
    row = rows.row(2, 9)
    assert row.sequence == 9
    assert row.starts.tolist() == [0]
    assert row.tokens.dtype == np.int64


def test_no_pairs_are_refused_unless_allowed() -> None:
    empty = token_set([], target=token_set([]))
    with pytest.raises(DataError, match="no pair"):
        PairedRows(empty, 4)
    assert len(PairedRows(empty, 4, allow_empty=True)) == 0
