"""Masked language model: some tokens are hidden, and predicted from those on both sides (BERT, section 3.1)."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from paceline.config import NonNegative, Positive
from paceline.data.rows import Ints, Row
from paceline.errors import PlanError
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
from paceline.objectives.isolation import document_numbers, document_positions
from paceline.objectives.random import row_generator
from paceline.objectives.softening import NO_TARGET


class Masked(ObjectiveOptions):
    """Hide tokens at random and predict them.

    Each token that is not special is chosen with the same probability, independently, and anew in every step. A chosen
    one is replaced by the mask token, by a random token, or kept; it is a target in any case. A row may have no target.
    A row is a sequence: between the tokenizer's CLS and SEP tokens, if it has them. With isolation positions restart
    and attention does not cross; CLS is then part of the first document of the row, SEP of the last.
    """

    head: ClassVar[Head] = "masked"

    probability: Annotated[Positive, Field(le=1)] = 0.15
    """Of a token to be chosen."""
    mask_share: NonNegative = 0.8
    """Of the chosen tokens, replaced by the mask token."""
    random_share: NonNegative = 0.1
    """Of the chosen tokens, replaced by a token drawn from the whole vocabulary; the rest is kept."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(
                f"mask_share={self.mask_share} and random_share={self.random_share} add up to more than 1; "
                "expected shares of the chosen tokens, for example 0.8 and 0.1"
            )
        return self

    def special_tokens(self, sequence_tokens: int) -> tuple[str, ...]:
        """The mask token."""
        return ("<mask>",)

    def row_tokens(self, context: ObjectiveContext) -> int:
        """A sequence less the CLS and SEP tokens that are put round it; ``PlanError`` if nothing is left."""
        tokens = context.sequence_tokens - sum(i is not None for i in (context.special.cls, context.special.sep))
        if tokens < 1:
            raise PlanError(
                f"batch.sequence_tokens={context.sequence_tokens} leaves no room beside CLS and SEP. Use 8 or more"
            )
        return tokens

    def build(self, context: ObjectiveContext) -> "MaskedObjective":
        """Make the runtime; ``PlanError`` if the tokenizer has no mask token."""
        return MaskedObjective(self, context)


class MaskedObjective:
    """Runtime of ``Masked``."""

    def __init__(self, options: Masked, context: ObjectiveContext) -> None:
        special = context.special
        if special.mask is None:
            raise PlanError(
                "objective=masked: the tokenizer has no mask token. Use a tokenizer that has one, or leave "
                "data.tokenizer out to train one on the data"
            )
        self._options, self._vocabulary, self._isolate = options, special.vocabulary, context.isolate_documents
        self._mask, self._fill = special.mask, padding_id(special)
        self._special = [i for i in special.ids().values() if i is not None]
        self._before = [] if special.cls is None else [special.cls]
        self._after = [] if special.sep is None else [special.sep]

    def batch(self, rows: Sequence[Row], *, seed: int, step: int) -> Batch:
        """Hide tokens of each row; which, is a function of (seed, step, row.sequence) and the row's tokens."""
        hidden = [self._hide(row, row_generator(seed, step, row.sequence)) for row in rows]
        lengths = [len(labels) for _, labels in hidden]
        inputs: Arrays = {"input_ids": pad_right([ids for ids, _ in hidden], self._fill)}
        if self._isolate:
            positions = document_positions([self._starts(row) for row in rows], lengths)
            document_BS = document_numbers(positions)
            inputs["position_ids"] = positions
            inputs["attention_mask"] = (document_BS[:, :, None] == document_BS[:, None, :])[:, None]  # (B, 1, S, S)
        else:
            inputs["attention_mask"] = pad_right([np.ones(length, np.int64) for length in lengths], 0)
        return make_batch(rows, inputs, pad_right([labels for _, labels in hidden], NO_TARGET))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed cross-entropy of the hidden tokens: scalar fp32."""
        return token_loss(model, batch, self._options.softening)

    def _hide(self, row: Row, generator: np.random.Generator) -> tuple[Ints, Ints]:
        """Token ids as the model sees them, and labels; both (n,)."""
        ids = np.concatenate([self._before, row.tokens, self._after]).astype(np.int64)
        choice, action, replacement = generator.random((3, len(ids)))
        chosen = (choice < self._options.probability) & ~np.isin(ids, self._special)
        labels = np.where(chosen, ids, NO_TARGET)
        mask_share = self._options.mask_share
        ids[chosen & (action < mask_share)] = self._mask
        random = chosen & (action >= mask_share) & (action < mask_share + self._options.random_share)
        ids[random] = (replacement[random] * self._vocabulary).astype(np.int64)
        return ids, labels

    def _starts(self, row: Row) -> Ints:
        """Where documents begin, after the CLS token; one that begins the row begins with it."""
        return row.starts[row.starts > 0] + len(self._before)
