"""Backward language model: each position predicts the token before it, from those that follow."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from paceline.data.rows import Row
from paceline.objectives.base import Batch, ObjectiveContext, padding_id, token_loss
from paceline.objectives.causal import CausalOptions, causal_batch, mixed_batch


class RightToLeft(CausalOptions):
    """Predict each token from those after it: next-token prediction on reversed rows.

    A stored document ``x1 ... xn END`` is read as ``END xn ... x1``. So the end-of-text token comes first, as the mark
    from which a text is begun, and that of the document stored before it comes after ``x1``, as the sign that the text
    is complete. With isolation a reversed document begins at its own end-of-text token, and the sign after ``x1`` stays
    a target, because it says nothing about the document that it comes from. A row that cuts a document begins in its
    midst, without the mark.
    """

    def build(self, context: ObjectiveContext) -> "RightToLeftObjective":
        """Make the runtime; ``PlanError`` where documents are isolated and mixed."""
        return RightToLeftObjective(self, context)


class RightToLeftObjective:
    """Runtime of ``RightToLeft``."""

    def __init__(self, options: RightToLeft, context: ObjectiveContext) -> None:
        options.check(context)
        self._options = options
        self._end = context.special.end
        self._fill = padding_id(context.special)
        self._isolate = context.isolate_documents

    def batch(self, rows: Sequence[Row], *, seed: int, step: int) -> Batch:
        """Reverse the rows, then shift as in next-token prediction; only the shares of mixup are random."""
        rows = [reverse(row) for row in rows]
        batch = causal_batch(rows, fill=self._fill, isolate=self._isolate, end=self._end)
        return mixed_batch(batch, rows, self._options, seed=seed, step=step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed cross-entropy of all targets: scalar fp32."""
        return token_loss(model, batch, self._options.softening)


def reverse(row: Row) -> Row:
    """The row read backwards, documents too: a document begins where it ended, on its last token."""
    return replace(
        row,
        tokens=row.tokens[::-1],
        starts=len(row.tokens) - row.starts[row.starts > 0][::-1],
        partner=None if row.partner is None else row.partner[::-1],
    )
