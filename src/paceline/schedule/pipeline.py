"""Running micro-batches through the stages of a pipeline, by any schedule of ``torch.distributed.pipelining``.

All ranks of a pipeline have the same micro-batches; every stage takes its masks and positions from them, so only hidden
states go from rank to rank, in the dtype in which they are computed, and in a step nothing is said about their shapes:
those are known (``shapes``). The last stage computes the objective's loss itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, get_schedule_class

from paceline.comm.mesh import Mesh
from paceline.errors import PacelineError, PlanError
from paceline.objectives.base import Batch, Objective, logits_of
from paceline.objectives.vocabulary import gather_logits
from paceline.parallel.dropout import Dropout
from paceline.parallel.slots import StageOutput
from paceline.parallel.stages import Stages
from paceline.plan.stages import KINDS
from paceline.schedule.shapes import Shapes, Signature, Wires, empty_header, header, read_header, signature_of, wires_of
from paceline.schedule.sharded import begin_split_backward, reduce_gradients
from paceline.schedule.stage import Step, TorchStage

T = TypeVar("T")

MOST_KNOWN = 4096
"""Shapes of inputs on which the ranks of a pipeline remember to have agreed; more are seldom in use."""


class Pipelined:
    """A step's micro-batches, forward and backward through the stages of all ranks of a pipeline."""

    def __init__(
        self,
        stages: Stages,
        mesh: Mesh,
        objective: Objective,
        *,
        seed: int,
        device: torch.device,
        dropout: Dropout | None = None,
    ) -> None:
        self._stages = stages
        self._model = stages.model
        self._axis, self._states = mesh.pipeline, mesh.states
        self._objective = objective
        self._device = device
        self._shapes = Shapes()
        self._known: dict[Signature, tuple[Wires, ...]] = {}
        self._step = Step(stages=stages, objective=objective, seed=seed, device=device, dropout=dropout)
        self._schedules: dict[int, Any] = {}

    def run(self, batches: Sequence[Batch], *, step: int, scale: float, expect: Callable[[bool], None]) -> float:
        """Add ``scale`` times the gradient of the summed loss to the gradients of this rank's parameters.

        Returns the summed loss on the rank of the last stage, 0.0 elsewhere. Raises ``PlanError`` for a number of
        micro-batches that the schedule cannot run.
        """
        moved = [batch.to(self._device) for batch in batches]
        self._step.begin(moved, self._wires(moved), number=step, scale=scale)
        schedule = self._schedule(len(moved))
        expect(False)
        if self._stages.schedule.splits_backward:
            begin_split_backward(self._model)
        numbers = torch.arange(len(moved))
        try:
            schedule.step(
                number=numbers, target=numbers if self._stages.has_loss else None, losses=None, return_outputs=False
            )
        except RuntimeError as error:
            if isinstance(error.__cause__, PacelineError):  # torch puts its own words round what a stage raises
                raise error.__cause__ from None
            raise
        expect(True)
        reduce_gradients(self._model)
        return self._step.end()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The summed loss of a batch on the rank of the last stage, 0.0 elsewhere."""
        batch = batch.to(self._device)
        loss, _ = self._forward(lambda: self._objective.loss(self._model, batch))
        return 0.0 if loss is None else float(loss)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """From ids (B, S) to logits (B, S, V) of the whole vocabulary, on every rank."""
        inputs: dict[str, Tensor | bool] = {"input_ids": ids.to(self._device), "use_cache": False}
        logits, _ = self._forward(lambda: gather_logits(self._model, logits_of(self._model, inputs)))
        root = self._stages.schedule.ranks[-1]
        numbers = (empty_header() if logits is None else header(wires_of([logits]))).to(self._device)
        (wire,) = read_header(self._axis.broadcast(numbers, root, where="logits").tolist())
        whole = wire.empty(self._device) if logits is None else logits.contiguous()
        return self._axis.broadcast(whole, root, where="logits")

    def _schedule(self, micro_batches: int) -> Any:
        """The schedule of torch for so many micro-batches; its stages keep the state of a step."""
        if micro_batches not in self._schedules:
            plan = self._stages.schedule
            if not plan.allows(micro_batches):
                raise PlanError(
                    f"layout.schedule={plan.name} on pipeline={plan.pipeline} needs {plan.needs}, but a step has "
                    f"{micro_batches} micro-batches"
                )
            stages = [TorchStage(stage, self._step, self._axis) for stage in self._stages.own]
            options: dict[str, Any] = {"loss_fn": lambda loss, _: loss, "scale_grads": False}
            if plan.fixed_micro_batches is not None:
                made: Any = _PipelineScheduleRuntime(stages, micro_batches, **options)
                made._load_csv(plan.name)
            else:
                kind = KINDS[plan.name]
                made = get_schedule_class(kind.torch_name)(
                    stages[0] if kind.order == "single" else stages, micro_batches, **options
                )
            self._schedules[micro_batches] = made
        return self._schedules[micro_batches]

    def _wires(self, batches: Sequence[Batch]) -> list[tuple[Wires, ...]]:
        """What goes into and out of each of this rank's stages for every micro-batch; all ranks together.

        The ranks of a pipeline have the same micro-batches, and agree on those whose shapes one of them does not know:
        these are looked at. Ranks that share states have others, but look as often, for looking gathers weights.
        """
        signatures = [signature_of(batch.inputs) for batch in batches]
        fresh = {s: batch for s, batch in zip(signatures, batches, strict=True) if s not in self._known}
        told = {signature: self._shapes.tell(signature) for signature in fresh}
        unsure: list[Signature] = []
        if fresh:
            votes = torch.tensor([float(wires is None) for wires in told.values()], device=self._device)
            self._axis.all_reduce(votes, where="shapes")
            unsure = [signature for signature, vote in zip(fresh, votes.tolist(), strict=True) if vote]
        for i in range(self._most(len(unsure), len(batches))):
            wires = self._look(fresh[unsure[i]] if i < len(unsure) else batches[0])
            if i < len(unsure):
                self._shapes.see(unsure[i], wires)
                told[unsure[i]] = wires
        if len(self._known) + len(told) > MOST_KNOWN:
            self._known = {signature: self._known[signature] for signature in signatures if signature in self._known}
        self._known |= {signature: wires for signature, wires in told.items() if wires is not None}
        return [self._known[signature] for signature in signatures]

    def _most(self, number: int, limit: int) -> int:
        """The greatest ``number`` of the ranks that share states; none is above ``limit``."""
        if self._states.size == 1:
            return number
        counted = (torch.arange(limit, device=self._device) < number).float()
        return int(self._states.all_reduce(counted, where="shapes").count_nonzero())

    @torch.no_grad()
    def _look(self, batch: Batch) -> tuple[Wires, ...]:
        """Run a micro-batch forward, as in evaluation: what a model counts in training is not to be counted twice."""
        training = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            _, wires = self._forward(lambda: self._objective.loss(self._model, batch))
        finally:
            for module, mode in training.items():
                module.training = mode
        return wires

    def _forward(self, last: Callable[[], T]) -> tuple[T | None, tuple[Wires, ...]]:
        """Call ``last``, which calls the model, on every stage. Each tells the next the shapes of what it sends.

        Returns the result on the rank of the last stage, and the wires into and out of each of this rank's stages.
        """
        ranks, me = self._stages.schedule.ranks, self._axis.index
        result: T | None = None
        handed: Sequence[Tensor] = ()
        wires: list[Wires] = []
        for stage in self._stages.own:
            received: Sequence[Tensor] = ()
            if stage:
                received = handed if ranks[stage - 1] == me else self._receive(ranks[stage - 1])
            handed = ()
            with self._stages.at(stage, received):
                try:
                    result = last()
                except StageOutput as output:
                    handed = tuple(tensor.contiguous() for tensor in output.tensors)
            wires += [wires_of(received), wires_of(handed)]
            if handed and ranks[stage + 1] != me:
                self._send(handed, ranks[stage + 1])
        return result, tuple(wires)

    def _send(self, tensors: Sequence[Tensor], rank: int) -> None:
        for tensor in (header(wires_of(tensors)).to(self._device), *tensors):
            self._axis.tally.add("send", self._axis.name, "evaluation", tensor.nbytes)
            dist.send(tensor, group=self._axis.group, group_dst=rank)

    def _receive(self, rank: int) -> Sequence[Tensor]:
        numbers = empty_header().to(self._device)
        dist.recv(numbers, group=self._axis.group, group_src=rank)
        tensors = [wire.empty(self._device) for wire in read_header(numbers.tolist())]
        for tensor in tensors:
            dist.recv(tensor, group=self._axis.group, group_src=rank)
        return tensors
