"""Next-token prediction: each position predicts the token that follows it."""

from collections.abc import Sequence

from torch import Tensor, nn

from paceline.data.rows import Row
from paceline.objectives.base import Batch, ObjectiveContext, padding_id, token_loss
from paceline.objectives.causal import CausalOptions, causal_batch, mixed_batch


class NextToken(CausalOptions):
    """Predict each token from those before it.

    Rows hold one token more than a sequence and share it with the next row, so that every token but the first of the
    data is a target exactly once. Without isolation the first token of a document is predicted from the end-of-text
    token of the one before it. With isolation positions restart at each document, attention does not cross, and the
    first token of a document is no target.
    """

    def build(self, context: ObjectiveContext) -> "NextTokenObjective":
        """Make the runtime; ``PlanError`` where documents are isolated and mixed."""
        return NextTokenObjective(self, context)


class NextTokenObjective:
    """Runtime of ``NextToken``."""

    def __init__(self, options: NextToken, context: ObjectiveContext) -> None:
        options.check(context)
        self._options = options
        self._fill = padding_id(context.special)
        self._isolate = context.isolate_documents

    def batch(self, rows: Sequence[Row], *, seed: int, step: int) -> Batch:
        """Inputs are the tokens but the last, labels the tokens but the first; only the shares of mixup are random."""
        batch = causal_batch(rows, fill=self._fill, isolate=self._isolate)
        return mixed_batch(batch, rows, self._options, seed=seed, step=step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed cross-entropy of all targets: scalar fp32."""
        return token_loss(model, batch, self._options.softening)
