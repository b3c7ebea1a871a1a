"""What stages need of a model, found out by running it.

With NaN for everything that a stage would not have: in the arguments of its first block, what is NaN, or not what the
whole model has there, comes from the stage before; a weight outside of the blocks is needed if the result depends on
it. What is found is then tried: each stage is run on the true tensors of the stage before, with its own weights only,
and has to give the true tensors for the next, or the logits of the whole model.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from paceline.errors import PlanError
from paceline.objectives.base import Batch, logits_of
from paceline.parallel.blocks import blocks
from paceline.parallel.slots import Returned, Slots, Span, StageOutput, unknown
from paceline.plan.stages import Schedule, balance

EQUAL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""How far a stage's result may be from the whole model's, relative to the largest number in it. Both do the same with
the same values; a wrong cut changes the first digits."""


@dataclass(eq=False)
class Place:
    """Where a parameter stands in a model."""

    module: nn.Module
    name: str
    full_name: str
    parameter: nn.Parameter
    shape: torch.Size

    def empty(self) -> None:
        """Let the model find NaN there, and no parameter."""
        self.module._parameters[self.name] = None  # keeps its place in the order
        self.show(self.parameter.dtype, self.parameter.device)

    def show(self, dtype: torch.dtype, device: torch.device) -> None:
        """Let the model find NaN of this dtype and on this device, after ``empty``."""
        self.module.__dict__[self.name] = unknown(self.shape, dtype, device)

    def restore(self) -> None:
        """Undo ``empty``."""
        del self.module.__dict__[self.name]
        self.module._parameters[self.name] = self.parameter


def places(model: nn.Module) -> list[Place]:
    """Where parameters stand outside of the blocks; one that is tied may stand in several places."""
    inside = tuple(f"{name}." for name in blocks(model))
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if f"{path}.".startswith(inside):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and (id(module), name) not in found:
                full_name = f"{path}.{name}" if path else name
                found[id(module), name] = Place(module, name, full_name, parameter, parameter.shape)
    return list(found.values())


class Measured:
    """Spans of the stages of a whole model, and the stages that need each of its parameters."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, slots: Slots, plan: Schedule, sample: Batch) -> None:
        self._model, self._slots, self._sample, self._plan = model, slots, sample, plan
        record = _Record()
        with record.counter, slots.walking(record):
            logits = logits_of(model, sample.inputs)
        slots.order = self.order = tuple(record.names)
        self.spans = self._cut(record)
        self._borders: list[Sequence[Tensor]] = [()]
        """Before each stage and after the last: what goes over that border in the whole model."""
        for before, span in zip(self.spans, self.spans[1:], strict=False):
            true = record.arguments[span.first]
            span.enter = before.leave = self._dependent(span, true)
            self._borders.append([true[i] for i in span.enter])
        self._borders.append([logits])
        self.outside = places(model)
        self._stages: dict[int, set[int]] = defaultdict(set)
        for stage in range(len(self.spans)):
            parameters = self._needed(stage)
            for name in self.blocks_of(stage):
                parameters += model.get_submodule(name).parameters()
            for parameter in parameters:
                self._stages[id(parameter)].add(stage)

    def stages_of(self, parameter: nn.Parameter) -> set[int]:
        """The stages that compute with a parameter; the first for one that none does."""
        return self._stages.get(id(parameter)) or {0}

    def blocks_of(self, stage: int) -> tuple[str, ...]:
        """Names of the blocks a stage calls, in order, each once."""
        return tuple(dict.fromkeys(self.order[self.spans[stage].first : self.spans[stage].last]))

    def _cut(self, record: "_Record") -> list[Span]:
        stages, calls = len(self._plan.ranks), len(self.order)
        if calls < stages:
            raise PlanError(
                f"layout.pipeline={self._plan.pipeline} with schedule={self._plan.name} makes {stages} stages, but "
                f"{type(self._model).__name__} calls {calls} blocks one after the other. Use fewer ranks, a schedule "
                "with one stage a rank, or more blocks"
            )
        parts = balance(record.costs, stages, tail=record.cost_since())
        return [Span(part.start, part.stop, record.returned) for part in parts]

    def _dependent(self, span: Span, true: Sequence[Any]) -> tuple[int, ...]:
        """Which arguments of a stage's first block it does not know by itself."""
        known = self._run(replace(span, last=span.first, leave=None))
        if len(known) != len(true):
            raise self._refusal(f"gives {self.order[span.first]} other arguments when blocks before it do not run")
        return tuple(i for i, leaf in enumerate(true) if isinstance(leaf, Tensor) and not _same(known[i], leaf))

    def _needed(self, stage: int) -> list[nn.Parameter]:
        """The parameters outside of the blocks with which a stage gives the true result; all, if fewer do not."""
        everything = list({id(place.parameter): place.parameter for place in self.outside}.values())
        for some in (self._learning(stage, everything), everything):
            with self._only(some):
                if all(map(_close, self._run_stage(stage), self._borders[stage + 1])):
                    return some
        first = self.order[self.spans[stage].first]
        raise self._refusal(f"has something that goes round its blocks and that a stage from {first} on lacks")

    def _learning(self, stage: int, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of which the result of a stage is a differentiable function, and those that are no real numbers."""
        real = [parameter for parameter in parameters if parameter.is_floating_point()]
        flags = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            for parameter in real:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                results = [tensor for tensor in self._run_stage(stage) if tensor.requires_grad]
                ones = [torch.ones_like(tensor) for tensor in results]
                grads = torch.autograd.grad(results, real, ones, allow_unused=True) if results else [None] * len(real)
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        without = {id(parameter) for parameter, grad in zip(real, grads, strict=True) if grad is None}
        return [parameter for parameter in parameters if id(parameter) not in without]

    @contextmanager
    def _only(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Outside of the blocks the model finds NaN for all parameters but these."""
        there = {id(parameter) for parameter in parameters}
        away = [place for place in self.outside if id(place.parameter) not in there]
        for place in away:
            place.empty()
        try:
            yield
        finally:
            for place in away:
                place.restore()

    def _run_stage(self, stage: int) -> Sequence[Tensor]:
        return self._run(replace(self.spans[stage], received=self._borders[stage]))

    def _run(self, span: Span) -> Sequence[Any]:
        with self._slots.walking(span):
            try:
                return [logits_of(self._model, self._sample.inputs)]
            except StageOutput as output:
                return output.tensors
            except Exception as error:  # whatever the family's code does when blocks left nothing behind
                raise self._refusal(
                    f"does not run from {self.order[span.first]} on ({type(error).__name__}: {error})"
                ) from error

    def _refusal(self, what: str) -> PlanError:
        return PlanError(f"layout.pipeline={self._plan.pipeline}: {type(self._model).__name__} {what}. Use pipeline=1")


class _Record:
    """The walk of a whole model: names, arguments, results and costs of all calls."""

    last = -1

    def __init__(self) -> None:
        self.names: list[str] = []
        self.arguments: list[list[Any]] = []
        self.returned: list[Returned] = []
        self.costs: list[float] = []
        """Multiplications of each call and of what the model does between the call before and it; at least 1."""
        self.counter = FlopCounterMode(display=False)

    def cost_since(self) -> float:
        """Multiplications after the last call."""
        return self.counter.get_total_flops() - sum(self.costs) + len(self.costs)

    def call(self, number: int, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block."""
        arguments, _ = tree_flatten((args, kwargs))
        output = block(*args, **kwargs)
        self.names.append(name)
        self.arguments.append(arguments)
        self.returned.append(Returned.of(output, arguments))
        self.costs.append(1.0 + self.cost_since())
        return output


def _same(known: Any, true: Tensor) -> bool:
    if not isinstance(known, Tensor) or (known.shape, known.dtype) != (true.shape, true.dtype):
        return False
    return torch.equal(known, true)


def _close(result: Any, true: Tensor) -> bool:
    if not isinstance(result, Tensor) or not true.is_floating_point():
        return _same(result, true)
    if result.shape != true.shape:
        return False
    return bool((result - true).abs().amax() <= EQUAL[true.dtype] * true.abs().amax())
