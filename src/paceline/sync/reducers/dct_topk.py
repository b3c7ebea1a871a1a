"""The greatest coefficients of each tile, as DeMo sends momentum (Peng, Quesnelle and Kingma 2024, arXiv 2411.19870).

    p <- share * value + decay * residual     decay 0.999: the residual is a momentum, of each replica by itself
    c <- DCT of each tile of 64 x 64;   the ``number`` greatest of each are sent, with their places
    residual <- p - inverse DCT of what was sent;   the sum is the inverse DCT of what all have sent

With ``optimizer: {name: lion, betas: [0, 0]}``, which goes by the sign, and ``all_reduce``, it is DeMo, but for two
things: its code divides a coefficient by the members that have sent it, where here it is a sum over all; and it weighs
gradients by their rate, which shows only where that changes. Tiles are as large as divisors of the dimensions allow, up
to 64. Places take 12 bits, where that code has 64. Every member's coefficients go to all.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from paceline.config import Count, Options, Share
from paceline.plan.wire import all_gather_bytes, all_gather_delays
from paceline.sync.base import Shapes, SyncContext
from paceline.sync.reducers.packing import as_bytes, from_bytes, packed_12, unpacked_12
from paceline.sync.reducers.topk import greatest, row_bytes
from paceline.sync.reducers.whole import Arrive, WholeReducer, as_matrix

TILE = 64


class DctTopK(Options):
    """Send the greatest coefficients of each tile of 64 x 64, with their places: DeMo's encoding."""

    number: Count = 32
    """Coefficients of a tile."""
    decay: Share = 0.999
    """What is left of the residual each time."""
    error_feedback: bool = True
    """Keep what is not sent and add it the next time."""

    is_exact: ClassVar[bool] = False
    ns_per_value: ClassVar[float] = 28
    source: ClassVar[str] = "Peng et al. 2024 (DeMo), arXiv 2411.19870"

    def wire_bytes(self, shapes: Shapes, members: int) -> int:
        """Coefficients and places of one member to all others."""
        return all_gather_bytes(_sent_bytes(shapes, self.number), members)

    def delays(self, shapes: Shapes, members: int) -> int:
        """Of one gathering."""
        return all_gather_delays(members)

    def late_delays(self, shapes: Shapes, members: int) -> int:
        """None: it is one exchange."""
        return 0

    def state_bytes(self, shapes: Shapes) -> int:
        """The residual, that of before until the sum is used; what is sent, and six copies while it is made."""
        values = sum(4 * math.prod(shape) for shape in shapes.values())
        return values * (6 + 2 * self.error_feedback) + _sent_bytes(shapes, self.number)

    def build(self, context: SyncContext) -> "DctTopKReducer":
        """The reducer at work."""
        return DctTopKReducer(context, self)


class DctTopKReducer(WholeReducer):
    """Sums of the greatest coefficients over a link."""

    def __init__(self, context: SyncContext, options: DctTopK) -> None:
        super().__init__(context, error_feedback=options.error_feedback, decay=options.decay)
        self._number = options.number

    def takes(self, shape: Sequence[int]) -> bool:
        """Every tensor."""
        return True

    def start_exchange(self, whole: Mapping[str, Tensor], plain: dict[str, Tensor], step: int) -> Arrive:
        """See ``WholeReducer``."""
        rows, rest = [], {}
        for name, tensor in whole.items():
            tiles = to_tiles(tensor)
            places = greatest(tiles, min(self._number, tiles.shape[1]))
            values = tiles.gather(1, places)
            rows.append(torch.cat([as_bytes(values), packed_12(places)], 1))
            rest[name] = tensor - from_tiles(torch.zeros_like(tiles).scatter_(1, places, values), tensor.shape)
        if not rows:  # as in all replicas
            return lambda: ({}, {})
        sent = torch.cat([row.flatten() for row in rows])
        gathered = sent.new_empty(self.link.size, sent.numel())
        pending = self.link.all_gather(gathered, sent)

        def arrive() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            pending.wait()
            told = gathered.split([row.numel() for row in rows], dim=1)
            return {
                name: self._sum(tensor, of_all.reshape(-1, *row.shape))
                for (name, tensor), of_all, row in zip(whole.items(), told, rows, strict=True)
            }, rest

        return arrive

    def _sum(self, like: Tensor, rows: Tensor) -> Tensor:
        """Of one tensor, from what each member has sent: (members, tiles, bytes)."""
        height, width = tile_of(like.shape)
        number = min(self._number, height * width)
        value_bytes = number * like.element_size()
        tiles = like.new_zeros(rows.shape[1], height * width)
        for own in rows:
            values = from_bytes(own[:, :value_bytes], like.dtype)
            tiles.scatter_add_(1, unpacked_12(own[:, value_bytes:], number), values)
        return from_tiles(tiles, like.shape)


def tile_of(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width: the greatest divisors of rows and columns up to 64."""
    rows, columns = as_matrix(shape)
    return _divisor(rows), _divisor(columns)


def to_tiles(tensor: Tensor) -> Tensor:
    """Coefficients of the tiles of a tensor: (tiles, height times width)."""
    (rows, columns), (height, width) = as_matrix(tensor.shape), tile_of(tensor.shape)
    tiles = tensor.reshape(rows // height, height, columns // width, width).transpose(1, 2)
    return (_dct(height).to(tensor) @ tiles @ _dct(width).to(tensor).T).reshape(-1, height * width)


def from_tiles(tiles: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor that has these coefficients."""
    (rows, columns), (height, width) = as_matrix(shape), tile_of(shape)
    each = tiles.view(rows // height, columns // width, height, width)
    return (_dct(height).to(tiles).T @ each @ _dct(width).to(tiles)).transpose(1, 2).reshape(tuple(shape))


@functools.cache
def _dct(size: int) -> Tensor:
    """The orthonormal matrix of the cosine transform (type 2): fp64 (size, size)."""
    at = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (at + 0.5) * at.unsqueeze(1)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


@functools.cache
def _divisor(size: int) -> int:
    return max(d for d in range(1, min(size, TILE) + 1) if size % d == 0)


def _sent_bytes(shapes: Shapes, number: int) -> int:
    total = 0
    for shape in shapes.values():
        values = math.prod(tile_of(shape))
        total += math.prod(shape) // values * row_bytes(min(number, values), 4)
    return total
