"""Compilation, block by block: equal blocks share one graph, and the kernels are kept in torch's cache on disk."""

from torch import nn

from paceline.parallel.blocks import blocks


def compile_blocks(model: nn.Module) -> int:
    """Compile every block in place (the whole model if it has none); returns how many parts were compiled.

    Shapes are taken as fixed: rows of one length compile once.
    """
    parts = list(blocks(model).values()) or [model]
    for part in parts:
        part.compile(dynamic=False)
    return len(parts)
