"""Where the values of each parameter are kept: pieces of tensors, dealt out to shards by bytes.

A piece is a box of a full tensor. It follows from the shapes alone, so every rank and every server knows all of them. A
rank of a replica holds boxes too, of whatever layout; what of them lies in a piece is a box again.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from paceline.comm.boxes import Part, Shape, whole

LARGEST_BYTES = 4 << 20
"""Of a piece: larger tensors are split."""

Box = tuple[int, Shape, Shape]
"""In a piece, by its number on the shard: where a box starts, and its shape."""


@dataclass(frozen=True)
class Piece:
    """A box of a full tensor, on one shard."""

    name: str
    start: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        """Of its values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Places:
    """The pieces of every shard, each shard's in the order of the parameters."""

    shapes: Mapping[str, Shape]
    shards: int
    value_bytes: int = 4
    largest_bytes: int = LARGEST_BYTES
    tables: frozenset[str] = frozenset()
    """Parameters whose rows stay whole, however long they are."""

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """By shard: the largest pieces are dealt out first, each to the shard with the least so far."""
        pieces = [Piece(name, *box) for name, shape in self.shapes.items() for box in self._split(name, shape)]
        load, owner = [0] * self.shards, [0] * len(pieces)
        for i in sorted(range(len(pieces)), key=lambda i: (-pieces[i].numel, i)):
            owner[i] = min(range(self.shards), key=lambda shard: (load[shard], shard))
            load[owner[i]] += pieces[i].numel
        return [[piece for piece, at in zip(pieces, owner, strict=True) if at == shard] for shard in range(self.shards)]

    def _split(self, name: str, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
        most = max(1, self.largest_bytes // self.value_bytes)
        return _split(shape, max(most, math.prod(shape[1:])) if name in self.tables else most)

    def cuts(self, held: Mapping[str, Part | None], names: Sequence[str], shard: int) -> "Cuts":
        """What of some parameters, of which a rank holds these parts, lies on a shard."""
        boxes, slots = [], []
        wanted = set(names)
        for number, piece in enumerate(self.pieces[shard]):
            if piece.name not in wanted:
                continue
            part = held[piece.name] or whole(self.shapes[piece.name])
            for block in part.blocks:
                low = tuple(map(max, block.start, piece.start))
                high = tuple(
                    min(a + n, b + k)
                    for a, n, b, k in zip(block.start, block.shape, piece.start, piece.shape, strict=True)
                )
                shape = tuple(b - a for a, b in zip(low, high, strict=True))
                if all(n > 0 for n in shape):
                    boxes.append((number, tuple(a - b for a, b in zip(low, piece.start, strict=True)), shape))
                    inner = tuple(a - b + c for a, b, c in zip(low, block.start, block.inner, strict=True))
                    slots.append((piece.name, tuple(slice(a, a + n) for a, n in zip(inner, shape, strict=True))))
        return Cuts(tuple(boxes), tuple(slots))


@dataclass(frozen=True)
class Cuts:
    """A rank's boxes on one shard: they are sent one after the other, each in row-major order."""

    boxes: tuple[Box, ...]
    slots: tuple[tuple[str, tuple[slice, ...]], ...]
    """By box: the parameter, and the place in the rank's local tensor."""

    @cached_property
    def numel(self) -> int:
        """Values of all of them."""
        return sum(math.prod(shape) for _, _, shape in self.boxes)

    def split(self, flat: Tensor) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        """The parameter, the place in its local tensor, and the values of each box."""
        at = 0
        for (name, slot), (_, _, shape) in zip(self.slots, self.boxes, strict=True):
            numel = math.prod(shape)
            yield name, slot, flat[at : at + numel].view(shape)
            at += numel


def _split(shape: Shape, most: int) -> Iterator[tuple[Shape, Shape]]:
    """Start and shape of boxes of at most ``most`` values where that can be, cut along the first dimension that can."""
    numel = math.prod(shape)
    dim = next((i for i, n in enumerate(shape) if n > 1), None)
    if numel <= most or dim is None:
        if numel > 0:
            yield (0,) * len(shape), tuple(shape)
        return
    row = numel // shape[dim]
    parts = min(shape[dim], -(-numel // most)) if row <= most else shape[dim]
    edges = [shape[dim] * i // parts for i in range(parts + 1)]
    for low, high in itertools.pairwise(edges):
        for start, inner in _split((*shape[:dim], high - low, *shape[dim + 1 :]), most):
            yield tuple(n + low * (i == dim) for i, n in enumerate(start)), inner
