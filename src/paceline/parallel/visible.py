"""Which keys each query sees where a sequence is cut over ranks.

Positions are those of the whole sequence, whatever part of it a rank holds. A part is some spans of positions; its
tensors hold these spans one after the other. Attention between two parts is computed tile by tile, and a tile in which
no query sees any key is left out.

Shapes: B batch, S positions of the whole sequence, R queries of a tile, C keys of a tile.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Spans = Sequence[slice]
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether a query sees a key, from the numbers of row, head, query and key, which are broadcast: a mask function of
transformers."""

TILE_TOKENS = 1024
"""Rows and columns of a tile, at most, where the mask has to be written out: 1 MiB of truth values a row of a batch."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Some queries of one part, some keys of another, and which of these they see."""

    rows: slice
    """In the tensors of the part that asks."""
    columns: slice
    """In the tensors of the part that is asked."""
    query: slice
    """The positions of the rows in the whole sequence."""
    key: slice
    """The positions of the columns."""
    causal: bool = False
    """Query i of the tile sees keys 0 to i of the tile only; it has as many rows as columns."""
    mask: Tensor | None = None
    """(B|1, 1, R, C), True where a query sees a key; None if all of them do, but for ``causal``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Visible:
    """The mask of one kind of layer for one micro-batch."""

    sees: Sees
    """Asked only where ``documents`` or ``reach`` say more than ``causal``."""
    causal: bool
    """No query sees a later key."""
    reach: int | None
    """No query sees a key further away than this many positions."""
    documents: Tensor | None
    """(B, S) int: a query sees keys of its own document only, and none where the number is negative. Positions that
    ``sees`` is asked about count from the start of the document."""
    tokens: int
    """S."""
    device: torch.device
    _seen: dict[tuple[int, ...], float] = field(default_factory=dict, init=False)
    """Part of the pairs of a tile, by where it is. Kept, because reading it makes a device wait, and all layers ask."""

    @property
    def whole(self) -> Spans:
        """All positions."""
        return (slice(0, self.tokens),)

    @property
    def plain(self) -> bool:
        """Whether order alone decides, so that no mask need ever be written out."""
        return self.documents is None and self.reach is None

    def tiles(self, queries: Spans, keys: Spans) -> Iterator[Tile]:
        """The tiles between two parts in which some query sees some key."""
        size = self.tokens if self.plain else TILE_TOKENS
        asked = list(_cut(keys, size))
        for query, rows in _cut(queries, size):
            for key, columns in asked:
                if tile := self._tile(query, key, rows, columns):
                    yield tile

    def _tile(self, query: slice, key: slice, rows: slice, columns: slice) -> Tile | None:
        if self.causal and key.start >= query.stop:
            return None
        if self.reach is not None:
            gap = max(query.start - key.stop, key.start - query.stop) + 1
            if gap > self.reach:
                return None
        if self.plain and (not self.causal or key.stop <= query.start + 1):
            return Tile(rows=rows, columns=columns, query=query, key=key)
        if self.plain and query == key:
            return Tile(rows=rows, columns=columns, query=query, key=key, causal=True)
        seen = self._seen_part(query, key)
        if seen == 0.0:
            return None
        return Tile(
            rows=rows, columns=columns, query=query, key=key, mask=None if seen == 1.0 else self._mask(query, key)
        )

    def _seen_part(self, query: slice, key: slice) -> float:
        """Of all pairs of a tile."""
        place = query.start, query.stop, key.start, key.stop
        if place not in self._seen:
            mask = self._mask(query, key)
            self._seen[place] = int(mask.sum()) / mask.numel()
        return self._seen[place]

    def _mask(self, query: slice, key: slice) -> Tensor:
        row = torch.arange(query.start, query.stop, device=self.device)[None, None, :, None]
        column = torch.arange(key.start, key.stop, device=self.device)[None, None, None, :]
        zero = row.new_zeros(1, 1, 1, 1)
        if self.documents is None:
            return self.sees(zero, zero, row, column).expand(1, 1, row.shape[2], column.shape[3])
        batch = torch.arange(len(self.documents), device=self.device)[:, None, None, None]
        ours, theirs = self.documents[:, None, query, None], self.documents[:, None, None, key]
        starts = self._starts
        row, column = row - starts[:, None, query, None], column - starts[:, None, None, key]
        return (ours == theirs) & (theirs >= 0) & self.sees(batch, zero, row, column)

    @cached_property
    def _starts(self) -> Tensor:
        """(B, S): where the document of each position begins."""
        assert self.documents is not None
        place = torch.arange(self.tokens, device=self.device).expand_as(self.documents)
        begins = self.documents.diff(dim=1, prepend=self.documents[:, :1] - 1) != 0
        return torch.where(begins, place, 0).cummax(1).values


def _cut(spans: Spans, size: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of at most ``size`` positions: where they are in the sequence, and where in the tensors of the part."""
    inner = 0
    for span in spans:
        for start in range(span.start, span.stop, size):
            length = min(size, span.stop - start)
            yield slice(start, start + length), slice(inner, inner + length)
            inner += length
