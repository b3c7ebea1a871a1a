"""One stage as ``torch.distributed.pipelining`` runs it.

Torch has one shape for all micro-batches of a stage, and keeps its memory for all of them. Here each micro-batch has
its own, which lives as long as it is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from paceline.comm.mesh import Axis
from paceline.errors import TrainError
from paceline.objectives.base import Batch, Objective
from paceline.parallel.dropout import Dropout
from paceline.parallel.slots import StageOutput
from paceline.parallel.stages import Stages
from paceline.schedule.accumulate import random_stream
from paceline.schedule.shapes import Wires, wires_of
from paceline.schedule.split import input_half


class Step:
    """What this rank's stages work on in one step."""

    def __init__(
        self, *, stages: Stages, objective: Objective, seed: int, device: torch.device, dropout: Dropout | None
    ) -> None:
        self.stages = stages
        self.objective = objective
        self.seed = seed
        self.device = device
        self.dropout = dropout
        order = stages.slots.order or ()
        self._begun = {
            stage: dropout.calls_before(order, stages.spans[stage].first) if dropout else {} for stage in stages.own
        }
        self.batches: Sequence[Batch] = ()
        self._wires: Sequence[tuple[Wires, ...]] = ()

    def begin(self, batches: Sequence[Batch], wires: Sequence[tuple[Wires, ...]], *, number: int, scale: float) -> None:
        """Take the micro-batches of a step, and what of each goes into and out of each of this rank's stages."""
        self.batches = [replace(batch, scale=scale) for batch in batches]
        self._wires, self.number, self.scale = wires, number, scale
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)

    def end(self) -> float:
        """The sum of the losses; forget the micro-batches."""
        self.batches = ()
        return float(self._loss.item())

    def into(self, stage: int, micro_batch: int) -> Wires:
        """What a stage receives."""
        return self._wires[micro_batch][2 * self.stages.own.index(stage)]

    def out_of(self, stage: int, micro_batch: int) -> Wires:
        """What a stage hands on."""
        return self._wires[micro_batch][2 * self.stages.own.index(stage) + 1]

    def forward(self, stage: int, micro_batch: int, received: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """What a stage hands on, or the loss, scaled, if it is the last."""
        batch = self.batches[micro_batch]
        with (
            random_stream(self.device, self.seed, self.number, batch.sequences[0], stage),
            self.dropout.drawing(self.number, batch, self._begun[stage]) if self.dropout else nullcontext(),
            self.stages.at(stage, received),
        ):
            try:
                loss = self.objective.loss(self.stages.model, batch)
            except StageOutput as output:
                return self._handed(stage, micro_batch, output.tensors)
        self._loss += loss.detach()
        return loss * self.scale

    def _handed(self, stage: int, micro_batch: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        expected, given = self.out_of(stage, micro_batch), wires_of(tensors)
        if expected != given:
            raise TrainError(f"stage {stage} gave {given} for micro-batch {micro_batch}; the next expects {expected}")
        # Where all weights so far are frozen nothing has a gradient here, yet the next stage sends one.
        return tuple(
            tensor.contiguous() if tensor.requires_grad or not tensor.is_floating_point() else _leaf(tensor)
            for tensor in tensors
        )


class TorchStage(PipelineStage):
    """A stage whose buffers are made for each micro-batch."""

    def __init__(self, stage: int, step: Step, axis: Axis) -> None:
        self._step = step
        self._axis = axis
        is_last = stage == step.stages.count - 1
        super().__init__(
            _StageModule(stage, step),
            stage,
            step.stages.count,
            step.device,
            input_args=_examples(step.into(stage, 0)),
            output_args=_leaf(torch.zeros((), device="meta")) if is_last else _examples(step.out_of(stage, 0)),
            group=axis.group,
        )
        self._runtime_validate = False  # a debug mode that knows one shape only; ``Step`` compares them all

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive into new memory."""
        wires = self._step.into(self.stage_index, fwd_chunk_id)
        for info, wire in zip(self.args_recv_info[fwd_chunk_id], wires, strict=True):
            info.buffer = wire.empty(self.device)
        ops: list[dist.P2POp] = super().get_fwd_recv_ops(fwd_chunk_id)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive into new memory."""
        if not self.is_last:
            wires = self._step.out_of(self.stage_index, bwd_chunk_id)
            for info, wire in zip(self.grad_recv_info[bwd_chunk_id], wires, strict=True):
                info.buffer = wire.empty(self.device) if wire.dtype.is_floating_point else None
        ops: list[dist.P2POp] = super().get_bwd_recv_ops(bwd_chunk_id)
        return ops

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Count what is sent."""
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id), "forward")

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Count what is sent."""
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id), "backward")

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Complete the gradients to be sent, and free what was received."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        received = self.args_recv_info[bwd_chunk_id]
        grads = self.bwd_cache[bwd_chunk_id]
        if not self.is_first:
            self.bwd_cache[bwd_chunk_id] = tuple(map(_gradient, grads, (info.buffer for info in received)))
        for info in (*received, *self.grad_recv_info[bwd_chunk_id]):
            info.buffer = None

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        """Split a backward pass by ``split``."""
        if backward_type == "input":
            outputs = bwd_kwargs["stage_output"]
            grads = bwd_kwargs["output_grads"] or [None] * len(outputs)
            return input_half(outputs, grads, bwd_kwargs["input_values"], self.submod.parameters())
        if backward_type == "weight":
            bwd_kwargs["param_groups"].run()
            return (), None
        result: tuple[tuple[Tensor | None, ...], Any] = super().backward_maybe_with_nosync(
            backward_type, bwd_kwargs, last_backward
        )
        return result

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Call the hooks of gradients: torch sets those of split backward passes without them."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for parameter in self.submod.parameters():
            if parameter.grad is not None:
                for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                    hook(parameter)

    def _counted(self, ops: list[dist.P2POp], where: str) -> list[dist.P2POp]:
        for op in ops:
            self._axis.tally.add("send", self._axis.name, where, op.tensor.nbytes)
        return ops


class _StageModule(nn.Module):
    """What torch calls: the number of a micro-batch stands for its inputs."""

    def __init__(self, stage: int, step: Step) -> None:
        super().__init__()
        self._stage = stage
        self._step = step

    def forward(self, *received: Tensor, number: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._step.forward(self._stage, int(number), received)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self._step.stages.parameters(self._stage))


def _examples(wires: Wires) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(w.shape, dtype=w.dtype, device="meta", requires_grad=w.dtype.is_floating_point) for w in wires
    )


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_()


def _gradient(grad: Tensor | None, received: Tensor | None) -> Tensor | None:
    """Of something received, as it is sent back; None for what has none by its kind."""
    assert received is not None
    if not received.is_floating_point():
        return None
    return torch.zeros_like(received) if grad is None else grad.contiguous()
