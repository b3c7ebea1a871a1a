"""Fixed blocks of full tensors, dealt out to the ranks of a stage, for what needs some neighbours whole.

A tensor in row-major order is cut into blocks of ``size`` values; its last block is filled up with zeros. The blocks of
all tensors, one after the other, are dealt out as one run to each rank, as many to each, whatever the ranks hold. So a
block and what is made of it are the same under every layout, and no rank has more than its share.

    gather     from tensors like this rank's parts to its blocks: one all-to-all inside the stage
    scatter    and back

A run of blocks meets a box that a rank holds in a few boxes (``cut``), so that nothing has to be sorted or indexed.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.comm.boxes import Block, Shape
from paceline.parallel.full import FullTensors


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring blocks of one tensor."""

    name: str
    first: int
    """The number of the first of them in the tensor."""
    count: int
    row: int
    """Where they begin among the blocks of the rank."""


def blocks_of(shape: Sequence[int], size: int) -> int:
    """How many blocks a tensor has."""
    return -(-math.prod(shape) // size)


class Dealt:
    """The blocks of some tensors; all ranks of the stage make it together, with the same names in the same order."""

    def __init__(self, full: FullTensors, names: Sequence[str], size: int) -> None:
        self.size, self._full, self._names = size, full, list(names)
        counts = [blocks_of(full.shape(name), size) for name in names]
        ends = list(itertools.accumulate(counts))
        self._by_rank = [list(self._share(counts, ends, rank)) for rank in range(full.ranks)]
        self.runs: list[Run] = self._by_rank[full.index]
        """This rank's, in the order of the tensors."""
        self.count = sum(run.count for run in self.runs)
        """Blocks of this rank."""

    @property
    def lengths(self) -> Tensor:
        """How many values of each of this rank's blocks are the tensor's: int64 (count,)."""
        lengths = torch.full((self.count,), self.size)
        for run in self.runs:
            rest = math.prod(self._full.shape(run.name)) - (run.first + run.count - 1) * self.size
            lengths[run.row + run.count - 1] = min(rest, self.size)
        return lengths

    def gather(self, values: Mapping[str, Tensor]) -> Tensor:
        """This rank's blocks (count, size) of the full tensors, given tensors like every rank's parts."""
        like = values[self._names[0]]
        dtype = like.dtype
        assert all(values[name].dtype is dtype for name in self._names), "blocks of several dtypes"
        blocks = like.new_zeros(self.count, self.size)
        if self._full.ranks == 1:
            for run, flat in self._whole(blocks):
                flat.copy_(values[run.name].reshape(-1))
            return blocks
        outward = [
            [
                b.of(values[run.name])
                for run in runs
                if self._full.counts(run.name)
                for b in self._met(run, self._full.index)
            ]
            for runs in self._by_rank
        ]
        inward = [
            [
                self._in_run(blocks, run, b)
                for run in self.runs
                if rank in self._full.senders(run.name)
                for b in self._met(run, rank)
            ]
            for rank in range(self._full.ranks)
        ]
        self._full.exchange(outward, inward, like)
        return blocks

    def scatter(self, blocks: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts, each of the shape of one of ``like``, from every rank's blocks; padding is zero."""
        if self._full.ranks == 1:
            return {run.name: flat.view(like[run.name].shape) for run, flat in self._whole(blocks)} | {
                name: blocks.new_zeros(like[name].shape) for name in self._names if not like[name].numel()
            }
        local = {name: blocks.new_zeros(like[name].shape) for name in self._names}
        outward = [
            [self._in_run(blocks, run, b) for run in self.runs for b in self._met(run, rank)]
            for rank in range(self._full.ranks)
        ]
        inward = [
            [b.of(local[run.name]) for run in runs for b in self._met(run, self._full.index)] for runs in self._by_rank
        ]
        self._full.exchange(outward, inward, blocks)
        return local

    def _share(self, counts: Sequence[int], ends: Sequence[int], rank: int) -> Iterator[Run]:
        """What of the blocks of all tensors is dealt to a rank."""
        total, ranks = (ends[-1] if ends else 0), self._full.ranks
        begin, end = total * rank // ranks, total * (rank + 1) // ranks
        for name, count, last in zip(self._names, counts, ends, strict=True):
            first, until = max(begin, last - count), min(end, last)
            if first < until:
                yield Run(name, first - (last - count), until - first, first - begin)

    def _whole(self, blocks: Tensor) -> Iterator[tuple[Run, Tensor]]:
        """In one process: each tensor as a flat view of its blocks."""
        for run in self.runs:
            flat = blocks[run.row : run.row + run.count].view(-1)
            yield run, flat[: math.prod(self._full.shape(run.name))]

    def _met(self, run: Run, rank: int) -> list[Block]:
        """What of a run lies in the boxes of a rank."""
        begin, end = run.first * self.size, (run.first + run.count) * self.size
        shape = self._full.shape(run.name)
        return [met for b in self._full.blocks(run.name)[rank] for met in cut(b, shape, begin, end)]

    def _in_run(self, blocks: Tensor, run: Run, b: Block) -> Tensor:
        """A box of a full tensor as a view of the blocks that hold it."""
        strides = _strides(self._full.shape(run.name))
        at = sum(start * stride for start, stride in zip(b.start, strides, strict=True))
        offset = (run.row - run.first) * self.size + at
        return blocks.as_strided(b.shape, strides, blocks.storage_offset() + offset)


def cut(b: Block, shape: Shape, begin: int, end: int) -> Iterator[Block]:
    """What of a box has flat positions ``begin`` to ``end`` in the full tensor, as boxes in row-major order."""
    if not shape:
        if begin <= 0 < end:
            yield b
        return
    row = math.prod(shape[1:])
    if row == 0 or begin >= end:
        return
    first, last = -(-begin // row), end // row  # whole rows in between
    if first > last:  # both ends lie within one row
        yield from _in_row(b, shape, last, begin - last * row, end - last * row)
        return
    if begin < first * row:
        yield from _in_row(b, shape, first - 1, begin - (first - 1) * row, row)
    low, high = max(first, b.start[0]), min(last, b.start[0] + b.shape[0])
    if low < high:
        inner = b.inner[0] + low - b.start[0]
        yield Block((low, *b.start[1:]), (high - low, *b.shape[1:]), (inner, *b.inner[1:]))
    if end > last * row:
        yield from _in_row(b, shape, last, 0, end - last * row)


def _in_row(b: Block, shape: Shape, row: int, begin: int, end: int) -> Iterator[Block]:
    """Within one place of the first dimension."""
    if not b.start[0] <= row < b.start[0] + b.shape[0]:
        return
    for rest in cut(Block(b.start[1:], b.shape[1:], b.inner[1:]), shape[1:], begin, end):
        inner = b.inner[0] + row - b.start[0]
        yield Block((row, *rest.start), (1, *rest.shape), (inner, *rest.inner))


def _strides(shape: Shape) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
