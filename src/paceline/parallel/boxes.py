"""Where what a rank holds of a parameter lies in the full one, whatever passes cut it."""

from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor

from paceline.comm.boxes import Block, Part, block, dtensor_blocks
from paceline.parallel.held import Cut, Held


def part_of(tensor: Tensor, held: Held | None) -> Part:
    """A parameter, plain or a DTensor, of which passes say ``held``."""
    blocks = (
        dtensor_blocks(tuple(tensor.shape), tensor.device_mesh, tensor.placements)
        if isinstance(tensor, DTensor)
        else (block(tensor.shape),)
    )
    if held is None:
        return Part(tuple(tensor.shape), blocks)
    for cut in held.cuts:
        blocks = tuple(_in_full(blocks, cut))
    return Part(held.full_shape, blocks)


def _in_full(blocks: tuple[Block, ...], cut: Cut) -> Iterator[Block]:
    """Blocks of a tensor that is cut along a dimension, as blocks of the tensor before the cut; padding is in none."""
    dim = cut.dim
    for own in blocks:
        for run in cut.runs:
            first = max(own.start[dim], run.inner)
            last = min(own.start[dim] + own.shape[dim], run.inner + run.size)
            if first < last:
                yield Block(
                    _with(own.start, dim, run.start + first - run.inner),
                    _with(own.shape, dim, last - first),
                    _with(own.inner, dim, own.inner[dim] + first - own.start[dim]),
                )


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])
