"""Compilation, block by block: equal blocks share one graph, and the kernels are kept in torch's cache on disk."""

import functools
from typing import Any

import torch
import torch._functorch.config as autograd_config
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

from paceline.models.kernels import require_compiler
from paceline.parallel.blocks import blocks

PRODUCTS = 0.7
"""Of what torch would have a compiled block keep for its backward pass (1; its input alone: 0): products and attention
are kept, norms and activation functions computed again, in one pass with what needs them. It costs no time."""
SELECTIVE = 0.25
"""The same where memory counts: the cheapest products with weights are computed again too, but not attention."""


def compile_blocks(model: nn.Module, *, keep: float = PRODUCTS) -> int:
    """Compile the forward of every block (of the whole model if it has none); returns how many parts were compiled.

    ``keep``, from 0 to 1, is the share of activations that waits for the backward pass; the rest is computed again.

    Raises ``PlanError`` where torch could not build its kernels. The first batch is compiled for its shape, the first
    of another shape for all shapes.
    """
    if next(model.parameters()).device.type == "cpu":
        require_compiler("train.compile=true")
    parts = list(blocks(model).values()) or [model]
    for part in parts:
        part.forward = _Compiled(part, keep)
    return len(parts)


class _Compiled:
    """A forward that is compiled in training mode only: evaluation and sampling come in many lengths."""

    def __init__(self, part: nn.Module, keep: float) -> None:
        self._part = part
        self._keep = keep
        self._plain = part.forward
        self._compiled = torch.compile(part.forward)
        functools.update_wrapper(self, part.forward)  # who asks for the arguments of forward sees the real ones

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._part.training:
            return self._plain(*args, **kwargs)
        with (  # read when the first call is compiled
            autograd_config.patch(activation_memory_budget=self._keep),
            inductor_config.patch(joint_custom_pre_pass=_KeepAttention()),
        ):
            return self._compiled(*args, **kwargs)


class _KeepAttention(CustomGraphPass):
    """What attention gives is kept: torch takes operators that are not its own for cheap, and computes them again."""

    def __call__(self, graph: fx.Graph) -> None:
        kept = (torch.ops.paceline.attention.default, torch.ops.paceline.fused_attention.default)
        for node in graph.nodes:
            if node.target in kept:
                for result in (node, *node.users):
                    result.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        return f"{__name__} 1"
