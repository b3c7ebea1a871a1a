"""Where a value stopped being finite."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from paceline.errors import NonFiniteElsewhere, NonFiniteError
from paceline.objectives.base import Batch, Objective
from paceline.train.replica import ModuleReplica

Drawing = Callable[[Batch], AbstractContextManager[None]]


def locate(
    error: NonFiniteError,
    model: nn.Module,
    replica: ModuleReplica,
    objective: Objective,
    batches: Iterable[Batch],
    where: str,
    drawing: Drawing = lambda _: nullcontext(),
) -> NonFiniteError:
    """Run the micro-batches forward and backward once more and name the first value that is not finite.

    The weights must still be those of the failed step, whose gradients are lost. Returns the error to raise on this
    rank. The ranks of one replica need each other in every pass, so they run the same ones, forward only. ``drawing``:
    what is in force during a micro-batch's forward pass, so that it drops out as it did.
    """
    if replica.mesh.world.size > 1:
        return _locate_together(error, model, replica, objective, batches, where, drawing)
    batches = list(batches)
    scale = replica.loss_scale.value / max(1, sum(batch.count for batch in batches))
    clear = replica.clear_gradients  # in mixed precision the gradients are the masters', not the model's
    replica.expect(False)  # a sync must not send these gradients
    clear()
    for i, batch in enumerate(batches):
        with watch(model) as found:
            with drawing(batch):
                loss = objective.loss(model, replace(batch, scale=scale))
            if not found and math.isfinite(loss.item()):
                (loss * scale).backward()
        found += [f"the gradient of {s.name}" for s in replica.shards if not found and _bad(s.parameter.grad)]
        clear()
        if found or not math.isfinite(loss.item()):
            return _located(error, found[0] if found else "the loss itself", f"{where}, micro-batch {i}")
    return NonFiniteElsewhere(f"{error}; every value on {where} is finite")


@torch.no_grad()
def _locate_together(
    error: NonFiniteError,
    model: nn.Module,
    replica: ModuleReplica,
    objective: Objective,
    batches: Iterable[Batch],
    where: str,
    drawing: Drawing,
) -> NonFiniteError:
    replica.clear_gradients()
    first = None
    with watch(model) as found:
        if replica.mesh.pipeline.size == 1:
            for i, batch in enumerate(batches):
                with drawing(batch):
                    objective.loss(model, batch)
                if found and first is None:
                    first = _located(error, found[0], f"{where}, micro-batch {i}")
        elif found:  # a stage alone cannot run; its weights can be looked at
            first = _located(error, found[0], where)
    return first or NonFiniteElsewhere(f"{error}; every value of the forward pass on {where} is finite")


def _located(error: NonFiniteError, first: str, where: str) -> NonFiniteError:
    return NonFiniteError(
        f"{error}; it began in {first} ({where}). Lower optimizer.lr, lengthen the warm-up, or use precision=fp32; the "
        "last checkpoint is untouched."
    )


@contextmanager
def watch(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of the first weight or module output that is not finite, in the order of computation."""
    found = [f"the weight {name}" for name, parameter in model.named_parameters() if _bad(parameter)][:1]

    def check(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and any(_bad(tensor) for tensor in _tensors(output)):
                found.append(f"the output of {name}")

        return hook

    handles = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def _bad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
