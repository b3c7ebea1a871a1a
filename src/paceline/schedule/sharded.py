"""What FSDP2 has to be told by a schedule in which several micro-batches are under way at once.

Torch's own runtime does the same for a stage that is an FSDP2 module; here all stages of a rank are one.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from paceline.errors import PlanError


def begin_split_backward(model: nn.Module) -> None:
    """Keep gathered weights and whole gradients until ``reduce_gradients``; nothing for a model that is not sharded.

    The hooks of FSDP2 run with the gradients of the hidden states, when those of the weights are still to come. Raises
    ``PlanError`` where weights are given up between forward and backward: gradients would be lost without a word.
    """
    if isinstance(model, FSDPModule):
        if any(group.post_forward_mesh_info is not None for group in _groups(model)):
            raise PlanError("layout.zero=3 does not go with a schedule that splits the backward pass. Use zero=2")
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)


def reduce_gradients(model: nn.Module) -> None:
    """Sum gradients that are still whole over the ranks, and finish the backward pass of a sharded model."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(True)
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(True)
        for group in _groups(model):
            group.post_backward()
        fully_shard.state(model)._root_post_backward_final_callback()  # type: ignore[attr-defined]


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from fully_shard.state(module)._fsdp_param_groups  # type: ignore[attr-defined]
