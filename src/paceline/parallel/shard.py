"""Sharding the states of a replica over its ranks (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054), by FSDP2.

Gradients are summed, never averaged: the loss was divided by the number of targets before the backward pass. FSDP2 keeps
the fp32 masters itself, each rank its rows, and computes with a bf16 copy that it gathers block by block.

    zero   optimizer's states   gradients                         weights
    1      sharded              whole until the last micro-batch  whole from the forward to the backward pass
    2      sharded              sharded                           whole from the forward to the backward pass
    3      sharded              sharded                           a block at a time
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.precision import OnGradient


class ShardedStates:
    """A model whose parameters are DTensors, each rank with its rows; the counterpart of ``precision.Masters``."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, *, zero: int) -> None:
        master = {torch.promote_types(p.dtype, torch.float32) for p in model.parameters()}
        if len(master) != 1:
            raise PlanError(f"layout.shard={mesh.size()} needs parameters of one dtype; this model has {master}")
        (master_dtype,) = master
        model.to(master_dtype)
        self._zero = zero
        self._modules = _shard(model, mesh, None if dtype == master_dtype else dtype, master_dtype, zero)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    def on_gradient(self, fn: OnGradient) -> None:
        """Call ``fn`` with the name of a parameter whenever its gradient was summed over the ranks."""
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(_telling(fn, name))

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""
        self._modules[-1].set_is_last_backward(last)
        if self._zero == 1:
            self._modules[-1].set_requires_gradient_sync(last)

    def refresh(self) -> None:
        """Forget gathered weights, which are those of before an update."""
        for module in self._modules:
            module.reshard()


def _shard(
    model: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None, master: torch.dtype, zero: int
) -> list[FSDPModule]:
    """Every block is a group of its own, the rest is the root's, which comes last in what is returned."""
    inner = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=True)
    for block in blocks(model).values():
        fully_shard(block, mesh=mesh, mp_policy=inner, reshard_after_forward=zero == 3)
    # The root's weights are wanted again at once: its last layer is the first of the backward pass.
    fully_shard(model, mesh=mesh, mp_policy=outer, reshard_after_forward=False)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(modules) == len(blocks(model)) + 1
    for module in modules:  # the setters are not recursive
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return [*modules[1:], modules[0]]


def _telling(fn: OnGradient, name: str) -> Callable[[torch.Tensor], None]:
    return lambda _: fn(name)
