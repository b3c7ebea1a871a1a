"""Blocks dealt out to ranks that hold any boxes of tensors: every value once, and back where it came from."""

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from paceline.comm.boxes import Block, Part, block
from paceline.parallel.dealt import Dealt, blocks_of, cut
from paceline.parallel.full import FullTensors


class Threads:
    """The axis of some ranks that are threads of this process."""

    def __init__(self, size):
        self.size, self.barrier, self.room = size, threading.Barrier(size), [None] * size

    def rank(self, index):
        return _Rank(self, index)


class _Rank:
    def __init__(self, threads, index):
        self.threads, self.index, self.size = threads, index, threads.size

    def _all(self, own):
        threads = self.threads
        threads.room[self.index] = own
        threads.barrier.wait(10)
        told = list(threads.room)
        threads.barrier.wait(10)
        return told

    def maximum(self, tensor, *, where):
        return torch.stack(self._all(tensor)).amax(0)

    def all_gather(self, tensor, dim, *, where):
        return torch.cat(self._all(tensor), dim)

    def exchange_rows(self, rows, sent, received, *, where):
        told = self._all(rows.split(list(sent)))
        pieces = [rank[self.index] for rank in told]
        assert [len(piece) for piece in pieces] == list(received)
        return torch.cat(pieces)


def random_box(rng, shape):
    start = tuple(rng.randrange(size) for size in shape)
    return Block(start, tuple(rng.randint(1, n - a) for n, a in zip(shape, start, strict=True)), (0,) * len(shape))


@pytest.mark.parametrize("seed", range(5))
def test_a_box_meets_a_run_in_boxes_in_row_major_order(seed):
    rng = random.Random(seed)
    for _ in range(200):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))
        full = torch.arange(max(1, torch.Size(shape).numel())).view(shape)
        own, begin = random_box(rng, shape), rng.randint(0, full.numel())
        end = rng.randint(begin, full.numel() + 2)
        met = list(cut(own, shape, begin, end))
        values = own.of_full(full)
        assert [v for b in met for v in b.of_full(full).flatten()] == [v for v in values.flatten() if begin <= v < end]
        assert all(torch.equal(b.of(values), b.of_full(full)) for b in met)


def random_parts(rng, shape, ranks):
    """What each rank holds of a tensor: pieces of one dimension, in runs, some held by several ranks, some by none."""
    holders = rng.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
    if not shape:
        return [Part(shape, (block(shape),))] * ranks
    dim = rng.randrange(len(shape))
    marks = sorted({0, shape[dim], *(rng.randint(0, shape[dim]) for _ in range(2 * holders))})
    runs = list(itertools.pairwise(marks))
    parts = []
    for rank in range(ranks):
        inner, boxes = rng.randint(0, 2), []
        for begin, end in runs[rank % holders :: holders]:
            start = tuple(begin if d == dim else 0 for d in range(len(shape)))
            size = tuple(end - begin if d == dim else n for d, n in enumerate(shape))
            boxes.append(Block(start, size, tuple(inner if d == dim else 0 for d in range(len(shape)))))
            inner += end - begin
        parts.append(Part(shape, tuple(boxes)))
    for rank in range(holders, ranks):  # copies are equal
        parts[rank] = parts[rank % holders]
    return parts


def local_of(part, full):
    """A tensor like the part, with padding of -1."""
    size = [max([1, *(b.inner[d] + b.shape[d] for b in part.blocks)]) for d in range(full.ndim)]
    local = full.new_full(size, -1)
    for b in part.blocks:
        b.of(local).copy_(b.of_full(full))
    return local


@pytest.mark.parametrize("seed", range(12))
def test_every_value_stands_in_one_block_and_comes_back(seed):
    rng = random.Random(seed)
    ranks, size = rng.randint(1, 4), rng.choice([1, 3, 8, 64])
    shapes = {f"t{i}": tuple(rng.randint(1, 9) for _ in range(rng.randint(0, 3))) for i in range(rng.randint(1, 6))}
    full = {name: torch.rand(shape) + 1 for name, shape in shapes.items()}
    parts = {
        name: random_parts(rng, shape, ranks) if ranks > 1 else [Part(shape, (block(shape),))]
        for name, shape in shapes.items()
    }
    threads = Threads(ranks)

    def work(rank):
        here = {name: parts[name][rank] for name in shapes}
        held = FullTensors(here, threads.rank(rank), device=torch.device("cpu"))
        dealt = Dealt(held, list(shapes), size)
        local = {name: local_of(part, full[name]) for name, part in here.items()}
        blocks = dealt.gather(local)
        assert blocks.shape == (dealt.count, size) and len(dealt.lengths) == dealt.count
        back = dealt.scatter(blocks * 2, local)
        for name, tensor in back.items():
            assert tensor.shape == local[name].shape
            assert torch.equal(tensor, torch.where(local[name] < 0, 0.0, 2 * local[name]))
        return dealt, blocks

    with ThreadPoolExecutor(ranks) as executor:
        told = list(executor.map(work, range(ranks)))
    counts = [dealt.count for dealt, _ in told]
    assert max(counts) - min(counts) <= 1 and sum(counts) == sum(blocks_of(shape, size) for shape in shapes.values())
    for name, shape in shapes.items():
        runs = [(dealt, blocks, run) for dealt, blocks in told for run in dealt.runs if run.name == name]
        rows = [
            (run.first + i, blocks[run.row + i], dealt.lengths[run.row + i])
            for dealt, blocks, run in runs
            for i in range(run.count)
        ]
        assert [number for number, _, _ in rows] == list(range(blocks_of(shape, size)))
        flat = torch.cat([row[:length] for _, row, length in rows])
        assert torch.equal(flat, full[name].flatten())
        assert not any(row[length:].any() for _, row, length in rows)
