"""Full tensors for optimizers: what is not a matter of single values, computed from parts that ranks hold.

The ranks of a stage (shard x context x tensor) hold boxes of each of its parameters, whatever passes cut them. What the
boxes are, they tell each other once. After that there are three ways to see more than one's own values:

    gather, scatter     every full tensor comes together on one rank, its owner, and each rank gets its part of a result
    sums, part_of_sums  sums along a dimension, of which each rank adds its share to a small tensor
    total               the sum of small tensors over the ranks

Owners are chosen so that each has about as much to do. Ranks that hold the same boxes (copies over ``tensor``) all get
results, and one of them counts. Every method is called by all ranks of the stage together, with the same names in the
same order. In one process a full tensor is the tensor itself, and nothing is copied.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from paceline.comm.boxes import Block, Part, Shape, whole
from paceline.comm.mesh import Axis, Mesh
from paceline.parallel.boxes import part_of
from paceline.parallel.held import Held

Blocks = tuple[Block, ...]


class FullTensors:
    """The parameters of one stage, by name."""

    def __init__(
        self, parts: Mapping[str, Part], axis: Axis, *, device: torch.device, copies: frozenset[str] = frozenset()
    ) -> None:
        """``parts``: what this rank holds. ``device``: where ranks talk. ``copies``: what this rank need not save."""
        self._axis, self._device, self._parts = axis, device, dict(parts)
        self._load = [0.0] * axis.size
        names = list(parts)
        told = _exchange([(parts[name].blocks, name in copies) for name in names], axis, device)
        self._blocks: dict[str, list[Blocks]] = {name: [rank[i][0] for rank in told] for i, name in enumerate(names)}
        self.copies = frozenset(name for i, name in enumerate(names) if all(rank[i][1] for rank in told))
        """Parameters that ranks of another stage save, which hold the same."""
        self._senders = {name: [r for r in range(axis.size) if self._is_first(name, r)] for name in names}
        for name in names:
            sent = sum(math.prod(b.shape) for rank in self._senders[name] for b in self._blocks[name][rank])
            assert sent == math.prod(self.shape(name)), f"the boxes of {name} are not all of it once"

    @classmethod
    def of(
        cls, parameters: Mapping[str, Tensor], held: Mapping[str, Held], mesh: Mesh, *, device: torch.device
    ) -> Self:
        """Of what passes left of a model's parameters; all ranks of a replica call it together."""
        parts = {name: part_of(parameter, held.get(name)) for name, parameter in parameters.items()}
        copies = frozenset(name for name in parts if name in held and not held[name].is_owner)
        return cls(parts, mesh.stage, device=device, copies=copies)

    @classmethod
    def alone(cls, parameters: Mapping[str, Tensor]) -> Self:
        """Of parameters that this process holds whole."""
        device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        return cls({name: whole(p.shape) for name, p in parameters.items()}, Axis(name="stage"), device=device)

    @property
    def index(self) -> int:
        """This rank's place in the stage."""
        return self._axis.index

    @property
    def ranks(self) -> int:
        """Ranks of the stage."""
        return self._axis.size

    def shape(self, name: str) -> Shape:
        """Of the full tensor."""
        return self._parts[name].full_shape

    def part(self, name: str) -> Part:
        """What this rank holds of it."""
        return self._parts[name]

    def blocks(self, name: str) -> Sequence[Blocks]:
        """The boxes of it that each rank holds."""
        return self._blocks[name]

    def senders(self, name: str) -> Sequence[int]:
        """Ranks that together hold every value of it once."""
        return self._senders[name]

    def part_of_rows(self, name: str, size: int) -> Part:
        """What this rank holds of a tensor like it but for the last dimension, which has ``size`` and is whole."""
        blocks = dict.fromkeys(_widened(b, size) for b in self._parts[name].blocks)
        return Part((*self.shape(name)[:-1], size), tuple(blocks))

    def counts(self, name: str) -> bool:
        """Whether this rank's values are those that count: of ranks that hold the same ones, one does."""
        return self._axis.index in self._senders[name]

    def holder(self, name: str, dropped: int = 0) -> tuple[int, int]:
        """(index, count) among the ranks that hold the same boxes, but for the last ``dropped`` dimensions."""
        boxes = [_places(_without_last(blocks, dropped)) for blocks in self._blocks[name]]
        same = [rank for rank, own in enumerate(boxes) if own == boxes[self._axis.index]]
        return same.index(self._axis.index), len(same)

    def columns(self, name: str, size: int) -> Tensor | None:
        """Where the ``size`` columns (last dimension) that a rank holds are in the full tensor: (size,) int64.

        None if every rank holds all of them. Columns of padding are said to be the first.
        """
        full = self.shape(name)[-1]
        if all(b.shape[-1] == full for blocks in self._blocks[name] for b in blocks):
            return None
        columns = torch.zeros(size, dtype=torch.int64)
        for b in self._parts[name].blocks:
            columns[b.inner[-1] : b.inner[-1] + b.shape[-1]] = torch.arange(b.start[-1], b.start[-1] + b.shape[-1])
        return columns

    def owners(self, names: Iterable[str], cost: Callable[[Shape], float]) -> dict[str, int]:
        """The rank that computes with each full tensor: the costliest first, each to the rank with the least to do.

        What earlier calls have given ranks to do counts too.
        """
        owner = {}
        for name in sorted(names, key=lambda name: (-cost(self.shape(name)), name)):
            rank = self._load.index(min(self._load))
            owner[name] = rank
            self._load[rank] += cost(self.shape(name))
        return owner

    def gather(self, tensors: Mapping[str, Tensor], owner: Mapping[str, int]) -> dict[str, Tensor]:
        """From tensors like this rank's parts to the full ones of which it is the owner."""
        if self._axis.size == 1:
            return dict(tensors)
        full = {
            name: local.new_zeros(self.shape(name))
            for name, local in tensors.items()
            if owner[name] == self._axis.index
        }
        for names in _by_dtype(tensors):
            outward = [
                [
                    (tensors[name], self._parts[name].blocks)
                    for name in names
                    if owner[name] == rank and self.counts(name)
                ]
                for rank in range(self._axis.size)
            ]
            inward = [
                [
                    (full[name], self._blocks[name][rank])
                    for name in names
                    if name in full and rank in self._senders[name]
                ]
                for rank in range(self._axis.size)
            ]
            self.exchange(
                [[b.of(t) for t, blocks in to for b in blocks] for to in outward],
                [[b.of_full(t) for t, blocks in of for b in blocks] for of in inward],
                tensors[names[0]],
            )
        return full

    def scatter(
        self, full: Mapping[str, Tensor], like: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """This rank's parts, each like one of ``like``, of the full tensors that their owners give; padding is zero."""
        if self._axis.size == 1:
            return dict(full)
        local = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        for names in _by_dtype(like):
            outward = [
                [
                    b.of_full(full[name])
                    for name in names
                    if owner[name] == self._axis.index
                    for b in self._blocks[name][r]
                ]
                for r in range(self._axis.size)
            ]
            inward = [
                [b.of(local[name]) for name in names if owner[name] == r for b in self._parts[name].blocks]
                for r in range(self._axis.size)
            ]
            self.exchange(outward, inward, like[names[0]])
        return local

    def sums(self, name: str, local: Tensor, dim: int) -> Tensor:
        """What this rank adds to the sums of a full tensor along ``dim``: without that dimension, zero elsewhere."""
        dim %= local.ndim
        shape = self.shape(name)
        result = local.new_zeros(shape[:dim] + shape[dim + 1 :])
        if self.counts(name):
            for b in self._parts[name].blocks:
                _without(b, dim).of_full(result).add_(b.of(local).sum(dim))
        return result

    def part_of_sums(self, name: str, sums: Tensor, like: Tensor, dim: int) -> Tensor:
        """Of sums along ``dim`` those that belong to this rank's values, to be broadcast along ``dim`` of ``like``."""
        dim %= like.ndim
        if self._axis.size == 1:
            return sums.unsqueeze(dim)
        result = sums.new_zeros(like.shape[:dim] + like.shape[dim + 1 :])
        for b in self._parts[name].blocks:
            own = _without(b, dim)
            own.of(result).copy_(own.of_full(sums))
        return result.unsqueeze(dim)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over the ranks of tensors of one dtype."""
        if self._axis.size == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        total = self._axis.all_reduce(flat.to(self._device), where="optimizer").to(flat.device)
        split = total.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(split, tensors, strict=True)]

    def norms(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """L2 norms of the full tensors: squares are added in fp64, in the order of ranks.

        So a parameter that ranks of two stages hold has the same norm in both, to the last bit.
        """
        if not tensors:
            return {}
        squares = [self._square(name, local) if self.counts(name) else 0.0 for name, local in tensors.items()]
        own = torch.tensor([squares], dtype=torch.float64, device=self._device)
        total = functools.reduce(torch.add, self._axis.all_gather(own, 0, where="norms").cpu())
        return dict(zip(tensors, total.sqrt().tolist(), strict=True))

    def _square(self, name: str, local: Tensor) -> float:
        boxes = (b.of(local) for b in self._parts[name].blocks)
        return sum(float(torch.linalg.vector_norm(box, dtype=torch.float64)) ** 2 for box in boxes)

    def greatest(self, name: str, values: Tensor) -> Tensor:
        """The greatest over the ranks that hold parts of the same rows, of values (..., N) for each row of this rank.

        A row is what only the last dimension runs through: ``values`` are like this rank's part in all dimensions but
        that one, of which every rank has N.
        """
        size = values.shape[-1]
        full = values.new_zeros(*self.shape(name)[:-1], size)
        windows = [_widened(b, size) for b in self._parts[name].blocks]
        for window in windows:
            room = window.of_full(full)
            room.copy_(torch.maximum(room, window.of(values)))
        full = self._axis.maximum(full.to(self._device), where="optimizer").to(values.device)
        result = torch.zeros_like(values)
        for window in windows:
            window.of(result).copy_(window.of_full(full))
        return result

    def _is_first(self, name: str, rank: int) -> bool:
        places = [_places(blocks) for blocks in self._blocks[name]]
        return bool(places[rank]) and places.index(places[rank]) == rank

    def exchange(self, outward: Sequence[Sequence[Tensor]], inward: Sequence[Sequence[Tensor]], like: Tensor) -> None:
        """Send boxes to each rank; fill boxes with what comes from each. All are of the dtype of ``like``."""
        pieces = [box.flatten() for boxes in outward for box in boxes]
        rows = (torch.cat(pieces) if pieces else like.new_empty(0)).to(self._device)
        sent = [sum(box.numel() for box in boxes) for boxes in outward]
        received = [sum(box.numel() for box in boxes) for boxes in inward]
        boxes = [box for each in inward for box in each]
        got = self._axis.exchange_rows(rows, sent, received, where="optimizer").to(like.device)
        for box, values in zip(boxes, got.split([box.numel() for box in boxes]), strict=True):
            box.copy_(values.view(box.shape))


def _by_dtype(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    names: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.dtype, []).append(name)
    return list(names.values())


def _places(blocks: Blocks) -> list[tuple[Shape, Shape]]:
    """Which values of the full tensor boxes are of."""
    return sorted((b.start, b.shape) for b in blocks)


def _without(b: Block, dim: int) -> Block:
    start, shape, inner = (values[:dim] + values[dim + 1 :] for values in (b.start, b.shape, b.inner))
    return Block(start, shape, inner)


def _widened(b: Block, size: int) -> Block:
    """The same rows, with all of a last dimension of ``size``."""
    return Block((*b.start[:-1], 0), (*b.shape[:-1], size), (*b.inner[:-1], 0))


def _without_last(blocks: Blocks, number: int) -> Blocks:
    for _ in range(number):
        blocks = tuple(dict.fromkeys(_without(b, len(b.shape) - 1) for b in blocks))
    return blocks


def _exchange(own: Sequence[tuple[Blocks, bool]], axis: Axis, device: torch.device) -> list[list[tuple[Blocks, bool]]]:
    """What every rank says of each of the parameters: its boxes, and a mark."""
    if axis.size == 1:
        return [list(own)]
    numbers = []
    for blocks, mark in own:
        numbers += [int(mark), len(blocks)]
        for b in blocks:
            numbers += [len(b.shape), *b.start, *b.shape, *b.inner]
    length = int(axis.maximum(torch.tensor([len(numbers)], device=device), where="boxes"))
    padded = torch.tensor(numbers + [0] * (length - len(numbers)), device=device)
    return [_read(row, len(own)) for row in axis.all_gather(padded.unsqueeze(0), 0, where="boxes").tolist()]


def _read(numbers: Sequence[int], count: int) -> list[tuple[Blocks, bool]]:
    rest = iter(numbers)

    def take() -> Block:
        dims = next(rest)
        start, shape, inner = (tuple(next(rest) for _ in range(dims)) for _ in range(3))
        return Block(start, shape, inner)

    told = []
    for _ in range(count):
        mark, blocks = next(rest), next(rest)
        told.append((tuple(take() for _ in range(blocks)), bool(mark)))
    return told
