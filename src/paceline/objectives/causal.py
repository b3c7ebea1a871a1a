"""What objectives have in common that predict the token beside each position from those on its other side."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from paceline.config import NonNegative
from paceline.data.rows import Row
from paceline.errors import PlanError
from paceline.models.heads import Head
from paceline.objectives.base import Arrays, Batch, ObjectiveContext, ObjectiveOptions, make_batch, pad_right
from paceline.objectives.isolation import document_positions
from paceline.objectives.mixup import Mixed
from paceline.objectives.softening import NO_TARGET


class CausalOptions(ObjectiveOptions):
    """Base of their config classes."""

    head: ClassVar[Head] = "causal"
    overlap: ClassVar[int] = 1

    mixup: NonNegative = 0.0
    """Each sequence is learned together with another one of its step, embeddings and losses in shares drawn from
    Beta(mixup, mixup); 0 for none."""

    @property
    def mixes_rows(self) -> bool:
        """Whether rows are to come with a partner."""
        return self.mixup > 0.0

    def row_tokens(self, context: ObjectiveContext) -> int:
        """One more than a sequence: the token at one end is only a target."""
        return context.sequence_tokens + 1

    def check(self, context: ObjectiveContext) -> None:
        """Raise ``PlanError`` for what does not go together."""
        if self.mixes_rows and context.isolate_documents:
            raise PlanError(
                "data.isolate_documents=true does not go with objective.mixup: the documents of two sequences end at "
                "different places. Use mixup=0, or isolate_documents=false"
            )


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


def mixed_batch(batch: Batch, rows: Sequence[Row], options: CausalOptions, *, seed: int, step: int) -> Batch:
    """The batch of ``rows``, with their partners mixed in; as it is for rows without one (of the held-out part)."""
    if not options.mixes_rows or rows[0].partner is None:
        return batch
    mixed = Mixed.of(rows, batch.labels.shape[1], options.mixup, seed=seed, step=step)
    return replace(batch, mixed=mixed)
