"""The rows that one data-parallel rank learns from in a step, read ahead by a thread."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from paceline.data.order import Order
from paceline.data.partners import partners
from paceline.data.rows import Row, Rows
from paceline.plan.batch import Batches

STEPS_AHEAD = 2

MicroBatches = list[list[Row]]


class Place(NamedTuple):
    """What one rank reads: step ``step``, which begins at sample ``first``, as data-parallel rank ``rank``."""

    step: int
    first: int
    rank: int


class Loader:
    """Deals the global batch of each step to the data-parallel ranks and gives this one its micro-batches.

    Slot b of a step is of rank b modulo their number. Every rank gets the same number of micro-batches of the same
    number of rows. Missing rows are filled up with the rank's first row at weight 0.0; a filler is numbered like the
    slot it stands in, at or past the end of the step, so that sequence numbers are unique within a step. With
    ``partner_seed`` each row comes with another one of its step, of any rank.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        order: Order,
        batches: Batches,
        *,
        rank: int,
        partner_seed: int | None = None,
    ) -> None:
        assert 0 <= rank < batches.full.data_parallel, (rank, batches.full)
        self._rows, self._order, self._batches, self._rank = rows, order, batches, rank
        self._partner_seed = partner_seed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paceline-loader")
        self._ahead: deque[tuple[Place, Future[MicroBatches]]] = deque()
        self.wait_s = 0.0
        """Seconds that the last call of ``batch`` waited for its rows."""

    def batch(self, step: int, consumed: int) -> MicroBatches:
        """Micro-batches of step ``step``, which begins at sample ``consumed``; the next steps are read meanwhile.

        Calls in the order of the steps find their rows ready; any other step or ``consumed`` starts afresh from there.
        An error in reading is raised here, for the step that it belongs to.
        """
        return self.at(
            [
                Place(later, consumed + self._batches.sequences(step, later - 1), self._rank)
                for later in range(step, step + STEPS_AHEAD + 1)
            ]
        )

    def at(self, places: Sequence[Place]) -> MicroBatches:
        """Micro-batches of the first of some places; the others, which will be asked for next, are read meanwhile."""
        began = time.perf_counter()
        known = [place for place, _ in self._ahead]
        if known != list(places[: len(known)]):
            self._forget()
        for place in places[len(self._ahead) :]:
            self._ahead.append((place, self._thread.submit(self._read, place)))
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

    def _forget(self) -> None:
        while self._ahead:
            self._ahead.popleft()[1].cancel()

    def _read(self, place: Place) -> MicroBatches:
        first, plan = place.first, self._batches.at(place.step)
        samples = self._order.slots(first, plan.sequences)
        sources, rows = self._order.draw(first, plan.sequences)

        def row_of(sample: int) -> Row:
            return self._rows[int(sources[sample - first])].row(int(rows[sample - first]), sample)

        others = None if self._partner_seed is None else partners(first, plan.sequences, self._partner_seed)
        share: list[Row] = []
        for row in range(plan.micro_batches * plan.micro):
            slot = place.rank + plan.data_parallel * row
            if slot < plan.sequences:
                sample = int(samples[slot])
                partner = None if others is None else row_of(int(others[sample - first])).tokens
                share.append(replace(row_of(sample), partner=partner))
            else:
                share.append(replace(share[0], sequence=first + slot, weight=0.0))
        return [share[begin : begin + plan.micro] for begin in range(0, len(share), plan.micro)]


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
