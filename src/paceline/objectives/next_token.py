"""Next-token prediction: each position predicts the token that follows it."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from paceline.data.rows import Row
from paceline.models.heads import Head
from paceline.objectives.base import (
    Arrays,
    Batch,
    ObjectiveContext,
    ObjectiveOptions,
    make_batch,
    pad_right,
    padding_id,
    token_loss,
)
from paceline.objectives.cross_entropy import NO_TARGET
from paceline.objectives.isolation import document_positions


class NextToken(ObjectiveOptions):
    """Predict each token from those before it.

    Rows hold one token more than a sequence and share it with the next row, so that every token but the first of the
    data is a target exactly once. Without isolation the first token of a document is predicted from the end-of-text
    token of the one before it. With isolation positions restart at each document, attention does not cross, and the
    first token of a document is no target.
    """

    head: ClassVar[Head] = "causal"
    overlap: ClassVar[int] = 1

    def row_tokens(self, context: ObjectiveContext) -> int:
        """One more than a sequence: the last token is only a target."""
        return context.sequence_tokens + 1

    def build(self, context: ObjectiveContext) -> "NextTokenObjective":
        """Make the runtime."""
        return NextTokenObjective(context)


class NextTokenObjective:
    """Runtime of ``NextToken``."""

    def __init__(self, context: ObjectiveContext) -> None:
        self._fill = padding_id(context.special)
        self._isolate = context.isolate_documents

    def batch(self, rows: Sequence[Row], *, seed: int, step: int) -> Batch:
        """Inputs are the tokens but the last, labels the tokens but the first; nothing is random."""
        return causal_batch(rows, fill=self._fill, isolate=self._isolate)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed cross-entropy of all targets: scalar fp32."""
        return token_loss(model, batch)


def causal_batch(rows: Sequence[Row], *, fill: int, isolate: bool, end: int = NO_TARGET) -> Batch:
    """Rows of n tokens to n - 1 inputs and the n - 1 tokens that follow them; shorter rows are padded on the right.

    With ``isolate``, what follows the last token of a document is a target only where it is the token ``end``. No
    attention mask is passed: padding comes after all that counts, and transformers finds documents by their restarting
    positions only where there is neither mask nor cache.
    """
    labels = []
    for row in rows:
        following = row.tokens[1:].copy()
        if isolate:
            last = row.starts[row.starts > 0] - 1
            following[last[following[last] != end]] = NO_TARGET
        labels.append(following)
    inputs: Arrays = {
        "input_ids": pad_right([row.tokens[:-1] for row in rows], fill),
        "use_cache": False,
    }
    if isolate:
        inputs["position_ids"] = document_positions([row.starts for row in rows], [len(row.tokens) - 1 for row in rows])
    return make_batch(rows, inputs, pad_right(labels, NO_TARGET))
