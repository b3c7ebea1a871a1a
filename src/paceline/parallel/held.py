"""How a rank holds a parameter that is not whole, or not alone, on it.

A pass that cuts parameters (tensor, expert) replaces each by a plain parameter of the same name that holds this
rank's part, and says so by one ``Held``. Sharding over ``states`` (of experts that are dealt out, over
``expert_states``) comes after, and cuts what is left along its first dimension. A parameter of which a pass says
nothing is whole, and every rank of the axis computes its whole gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from paceline.comm.mesh import Axis
from paceline.comm.place import Block, Place, place_of


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows: ``full[start : start + size]`` is ``local[inner : inner + size]`` along the cut dimension."""

    start: int
    size: int
    inner: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A dimension of which a rank holds only some runs; its other local rows are padding: zero, without a gradient."""

    dim: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """One parameter as this rank holds it, before it is sharded over ``states``."""

    full_shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    """Of different dimensions; empty if it is whole."""
    summed_over: Axis | None = None
    """Every rank of this axis computes a part of the gradient of the same values: at the end of a step the parts are
    added up. None where each rank has the whole gradient of what it holds."""
    is_owner: bool = True
    """Whether this rank counts its values in a norm; of ranks that hold the same values exactly one does."""


def cut_runs(sizes: Sequence[int], pieces: int, index: int) -> tuple[Run, ...]:
    """The runs of piece ``index`` of ``pieces`` where each of the fused parts of ``sizes`` rows is cut by itself.

    A part that does not divide is cut as ``torch.chunk`` would, and its last pieces are short or empty.
    """
    runs, begin, inner = [], 0, 0
    for size in sizes:
        each = -(-size // pieces)
        first = min(index * each, size)
        length = min(each, size - first)
        if length:
            runs.append(Run(begin + first, length, inner))
        begin, inner = begin + size, inner + each
    return tuple(runs)


def take(full: torch.Tensor, dim: int, runs: Sequence[Run], size: int) -> torch.Tensor:
    """The local tensor of ``size`` along ``dim`` that holds these runs of the full one, and zeros elsewhere."""
    shape = list(full.shape)
    shape[dim] = size
    local = full.new_zeros(shape)
    for run in runs:
        local.narrow(dim, run.inner, run.size).copy_(full.narrow(dim, run.start, run.size))
    return local


def place_in_full(tensor: torch.Tensor, held: Held | None) -> Place:
    """Where what a rank holds of a parameter, or of a tensor like it, lies in the full one."""
    place = place_of(tensor)
    if held is None:
        return place
    blocks = place.blocks
    for cut in held.cuts:
        blocks = tuple(_in_full(blocks, cut))
    return Place(held.full_shape, blocks)


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
