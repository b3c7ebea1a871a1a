"""The rows of one tokenised source: documents joined and cut at equal distances, or pairs one by one.

Nothing is computed per row in advance: a row is found by a binary search over where documents begin.
"""

import numpy as np

from paceline.data.permute import Key, Permutation
from paceline.data.rows import Ints, Row
from paceline.data.tokens import TokenSet
from paceline.errors import DataError


class PackedRows:
    """Rows of ``row_tokens`` tokens cut from the documents of ``token_set`` joined end to end.

    Neighbouring rows share ``overlap`` tokens. To predict the next token of each of S positions, take
    ``row_tokens=S + 1`` and ``overlap=1``: every token but the first is predicted exactly once. ``shuffle_key`` joins
    the documents in a permuted order instead of the stored one; ``by_file`` joins only the documents of one file, so
    that no row holds parts of two; ``clients`` (D,), the client of each document,
    only those of one client. What does not fill a last row is left out and counted in ``dropped_tokens``, or
    with ``keep_tail`` (for measuring: every token counts) becomes a shorter row.

    Raises ``DataError`` where not one row can be filled, unless ``keep_tail``.
    """

    def __init__(
        self,
        token_set: TokenSet,
        row_tokens: int,
        overlap: int,
        *,
        shuffle_key: Key | None = None,
        by_file: bool = False,
        clients: Ints | None = None,
        keep_tail: bool = False,
    ) -> None:
        assert 0 <= overlap < row_tokens, (overlap, row_tokens)
        self._row_tokens, self._stride = row_tokens, row_tokens - overlap
        ways = (shuffle_key is not None, by_file, clients is not None)
        assert sum(ways) <= 1, "documents are shuffled, or kept by file, or by client"
        # Plain views: slicing a np.memmap costs more than reading the row.
        self._tokens, self._offsets = np.asarray(token_set.tokens), np.asarray(token_set.offsets)
        self._documents: Ints | None = None  # the order in which they are joined, where it is not the stored one
        self._begins: Ints = self._offsets  # of each document among the joined tokens, and the end of the last
        documents = len(token_set)
        if shuffle_key is not None and documents > 0:
            self._documents = Permutation(documents, shuffle_key)(np.arange(documents))
        elif clients is not None:
            self._documents = np.argsort(clients, kind="stable")
        if self._documents is not None:
            self._begins = np.concatenate([[0], np.cumsum(np.diff(self._offsets)[self._documents])])
        # What is joined to one piece is a part: the documents of a file or of a client, or all of them.
        bounds = _file_bounds(token_set) if by_file else np.array([0, documents])
        if clients is not None:
            bounds = np.concatenate([[0], np.cumsum(np.bincount(clients))])
        self._part_bounds = self._begins[bounds]
        part_tokens = np.diff(self._part_bounds)
        full_rows, rest = np.divmod(np.maximum(part_tokens - overlap, 0), self._stride)
        self.rows_per_part: Ints = full_rows + (rest > 0) if keep_tail else full_rows
        """(parts,) rows of each file, or client, in the order of the rows; of everything, where parts are not told."""
        self._first_row = np.concatenate([[0], np.cumsum(self.rows_per_part)])
        held = np.minimum(self.rows_per_part * self._stride + overlap, part_tokens)
        self.dropped_tokens = int((part_tokens - np.where(self.rows_per_part > 0, held, 0)).sum())
        """Tokens that stand in no row."""
        if not keep_tail and len(self) == 0:
            what = "the longest file of the data" if by_file else "the data"
            what = "the largest client of the data" if clients is not None else what
            raise DataError(
                f"{what} gives {part_tokens.max()} tokens, fewer than the {row_tokens} that one sequence takes "
                "(batch.sequence_tokens); use more data or shorter sequences"
            )

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self._first_row[-1])

    def row(self, index: int, sequence: int) -> Row:
        """Row ``index`` (0 to len - 1), to be learned as sample ``sequence`` of the run."""
        assert 0 <= index < len(self), (index, len(self))
        part = int(np.searchsorted(self._first_row, index, side="right")) - 1
        begin = int(self._part_bounds[part]) + (index - int(self._first_row[part])) * self._stride
        end = min(begin + self._row_tokens, int(self._part_bounds[part + 1]))
        first, last = (int(i) for i in np.searchsorted(self._begins, [begin, end], side="left"))
        starts = self._begins[first:last] - begin
        return Row(sequence, self._slice(begin, end, last), starts)

    def _slice(self, begin: int, end: int, last: int) -> Ints:
        """Tokens ``begin`` to ``end`` of the joined documents; document ``last`` is the first at or past ``end``."""
        if self._documents is None:
            return self._tokens[begin:end].astype(np.int64)
        first = int(np.searchsorted(self._begins, begin, side="right")) - 1
        bounds = self._begins[first : last + 1].clip(begin, end)
        moved = self._offsets[self._documents[first:last]] - self._begins[first:last]
        stored = np.arange(begin, end) + np.repeat(moved, bounds[1:] - bounds[:-1])
        return self._tokens[stored].astype(np.int64)


class PairedRows:
    """Rows of one document pair each, source and target; each side is cut to its first ``row_tokens`` tokens.

    A cut side loses its end-of-text token: it does not end there. Raises ``DataError`` where there is no pair, unless
    ``allow_empty``.
    """

    def __init__(self, token_set: TokenSet, row_tokens: int, *, allow_empty: bool = False) -> None:
        assert token_set.target is not None, "the token set has no second column"
        self._row_tokens = row_tokens
        self._sides = [(np.asarray(side.tokens), np.asarray(side.offsets)) for side in (token_set, token_set.target)]
        lengths = np.concatenate([np.diff(offsets) for _, offsets in self._sides])
        self.dropped_tokens = int(np.maximum(lengths - row_tokens, 0).sum())
        """Tokens that stand in no row, of both sides."""
        if not allow_empty and len(self) == 0:
            raise DataError("the data gives no pair of source and target; check data.field and the files")

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._sides[0][1]) - 1

    def row(self, index: int, sequence: int) -> Row:
        """Pair ``index`` (0 to len - 1), to be learned as sample ``sequence`` of the run."""
        assert 0 <= index < len(self), (index, len(self))
        source, target = (
            tokens[offsets[index] : min(offsets[index + 1], offsets[index] + self._row_tokens)].astype(np.int64)
            for tokens, offsets in self._sides
        )
        return Row(sequence, source, np.zeros(1, np.int64), target)


def _file_bounds(token_set: TokenSet) -> Ints:
    """(files + 1,) the first document of each file that has any, and the number of documents."""
    changes = np.diff(token_set.files)
    assert not np.any(changes < 0), "documents do not stand in the order of their files"
    return np.concatenate([[0], np.flatnonzero(changes) + 1, [len(token_set)]])
