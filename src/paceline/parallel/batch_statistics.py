"""Models in which the sequences of a batch see each other, as in batch normalisation, and where that can be.

What such a model computes is right in one forward pass of the whole batch, and in no other: statistics over a
micro-batch, or over the sequences of a rank, are other ones. (Exchanging them, as SyncBatchNorm does, would have every
forward pass wait for all replicas, and leaves micro-batches as they are.) So wherever the work is shared it is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.config import Config
from paceline.errors import PlanError
from paceline.objectives.base import Batch, logits_of
from paceline.parallel.dropout_places import as_it_was, short_inputs
from paceline.plan.batch import BatchPlan

NEAR = 0.01
"""How far outputs for a sequence may be apart, as a share of the greatest, that ought to be the same but for rounding;
batch normalisation moves them by more than a tenth."""


def check_batch_statistics(model: nn.Module, sample: Batch, config: Config, batch: BatchPlan) -> None:
    """Raise ``PlanError`` if the work is shared and the sequences of a micro-batch see each other in ``model``.

    Finds the modules that are made for it, and tries the model for all others: two rows, of which the second is another
    one the second time. Neither the model nor any stream of random numbers is changed.
    """
    shared = next(_shared(config, batch), None)
    if shared is None:
        return
    with as_it_was(model):
        model.train()
        made_for_it = [
            name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training
        ]
    if found := made_for_it[0] if made_for_it else _first_that_differs(model, sample):
        raise PlanError(
            f"{shared}: in {found} the sequences of a micro-batch see each other, as in batch normalisation, so that "
            "each part of the batch would be computed otherwise than in the whole. Use one process with batch.micro "
            "left out, or a norm of single sequences (LayerNorm, GroupNorm)"
        )


def _shared(config: Config, batch: BatchPlan) -> Iterator[str]:
    """Why a step is not one forward pass of one process, if it is not."""
    if config.all_replicas > 1:
        yield f"replicas={config.replicas}"
    for axis in ("shard", "context", "tensor", "pipeline"):
        if (size := getattr(config.layout, axis)) > 1:
            yield f"layout.{axis}={size}"
    if config.batch.micro == "auto":
        yield "batch.micro=auto"
    if batch.micro_batches > 1:
        yield f"batch.micro={batch.micro}"
    if config.layout.recompute != "none":
        yield f"layout.recompute={config.layout.recompute}"


@torch.no_grad()
def _first_that_differs(model: nn.Module, sample: Batch) -> str | None:
    """The first module whose output for a row is another one beside another row; None where the model's is not.

    What only modules inside see is no matter: an expert is given whatever tokens are routed to it.
    """
    one, other = (_outputs(model, short_inputs(sample, rows)) for rows in ([0, 1], [0, 0]))
    if _is_near(one[-1][1], other[-1][1]):
        return None
    pairs = zip(one, other, strict=False)
    return next((name for (name, mine), (_, theirs) in pairs if not _is_near(mine, theirs)), "") or type(model).__name__


def _is_near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().amax() <= NEAR * one.abs().amax())


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor | bool]) -> list[tuple[str, Tensor]]:
    """What modules give for the first of two rows, in the order in which they are done, in training mode.

    Both times the same random numbers are drawn.
    """
    found: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 1 and len(first) == 2:
                found.append((name, first[0].float()))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with as_it_was(model):
            model.train()
            found.append(("", logits_of(model, inputs)[0].float()))
    finally:
        for handle in handles:
            handle.remove()
    return found
