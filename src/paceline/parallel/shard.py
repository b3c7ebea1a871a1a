"""Sharding the states of a replica over its ranks (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054), by FSDP2.

Gradients are summed, never averaged: the loss was divided by the number of targets before the backward pass. FSDP2
keeps the fp32 masters itself, each rank its rows, and computes with a copy in 16 bits that it gathers block by block.
Without masters (``pure``) the rows themselves are in 16 bits. Gradients come in fp32 to where they are sent; there they
are cast to ``reduction`` for the way and the sum, and are fp32 again.

    zero   optimizer's states   gradients                         weights
    1      sharded              whole until the last micro-batch  whole from the forward to the backward pass
    2      sharded              sharded                           whole from the forward to the backward pass
    3      sharded              sharded                           a block at a time

With ``offload`` what is sharded lies in main memory, and so do the optimizer's states and its work. Weights go to the
device when they are gathered, gradients come back when they have been summed.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from paceline.comm.mesh import Axis, Mesh
from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.precision import OnGradient, WideGradients


class ShardedStates:
    """A model whose parameters are DTensors, each rank with its rows; the counterpart of ``precision.Masters``."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        zero: int,
        pure: bool = False,
        reduction: torch.dtype | None = None,
        offload: bool = False,
        experts: Collection[str] = (),
    ) -> None:
        """``experts`` are the modules that other ranks of ``mesh.states`` have other parameters of."""
        master = {dtype} if pure else {torch.promote_types(p.dtype, torch.float32) for p in model.parameters()}
        if len(master) != 1:
            raise PlanError(
                f"layout.shard={mesh.shard.size} needs parameters of one dtype; this model has "
                f"{', '.join(sorted(map(str, master)))}. Convert the model, or use shard=1"
            )
        (master_dtype,) = master
        self._zero = zero
        compute = None if dtype == master_dtype else dtype
        self._modules = _shard(model, mesh, compute, master_dtype, zero, reduction, offload, experts)
        model.to(master_dtype)  # now only this rank's rows: a whole model in 16 bits is never there in 32
        named = dict(model.named_parameters())  # these stay; a module names gathered weights when it holds any
        self.parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self.frozen = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
        self._wide = WideGradients(self.parameters.values())

    def on_gradient(self, fn: OnGradient) -> None:
        """Call ``fn`` with the name of a parameter whenever its gradient was summed over the ranks."""
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._wide.telling(fn, name))

    def expect(self, last: bool) -> None:
        """Say whether the next backward pass is the last of the step."""
        self._wide.expect(last)
        self._modules[-1].set_is_last_backward(last)
        if self._zero == 1:
            self._modules[-1].set_requires_gradient_sync(last)

    def refresh(self) -> None:
        """Forget gathered weights, which are those of before an update."""
        for module in self._modules:
            module.reshard()


def _shard(
    model: nn.Module,
    mesh: Mesh,
    compute: torch.dtype | None,
    master: torch.dtype,
    zero: int,
    reduction: torch.dtype | None,
    offload: bool,
    experts: Collection[str],
) -> list[FSDPModule]:
    """Every block is a group of its own, and so are experts; the rest is the root's, the last of what is returned.

    The ranks that exchange tokens with each other hold different experts, and each has the gradient of all their
    tokens. So states of experts are shared, and gradients summed, over the ranks that hold the same ones alone.
    """
    wide = torch.promote_types(master, torch.float32)
    inner = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=wide, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=wide, cast_forward_inputs=True)
    assert mesh.states_mesh is not None
    has_device = mesh.states_mesh.device_type != "cpu"
    policy = CPUOffloadPolicy(pin_memory=has_device) if offload else OffloadPolicy()
    block_options: dict[str, Any] = {
        "mp_policy": inner,
        "reshard_after_forward": zero == 3,
        "offload_policy": policy,
    }
    dealt, found = {name: model.get_submodule(name) for name in experts}, blocks(model)
    for module in dealt.values():  # those inside come first: a group takes what has none yet
        fully_shard(module, mesh=mesh.expert_states_mesh, **block_options)
    for block in found.values():
        fully_shard(block, mesh=mesh.states_mesh, **block_options)
    # The root's weights are wanted again at once: its last layer is the first of the backward pass.
    fully_shard(model, mesh=mesh.states_mesh, mp_policy=outer, reshard_after_forward=False, offload_policy=policy)
    modules: dict[str, Any] = {**dealt, **found, "the rest": model}
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == len(modules)
    for name, module in modules.items():  # the setters are not recursive
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        axis = mesh.expert_states if name in dealt else mesh.states
        module.set_custom_all_gather(_AllGather(axis, name))
        module.set_custom_reduce_scatter(_ReduceScatter(axis, name, reduction))
    return list(modules.values())


class _Tallied:
    """Memory for a collective of FSDP2, as it takes it itself."""

    def __init__(self, axis: Axis, where: str) -> None:
        self._axis, self._where = axis, where

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See ``torch.distributed.fsdp``'s interface ``Comm``."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _add(self, kind: str, tensor: torch.Tensor) -> None:
        self._axis.tally.add(kind, self._axis.name, self._where, tensor.nbytes)


class _AllGather(_Tallied):
    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        self._add("all_gather", input_tensor)
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Tallied):
    """FSDP2's own ``reduce_dtype`` would also be that of sums over micro-batches (ZeRO 1)."""

    def __init__(self, axis: Axis, where: str, reduction: torch.dtype | None) -> None:
        super().__init__(axis, where)
        self._reduction = reduction

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        if self._reduction is None:
            self._add("reduce_scatter", input_tensor)
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        assert not async_op
        parts, own = input_tensor.to(self._reduction), torch.empty_like(output_tensor, dtype=self._reduction)
        self._add("reduce_scatter", parts)
        dist.reduce_scatter_single(own, parts, op=op, group=group)
        output_tensor.copy_(own)
        return None
