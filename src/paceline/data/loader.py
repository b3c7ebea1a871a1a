"""The rows that one data-parallel rank learns from in a step, read ahead by a thread."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from paceline.data.order import Order
from paceline.data.partners import partners
from paceline.data.rows import Row, Rows
from paceline.errors import PlanError

STEPS_AHEAD = 2

MicroBatches = list[list[Row]]


class Loader:
    """Deals the global batch of each step to ``ranks`` ranks and gives this one its micro-batches.

    Slot b of a step is of rank b mod ``ranks``. Every rank gets the same number of micro-batches of the same number of
    rows: ``micro``, at most and by default a rank's share, rounded up. Missing rows are filled up with the rank's first
    row at weight 0.0; a filler is numbered like the slot it stands in, at or past the end of the step, so that sequence
    numbers are unique within a step. With ``partner_seed`` each row comes with another one of its step, of any rank.

    Raises ``PlanError`` where there are fewer sequences than ranks.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        order: Order,
        *,
        sequences: int,
        rank: int,
        ranks: int,
        micro: int | None = None,
        partner_seed: int | None = None,
    ) -> None:
        assert 0 <= rank < ranks, (rank, ranks)
        if sequences < ranks:
            raise PlanError(
                f"batch.sequences={sequences} is fewer than the {ranks} data-parallel ranks, and every rank needs one. "
                f"Use batch.sequences={ranks} or more, or fewer replicas"
            )
        self._rows, self._order, self._partner_seed = rows, order, partner_seed
        self._sequences = sequences
        share = -(-sequences // ranks)
        self._micro = micro or share
        assert 0 < self._micro <= share, f"micro={micro} is more than a rank's share of {share} sequences"
        self._slots = rank + ranks * np.arange(-(-share // self._micro) * self._micro)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paceline-loader")
        self._ahead: deque[tuple[int, Future[MicroBatches]]] = deque()
        self.wait_s = 0.0
        """Seconds that the last call of ``batch`` waited for its rows."""

    def batch(self, consumed: int) -> MicroBatches:
        """Micro-batches of the step that begins at sample ``consumed``; the next steps are read meanwhile.

        Calls in the order of the steps find their rows ready; any other ``consumed`` starts afresh from there. An error
        in reading is raised here, for the step that it belongs to.
        """
        began = time.perf_counter()
        if self._ahead and self._ahead[0][0] != consumed:
            self._forget()
        self._read_ahead(consumed)
        try:
            return self._ahead.popleft()[1].result()
        finally:
            self.wait_s = time.perf_counter() - began

    @property
    def warning(self) -> str | None:
        """One sentence for the user where the order serves the data less evenly than asked, or None."""
        return self._order.warning

    def close(self) -> None:
        """End the thread, after the step that it is reading."""
        self._forget()
        self._thread.shutdown(wait=True)

    def _read_ahead(self, consumed: int) -> None:
        """Have the thread read the step at ``consumed`` and those after it that it is not yet reading."""
        for step in range(len(self._ahead), STEPS_AHEAD + 1):
            first = consumed + step * self._sequences
            self._ahead.append((first, self._thread.submit(self._read, first)))

    def _forget(self) -> None:
        while self._ahead:
            self._ahead.popleft()[1].cancel()

    def _read(self, first: int) -> MicroBatches:
        samples = self._order.slots(first, self._sequences)
        sources, rows = self._order.draw(first, self._sequences)

        def row_of(sample: int) -> Row:
            return self._rows[int(sources[sample - first])].row(int(rows[sample - first]), sample)

        others = None if self._partner_seed is None else partners(first, self._sequences, self._partner_seed)
        share: list[Row] = []
        for slot in self._slots.tolist():
            if slot < self._sequences:
                sample = int(samples[slot])
                partner = None if others is None else row_of(int(others[sample - first])).tokens
                share.append(replace(row_of(sample), partner=partner))
            else:
                share.append(replace(share[0], sequence=first + slot, weight=0.0))
        return [share[begin : begin + self._micro] for begin in range(0, len(share), self._micro)]


def held_out_rows(rows: Sequence[Rows], limit: int, rank: int, ranks: int) -> Iterator[Row]:
    """This rank's part of at most ``limit`` rows spread evenly over all rows of all sources.

    Over all ranks each chosen row comes exactly once. Every rank yields the same number of rows, so that ranks which
    share a model make the same number of forward passes: missing ones are filled up at weight 0.0. ``sequence`` is
    the place among the chosen rows; nothing is yielded where there are no rows.
    """
    assert 0 <= rank < ranks, (rank, ranks)
    first_row = np.concatenate([[0], np.cumsum([len(source) for source in rows])])
    total = int(first_row[-1])
    chosen = min(limit, total)
    for place in range(rank, -(-chosen // ranks) * ranks, ranks):
        row = min(place, chosen - 1) * total // chosen
        source = int(np.searchsorted(first_row, row, side="right")) - 1
        yield replace(rows[source].row(row - int(first_row[source]), place), weight=1.0 if place < chosen else 0.0)
