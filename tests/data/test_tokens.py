"""Token sets come back from disk as they were written."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.tokens import TokenSet, token_dtype, write_set


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=6), max_size=6), st.integers(1, 7))
def test_documents_come_back_however_the_stream_was_cut_into_blocks(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], block: int
) -> None:
    folder = tmp_path_factory.mktemp("set") / "new"
    stream = np.array([token for document in documents for token in document], np.uint16)
    lengths = np.array([len(document) for document in documents], np.int64)
    blocks = (stream[start : start + block] for start in range(0, len(stream), block))
    files = np.arange(len(documents), dtype=np.int32)
    write_set(folder, blocks, dtype=token_dtype(65536), lengths=lengths, files=files, n_bytes=77)
    found = TokenSet.open(folder)
    assert [found.document(index).tolist() for index in range(len(found))] == documents
    assert (found.tokens.dtype, found.offsets.dtype, found.files.dtype) == (np.uint16, np.int64, np.int32)
    assert found.files.tolist() == files.tolist()
    assert (found.n_bytes, found.target) == (77, None)


def test_a_set_is_mapped_not_read(tmp_path: Path) -> None:
    one = np.ones(1, np.int64)
    write_set(tmp_path / "s", [one], dtype=token_dtype(2), lengths=one, files=one.astype(np.int32), n_bytes=1)
    found = TokenSet.open(tmp_path / "s")
    assert all(isinstance(array, np.memmap) for array in (found.tokens, found.offsets, found.files))
    with pytest.raises(ValueError, match="read-only"):
        found.tokens[0] = 3


def test_pairs_open_with_their_target(tmp_path: Path) -> None:
    for folder, token in ((tmp_path / "s", 5), (tmp_path / "s" / "target", 6)):
        one = np.array([1], np.int64)
        write_set(
            folder, [np.array([token])], dtype=token_dtype(10), lengths=one, files=one.astype(np.int32), n_bytes=1
        )
    found = TokenSet.open(tmp_path / "s")
    assert found.target is not None
    assert (found.tokens.tolist(), found.target.tokens.tolist()) == ([5], [6])


@pytest.mark.parametrize(("vocabulary", "n_bytes"), [(257, 2), (65536, 2), (65537, 4)])
def test_ids_take_two_bytes_where_they_fit(vocabulary: int, n_bytes: int) -> None:
    dtype = token_dtype(vocabulary)
    assert dtype.itemsize == n_bytes
    assert np.iinfo(dtype).max >= vocabulary - 1
