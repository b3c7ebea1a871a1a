"""Which boxes of a full parameter are in the tensor that this rank holds."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from paceline.checkpoint import Block, TensorState, tensor_state
from paceline.comm.mesh import Mesh
from paceline.parallel.held import Cut, Held


def placed(tensor: Tensor, held: Held | None, mesh: Mesh) -> TensorState:
    """A parameter of which passes say ``held``, or a tensor like it, by its place in the full one."""
    if held is None:
        return tensor_state(tensor, holder=(mesh.tensor.index, mesh.tensor.size))
    state = tensor_state(tensor)
    blocks = state.blocks
    for cut in held.cuts:
        blocks = tuple(_in_full(blocks, cut))
    return replace(state, full_shape=held.full_shape, blocks=blocks)


def _in_full(blocks: tuple[Block, ...], cut: Cut) -> Iterator[Block]:
    """Blocks of a tensor that is cut along a dimension, as blocks of the tensor before the cut; padding is in none."""
    dim = cut.dim
    for block in blocks:
        for run in cut.runs:
            first = max(block.start[dim], run.inner)
            last = min(block.start[dim] + block.shape[dim], run.inner + run.size)
            if first < last:
                yield Block(
                    _with(block.start, dim, run.start + first - run.inner),
                    _with(block.shape, dim, last - first),
                    _with(block.inner, dim, block.inner[dim] + first - block.start[dim]),
                )


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])
