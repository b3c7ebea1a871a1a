"""Whether a model can learn from mixed embeddings: tried, not read from its code."""

import torch
from torch import Tensor, nn

from paceline.errors import PlanError
from paceline.objectives.base import Batch, logits_of
from paceline.objectives.isolation import evaluating
from paceline.objectives.mixup import Mixed, input_embedding, mixing

NEAR = 0.01
"""How far logits may be apart, as a share of the greatest, that ought to be the same but for rounding."""


@torch.no_grad()
def check_mixup(model: nn.Module, sample: Batch) -> None:
    """Raise ``PlanError`` unless a sequence of which another one has all of the share is to ``model`` that other one.

    It is not, where a family looks at the ids beside its embedding. ``sample`` has two rows; the model runs twice.
    """
    name = type(model).__name__
    if input_embedding(model) is None:
        raise PlanError(
            f"objective.mixup needs {name}.get_input_embeddings(), the module that the ids go into. Add it, or use "
            "mixup=0"
        )
    ids = sample.inputs["input_ids"]
    assert isinstance(ids, Tensor) and len(ids) == 2
    others = Mixed(ids=ids.flip(0), labels=sample.labels.flip(0), shares=torch.zeros(ids.shape))
    with evaluating(model):
        expected_BSV = logits_of(model, {**sample.inputs, "input_ids": ids.flip(0)})
        with mixing(model, others):
            found_BSV = logits_of(model, sample.inputs)
    if not (found_BSV - expected_BSV).abs().amax() <= NEAR * expected_BSV.abs().amax():
        raise PlanError(
            f"objective.mixup: {name} looks at token ids beside its input embedding, so that what is mixed there is "
            "not all that it sees. Use mixup=0"
        )
