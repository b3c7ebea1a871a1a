"""What encodings of every value share: blocks with a code each, summed by owners, and encoded again.

    all_to_all     each member encodes its blocks and sends each to its owner
    owner          decodes what comes in, adds it up in fp32 in the order of members, and encodes the sum
    all_gather     everyone has all encoded sums

Codes are never added up themselves: a sum of int8 overflows, a sum of bf16 rounds at each member. Block i of a tensor
is owned by member (i + a number that follows from the name) modulo the members, so that it does not depend on the
layout who keeps what the second encoding leaves out. Each member is sent as many blocks as the one who owns most.

Of two members each sends all its blocks to the other: as many bytes at once as otherwise one after the other, and no
sum has to be encoded.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol
from zlib import crc32

import torch
from torch import Tensor

from paceline.comm.link import Pending
from paceline.comm.replica import Shard
from paceline.config import Options
from paceline.models.chance import drawn
from paceline.parallel.dealt import Run, blocks_of
from paceline.plan.wire import all_gather_delays, all_to_all_delays
from paceline.sync.base import Shapes, SyncContext
from paceline.sync.reducers.blocks import BlockReducer

BLOCK = 256
"""Values of a full tensor, in row-major order, that are encoded together."""

HALF = 0.5 + 2.0**-12
"""Where a value between two codes becomes the upper one. Sums of codes lie just halfway more often than by chance,
where a last bit, which the layout may change, would decide."""

Draw = Callable[[], Tensor]
"""Makes numbers in [0, 1), fp32 (N, BLOCK): a value is rounded up or down by chance. None: to the nearest."""


class Code(Protocol):
    """How blocks become rows of bytes. What is not finite makes its block not finite."""

    def row_bytes(self, value_bytes: int) -> int:
        """Bytes of a block; ``value_bytes``: those of a value before."""
        ...

    def encode(self, blocks: Tensor, lengths: Tensor, draw: Draw | None) -> Tensor:
        """(N, BLOCK) floats, of which in row i the first ``lengths[i]`` are there and the rest is zero: uint8 rows."""
        ...

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows as blocks of ``dtype``; zeros are zeros."""
        ...


class CodedOptions(Options):
    """A config of such a reducer: adds ``error_feedback`` with a default and ``code``."""

    error_feedback: bool = False
    """Keep what the encoding leaves out and send it the next time."""

    is_exact: ClassVar[bool] = False
    code: ClassVar[Code]

    def wire_bytes(self, shapes: Shapes, members: int) -> int:
        """Encoded blocks to their owners, and sums back to all; of two members all blocks to the other."""
        if members == 2:
            return sum(blocks_of(shape, BLOCK) for shape in shapes.values()) * self.code.row_bytes(4)
        return 2 * (members - 1) * most_owned(shapes, members) * self.code.row_bytes(4)

    def delays(self, shapes: Shapes, members: int) -> int:
        """Codes to their owners, then sums to all; of two members codes to the other."""
        return all_to_all_delays(members) * (members > 2) + all_gather_delays(members)

    def late_delays(self, shapes: Shapes, members: int) -> int:
        """Of the sums of more than two members."""
        return all_gather_delays(members) * (members > 2)

    def state_bytes(self, shapes: Shapes) -> int:
        """The residual, that of before until the sum is used, and three copies and the codes while it is made."""
        values = sum(4 * math.prod(shape) for shape in shapes.values())
        blocks = sum(blocks_of(shape, BLOCK) for shape in shapes.values())
        buffers = blocks * (3 * 4 * BLOCK + 2 * self.code.row_bytes(4))
        return 2 * values * self.error_feedback + buffers

    def build(self, context: SyncContext) -> "CodedReducer":
        """The reducer at work."""
        return CodedReducer(context, self.code, error_feedback=self.error_feedback)


class CodedReducer(BlockReducer):
    """Sums of encoded blocks over a link. With error feedback values are rounded to the nearest, else by chance."""

    def __init__(self, context: SyncContext, code: Code, *, error_feedback: bool) -> None:
        super().__init__(context, BLOCK, error_feedback=error_feedback)
        self._code = code

    def start(self, shards: Sequence[Shard]) -> None:
        """Deal out the blocks inside the replica, and to the members."""
        super().start(shards)
        sent, self._rows = _dealt_to_members(self.dealt.runs, self.link.size)
        self._sent, self._lengths = sent.to(self.device), self.dealt.lengths.to(self.device)

    def start_exchange(self, blocks: Tensor, step: int) -> Callable[[], Tensor]:
        """See ``BlockReducer``."""
        rows = self._code.encode(blocks, self._lengths, self._draw(step, self.link.index))
        blocks -= self._code.decode(rows, blocks.dtype)
        if self.link.size == 2:
            gathered = rows.new_empty(2, *rows.shape)
            pending = self.link.all_gather(gathered, rows)
            return lambda: self._added(pending, gathered, blocks.dtype)
        sent = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[self._sent]
        received = torch.empty_like(sent)
        pending = self.link.all_to_all(received, sent)
        pieces = received.view(self.link.size, self._rows, -1)
        return lambda: self._by_owners(self._added(pending, pieces, blocks.dtype), blocks, step)

    def _added(self, pending: Pending, pieces: Tensor, dtype: torch.dtype) -> Tensor:
        """What arrives (members, N, bytes), decoded and added up in the order of members."""
        pending.wait()
        total = torch.zeros(pieces.shape[1], BLOCK, dtype=dtype, device=pieces.device)
        for piece in pieces:
            total += self._code.decode(piece, dtype)
        return total

    def _by_owners(self, total: Tensor, blocks: Tensor, step: int) -> Tensor:
        """Encode the sums that this member owns, and collect those of all."""
        link, code, dtype = self.link, self._code, blocks.dtype
        owned = self._sent[link.index * self._rows :][: self._rows]
        is_block = owned < len(blocks)
        owned, total = owned[is_block], total[is_block]
        own = torch.zeros(self._rows, code.row_bytes(blocks.element_size()), dtype=torch.uint8, device=blocks.device)
        if len(owned):
            own[is_block] = code.encode(total, self._lengths[owned], self._draw(step, "sum", owned))
            blocks[owned] += total - code.decode(own[is_block], dtype)
        gathered = own.new_empty(link.size, *own.shape)
        link.all_gather(gathered, own).wait()
        sums = blocks.new_empty(len(blocks) + 1, BLOCK)
        sums[self._sent] = code.decode(gathered.flatten(0, 1), dtype)
        return sums[:-1]

    def _draw(self, step: int, who: int | str, of: Tensor | None = None) -> Draw | None:
        """What decides how the blocks are rounded, or some ``of`` them."""
        if self.error_feedback:
            return None

        def draw() -> Tensor:
            keys = self.keys(step, who)
            bits = drawn(keys if of is None else keys[of], torch.arange(BLOCK, device=self.device))
            return bits.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)

        return draw


def first_owner(name: str, members: int) -> int:
    """Who owns the first block of a tensor."""
    return crc32(name.encode()) % members


def most_owned(shapes: Shapes, members: int) -> int:
    """How many blocks the member owns who owns most."""
    owned = [0] * members
    for name, shape in shapes.items():
        each, more = divmod(blocks_of(shape, BLOCK), members)
        for i in range(members):
            owned[(first_owner(name, members) + i) % members] += each + (i < more)
    return max(owned)


def _dealt_to_members(runs: Sequence[Run], members: int) -> tuple[Tensor, int]:
    """Which of a rank's blocks goes where: int64 (members * rows,), by member, with the number of rows of each.

    A member that owns fewer gets the number after the last.
    """
    count = sum(run.count for run in runs)
    owner = torch.empty(count, dtype=torch.int64)
    for run in runs:
        numbers = torch.arange(run.first, run.first + run.count)
        owner[run.row : run.row + run.count] = (numbers + first_owner(run.name, members)) % members
    by_member = [(owner == member).nonzero().flatten() for member in range(members)]
    rows = max(len(own) for own in by_member)
    places = torch.full((members, rows), count)
    for member, own in enumerate(by_member):
        places[member, : len(own)] = own
    return places.flatten(), rows
