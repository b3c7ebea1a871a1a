"""The loader: every number of ranks sees the same global batches, ready ahead of time, and errors come to light."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from paceline.config import BatchConfig, BatchWarmup, Config
from paceline.data.loader import Loader, MicroBatches, held_out_rows
from paceline.data.order import FileOrder, Order, SampleOrder
from paceline.data.rows import Row, Rows
from paceline.errors import DataError
from paceline.plan.batch import Batches, plan_batch
from paceline.plan.run import plan_batches

ORDERS: list[Order] = [
    SampleOrder([40], [1.0], seed=1),
    SampleOrder([40, 17], [0.6, 0.4], seed=1),
    FileOrder([9, 9, 12, 10], 4, seed=1),
]


class Numbered:
    """Rows that hold their source and number, and remember what was read; ``broken`` cannot be read."""

    def __init__(self, source: int, length: int, broken: int | None = None) -> None:
        self.source, self.length, self.broken = source, length, broken
        self.sequences: list[int] = []
        self._reading = threading.Condition()

    def __len__(self) -> int:
        return self.length

    def reached(self, sequence: int, timeout: float) -> bool:
        """Whether the row of this sequence number is read within ``timeout`` seconds."""
        with self._reading:
            return self._reading.wait_for(lambda: sequence in self.sequences, timeout)

    def row(self, index: int, sequence: int) -> Row:
        with self._reading:
            self.sequences.append(sequence)
            self._reading.notify_all()
        if index == self.broken:
            raise DataError(f"row {index} is damaged")
        return Row(sequence, np.array([self.source, index]), np.zeros(1, np.int64))


def sources() -> list[Numbered]:
    return [Numbered(0, 40), Numbered(1, 17)]


def plan(sequences: int, ranks: int = 1, micro: int | None = None) -> Batches:
    return Batches(full=plan_batch(BatchConfig(sequences=sequences, micro=micro), ranks))


def of_eight(rows: Sequence[Rows], order: Order) -> Loader:
    """For one rank, with a batch of eight."""
    return Loader(rows, order, plan(8), rank=0)


def steps(
    order: Order, counts: Sequence[int], rank: int, ranks: int, micro: int | None, first: int = 0
) -> list[MicroBatches]:
    batches = []
    for count in counts:
        loader = Loader(sources(), order, plan(count, ranks, micro), rank=rank)
        batches.append(loader.batch(1, first))
        loader.close()
        first += count
    return batches


def learned(batches: list[MicroBatches]) -> list[tuple[int, ...]]:
    """(sequence, source, row) of everything that counts in a step, over all ranks."""
    rows = (row for batch in batches for micro in batch for row in micro if row.weight == 1.0)
    return sorted((row.sequence, *row.tokens.tolist()) for row in rows)


@pytest.mark.parametrize("order", ORDERS, ids=["sample", "mixture", "file"])
@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_any_number_of_ranks_and_any_micro_batch_see_the_same_global_batches(
    order: Order, ranks: int, micro: int | None
) -> None:
    counts, first = [8, 8, 11, 11, 8], 100  # in the third epoch of the first source, and with a change of the batch
    micro = micro and min(micro, 8 // ranks)
    by_rank = [steps(order, counts, rank, ranks, micro, first) for rank in range(ranks)]
    for step, count in enumerate(counts):
        shapes = {tuple(map(len, batches[step])) for batches in by_rank}
        assert len(shapes) == 1, "ranks differ in their micro-batches"
        (shape,) = shapes
        share = -(-count // ranks)
        assert set(shape) == {micro or share}
        assert len(shape) == -(-share // shape[0])
        source, row = order.draw(first, count)
        expected = [(first + i, int(source[i]), int(row[i])) for i in range(count)]
        assert learned([batches[step] for batches in by_rank]) == expected
        first += count


def test_slots_are_dealt_round_by_round() -> None:
    batch = steps(ORDERS[0], [8], rank=1, ranks=3, micro=2)[0]
    assert [[row.sequence for row in micro] for micro in batch] == [[1, 4], [7, 10]]
    batch = steps(ORDERS[0], [7], rank=1, ranks=3, micro=2, first=700)[0]
    assert [[(row.sequence, row.weight) for row in micro] for micro in batch] == [
        [(701, 1.0), (704, 1.0)],
        [(707, 0.0), (710, 0.0)],
    ]


@pytest.mark.parametrize("ranks", [3, 5])
def test_fillers_repeat_a_real_row_under_a_number_of_their_own(ranks: int) -> None:
    rows = [row for rank in range(ranks) for micro in steps(ORDERS[1], [8], rank, ranks, 2)[0] for row in micro]
    fillers = [row for row in rows if row.weight == 0.0]
    assert len(fillers) == len(rows) - 8 > 0
    assert len({row.sequence for row in rows}) == len(rows)
    assert min(row.sequence for row in fillers) >= 8
    real = {tuple(row.tokens.tolist()) for row in rows if row.weight == 1.0}
    assert {tuple(row.tokens.tolist()) for row in fillers} <= real


def test_the_next_two_steps_are_read_ahead_and_no_more() -> None:
    rows = Numbered(0, 40)
    loader = of_eight([rows], ORDERS[0])
    loader.batch(1, 0)
    assert rows.reached(23, timeout=10), "the next two steps were not read"
    assert not rows.reached(24, timeout=0.1), "a third was"
    for step in range(1, 6):
        loader.batch(step + 1, step * 8)
    assert rows.reached(63, timeout=10)
    loader.close()
    assert rows.sequences == list(range(64)), "a step was read twice or out of order"


def test_another_position_starts_afresh_from_there() -> None:
    loader = of_eight(sources(), ORDERS[1])
    for step, consumed in enumerate([0, 8, 16, 8, 16, 800, 0, 3, 3]):
        expected = steps(ORDERS[1], [8], rank=0, ranks=1, micro=None, first=consumed)
        assert learned([loader.batch(step + 1, consumed)]) == learned(expected)
    loader.close()


def test_an_error_is_raised_for_its_own_step_and_again_when_asked_again() -> None:
    order = ORDERS[0]
    broken = int(order.draw(0, 40)[1][20])  # in the third step of eight
    loader = of_eight([Numbered(0, 40, broken)], order)
    loader.batch(1, 0)
    loader.batch(2, 8)
    for _ in range(2):
        with pytest.raises(DataError, match=f"row {broken} is damaged"):
            loader.batch(3, 16)
    assert len(loader.batch(4, 24)[0]) == 8
    loader.close()


def test_close_ends_the_thread() -> None:
    before = set(threading.enumerate())
    loader = of_eight(sources(), ORDERS[0])
    loader.batch(1, 0)
    assert set(threading.enumerate()) > before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before


def test_the_wait_for_rows_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, three_steps_read, go_on = [0.0], threading.Event(), threading.Event()

    class OneSecondEach(Numbered):
        def row(self, index: int, sequence: int) -> Row:
            if sequence == 24:
                three_steps_read.set()
                assert go_on.wait(timeout=10)
            clock[0] += 1.0
            return super().row(index, sequence)

    monkeypatch.setattr("paceline.data.loader.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    loader = of_eight([OneSecondEach(0, 40)], ORDERS[0])
    loader.batch(1, 0)
    assert loader.wait_s >= 8.0
    loader.batch(2, 8)
    assert three_steps_read.wait(timeout=10)
    loader.batch(3, 16)
    assert loader.wait_s == 0.0
    go_on.set()
    loader.close()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_batch_that_grows_takes_the_next_samples_and_no_others(ranks: int) -> None:
    warmup = BatchWarmup(start=3, steps=4, by=2)
    tree = {"data": {"source": "x"}, "train": {"steps": 8}, "replicas": ranks}
    config = Config.parse(tree).model_copy(update={"batch": BatchConfig(sequences=8, micro=2, warmup=warmup)})
    batches = plan_batches(config)
    loaders = [Loader(sources(), ORDERS[1], batches, rank=rank) for rank in range(ranks)]
    first = 0
    for step, count in enumerate([3, 3, 5, 7, 8, 8], start=1):
        source, row = ORDERS[1].draw(first, count)
        expected = [(first + i, int(source[i]), int(row[i])) for i in range(count)]
        assert learned([loader.batch(step, first) for loader in loaders]) == expected
        first += count
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [1, 2, 7, 56, 57, 1000])
def test_held_out_rows_come_once_over_all_ranks_and_evenly_spread(limit: int, ranks: int) -> None:
    parts = [list(held_out_rows(sources(), limit, rank, ranks)) for rank in range(ranks)]
    chosen = min(limit, 57)
    assert {len(part) for part in parts} == {-(-chosen // ranks)}
    counted = sorted((row for part in parts for row in part if row.weight == 1.0), key=lambda row: row.sequence)
    assert [row.sequence for row in counted] == list(range(chosen))
    places = [int(source) * 40 + int(row) for source, row in (row.tokens for row in counted)]
    gaps = np.diff([*places, 57 + places[0]])
    assert gaps.sum() == 57
    assert gaps.max() - gaps.min() <= 1
    assert len({row.sequence for part in parts for row in part}) == sum(map(len, parts))


def test_held_out_rows_do_not_depend_on_the_ranks() -> None:
    def rows(ranks: int) -> list[tuple[int, ...]]:
        return learned([[list(held_out_rows(sources(), 20, rank, ranks))] for rank in range(ranks)])

    assert rows(1) == rows(2) == rows(3)
    assert len(rows(1)) == 20


def test_no_held_out_rows_are_no_rows() -> None:
    assert list(held_out_rows([Numbered(0, 0), Numbered(1, 0)], 10, 1, 2)) == []
    assert [row.tokens.tolist() for row in held_out_rows([Numbered(0, 0), Numbered(1, 1)], 10, 0, 1)] == [[1, 0]]
