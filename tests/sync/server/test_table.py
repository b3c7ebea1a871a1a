"""Rows that take their steps late, against a store of whole parameters: nothing that can be read differs."""

import random

import pytest
import torch

from paceline.optim.adabelief import AdaBelief
from paceline.optim.adagrad import Adagrad
from paceline.optim.adamw import AdamW
from paceline.optim.base import GroupConfig
from paceline.optim.ftrl import FTRL
from paceline.optim.lion import Lion
from paceline.optim.sgd import SGD
from paceline.sync.server import table
from paceline.sync.server.codec import Boxed, Mixed, Rows
from paceline.sync.server.mixed import MixedStore
from paceline.sync.server.place import Places
from paceline.sync.server.shard import Gradient
from paceline.sync.server.store import Delay, TensorStore

ROWS, WIDTH = 23, 5
SHAPES = {"embedding": (ROWS, WIDTH), "matrix": (4, 3), "norm": (6,)}
NDIMS = {name: len(shape) for name, shape in SHAPES.items()}
OPTIMIZERS = {
    "adamw": AdamW(lr=0.05, weight_decay=0.3),
    "adabelief": AdaBelief(lr=0.05, weight_decay=0.3),
    "adagrad": Adagrad(lr=0.05, initial=0.1),
    "adagrad, decay": Adagrad(lr=0.05, weight_decay=0.2),
    "ftrl": FTRL(lr=0.05, l1=0.01, weight_decay=0.1),
    "lion": Lion(lr=0.01),
    "sgd": SGD(lr=0.1),
    "momentum, decay": SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "a rate of its own": AdamW(lr=0.05, groups=(GroupConfig(match="embed*", lr_factor=0.5, weight_decay=0.0),)),
}


class Twins:
    """A store of rows and one of whole parameters, to which the same is done."""

    def __init__(self, optimizer, seed, *, delay=None, ranks=2):
        delay = delay or Delay()
        self.places = Places(SHAPES, 1, value_bytes=8, largest_bytes=120, tables=frozenset({"embedding"}))
        self.pieces = self.places.pieces[0]
        self._make = lambda: MixedStore(self.pieces, NDIMS, optimizer, torch.float64, delay, {"embedding"})
        self.rows = self._make()
        self.dense = TensorStore(self.pieces, NDIMS, optimizer, torch.float64, delay)
        self.draw, self.ranks = random.Random(seed), ranks
        self.generator = torch.Generator().manual_seed(seed)
        self.copies = {}
        self.cuts = self.places.cuts(dict.fromkeys(SHAPES), list(SHAPES), 0)
        self.table_boxes = [box for box in self.cuts.boxes if self.pieces[box[0]].name == "embedding"]
        self.other_boxes = tuple(box for box in self.cuts.boxes if self.pieces[box[0]].name != "embedding")
        start = Boxed(self.cuts.boxes, self.normal(self.cuts.numel))
        for store in (self.rows, self.dense):
            store.fill(None, start)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def gradient(self, weight, base=(None, None)):
        """One push: each rank has a share of the columns, or of the rows, of the table."""
        whole = Boxed(self.other_boxes, self.normal(sum(p.numel for p in self.pieces if p.name != "embedding")))
        by_rank, dense = {}, []
        for rank in range(self.ranks):
            rows = []
            for number, _, (height, width) in self.table_boxes:
                columns = (0, 3, width)[rank : rank + 2] if self.ranks == 2 else (0, width)
                box = (number, (0, columns[0]), (height, columns[1] - columns[0]))
                count = self.draw.choice([0, 0, 1, 2, height])
                ids = torch.tensor(sorted(self.draw.sample(range(height), min(count, height))), dtype=torch.int32)
                rows.append(Rows(box, ids, self.normal(len(ids), box[2][1])))
                full = torch.zeros(box[2], dtype=torch.float64)
                full[ids.long()] = rows[-1].values
                dense.append((rank, box, full))
            by_rank[rank] = Mixed(whole if rank == 0 else Boxed((), torch.empty(0, dtype=torch.float64)), tuple(rows))
        parts = {}
        for rank in range(self.ranks):
            own = [(box, full) for r, box, full in dense if r == rank]
            boxes, flats = [box for box, _ in own], [full.reshape(-1) for _, full in own]
            if rank == 0:
                boxes, flats = [*self.other_boxes, *boxes], [whole.flat, *flats]
            parts[rank] = Boxed(tuple(boxes), torch.cat(flats))
        return Gradient(weight, by_rank, base[0], 0), Gradient(weight, parts, base[1], 0)

    def step(self):
        base = self.draw.choice([(None, None), *self.copies.values()])
        pushes = [self.gradient(self.draw.random(), base) for _ in range(self.draw.choice([1, 1, 2]))]
        rate, scale = self.draw.choice([1.0, 0.5, 0.25]), self.draw.choice([1.0, 0.3])
        squares = [
            store.gather([push[i] for push in pushes], measured=True) for i, store in enumerate((self.rows, self.dense))
        ]
        assert squares[0] == pytest.approx(squares[1], rel=1e-12)
        for store in (self.rows, self.dense):
            store.step(rate, scale)

    def read(self, copies=(None, None), ids=None):
        """Of the table: rows of each box; all of the rest."""
        wanted = []
        for box in self.table_boxes:
            some = None if ids is None else torch.tensor([i for i in range(box[2][0]) if i in ids], dtype=torch.int32)
            wanted.append((box, some))
        other, *rows = _split(self.rows.read(copies[0], (self.other_boxes, None, None, tuple(wanted))), len(wanted))
        dense = [part.reshape(-1) for part in self.dense.read(copies[1], (self.other_boxes, None))]
        close(torch.cat([part.reshape(-1) for part in other]), torch.cat(dense))
        for (box, some), values in zip(wanted, rows, strict=True):
            (whole,) = (part.view(box[2]) for part in self.dense.read(copies[1], ((box,), None)))
            close(values, whole if some is None else whole[some.long()])

    def pin(self):
        self.copies[self.draw.random()] = self.rows.copy(), self.dense.copy()

    def unpin(self):
        if self.copies:
            copies = self.copies.pop(self.draw.choice(list(self.copies)))
            self.rows.release(copies[0])

    def restart(self):
        """The store of rows, from what it saves."""
        saved = self.rows.save({number: copies[0] for number, copies in enumerate(self.copies.values())})
        self.rows = self._make()
        loaded = self.rows.load(saved)
        self.copies = {key: (loaded[i], copies[1]) for i, (key, copies) in enumerate(self.copies.items())}

    def check_kept(self):
        mine, whole = self.rows.kept(), self.dense.kept()
        assert {name: kept for name, kept in mine.items() if kept} == {n: kept for n, kept in whole.items() if kept}
        for key, number in mine.get("embedding", {}).items():
            if number is None:
                boxes = tuple((box, None) for box in self.table_boxes)
                rows = self.rows.read(None, ((), key, None, boxes))
                for box, values in zip(self.table_boxes, rows, strict=True):
                    (dense,) = self.dense.read(None, ((box,), key))
                    close(values, dense.view(box[2]))


def _split(parts, rows):
    return [parts[: len(parts) - rows], *parts[len(parts) - rows :]]


def close(one, other):
    assert torch.allclose(one, other, rtol=1e-11, atol=1e-13), (one - other).abs().max()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_is_read_whenever_it_is_as_if_every_row_took_every_step(name, monkeypatch):
    monkeypatch.setattr(table, "_LONGEST", 5)
    for seed in range(4):
        twins = Twins(OPTIMIZERS[name], seed, ranks=1 + seed % 2)
        for _ in range(60):
            act = twins.draw.choice([twins.step] * 5 + [twins.pin, twins.unpin, twins.restart, twins.check_kept, None])
            if act is not None:
                act()
                continue
            ids = set(twins.draw.sample(range(10), twins.draw.randint(0, 10)))
            twins.read(twins.draw.choice([(None, None), *twins.copies.values()]), ids)
        for copies in [(None, None), *twins.copies.values()]:
            twins.read(copies)
        twins.check_kept()


def test_late_gradients_of_rows_are_compensated_as_whole_ones_are():
    twins = Twins(OPTIMIZERS["adamw"], 3, delay=Delay(kind="constant", strength=0.5))
    for _ in range(12):
        twins.pin()
        twins.step()
        twins.step()
        twins.read()
        twins.unpin()


def late(rows):
    """All numbers the same, whichever rows are at their side."""
    optimizer = AdamW(lr=0.05, weight_decay=0.3)
    flat = torch.randn(40 * 7, generator=torch.Generator().manual_seed(1))
    made = table.Table("w", flat, 7, optimizer)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randperm(40, generator=generator)[:5].sort().values
        made.step(ids, torch.randn(5, 7, generator=generator), 1.0)
        for some in rows:
            made.read(torch.tensor(some))
    return made.read(None)


def test_when_rows_catch_up_changes_no_bit():
    """So a server that comes back from its log, and settles at other times, has the same."""
    once = late([])
    assert torch.equal(once, late([[3], [7, 9]])) and torch.equal(once, late([list(range(40))]))


def test_rows_that_rest_are_not_touched(monkeypatch):
    """SGD without momentum and decay, Adagrad without decay: a step costs what its rows cost."""
    taken = []
    step = table.Table._step
    monkeypatch.setattr(
        table.Table, "_step", lambda self, rows, *a: (taken.append(len(rows.last)), step(self, rows, *a))[1]
    )
    for optimizer, rests in ((SGD(lr=0.1), True), (Adagrad(lr=0.1), True), (AdamW(lr=0.1), False)):
        made = table.Table("w", torch.ones(50 * 4), 4, optimizer)
        for step_number in range(70):
            made.step(torch.tensor([step_number % 7]), torch.ones(1, 4), 1.0)
        assert (max(taken) == 1) == rests
        taken.clear()
