"""Sequence to sequence: pairs of texts, or the spans missing from a text (T5, section 3.1.4)."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from paceline.config import DataConfig, Positive
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
from paceline.objectives.random import row_generator
from paceline.objectives.softening import NO_TARGET
from paceline.objectives.spans import SpanSizes, corrupt, span_sizes, window_tokens


class Seq2Seq(ObjectiveOptions):
    """Predict a target text from a source text.

    With ``source`` and ``target``, two columns of the data, a row is one pair; each side is at most a sequence long.
    Without them spans of a plain text are taken out and are the target; which, is drawn anew in every step. The text of
    a row is then as long as makes its input fill a sequence, and the target is about a fifth of that.
    """

    head: ClassVar[Head] = "seq2seq"

    source: str | None = None
    """Column of the source text, for pairs."""
    target: str | None = None
    """Column of the target text, for pairs."""
    noise_density: Annotated[Positive, Field(le=0.9)] = 0.15
    """Share of the tokens that is taken out; not for pairs."""
    mean_span_tokens: Annotated[Positive, Field(ge=1)] = 3.0
    """Tokens taken out at one place, on average; not for pairs."""

    @model_validator(mode="after")
    def _both_columns(self) -> Self:
        if (self.source is None) != (self.target is None):
            given, other = ("source", "target") if self.target is None else ("target", "source")
            raise ValueError(f"{given}={getattr(self, given)!r} without {other}; expected both columns, or neither")
        return self

    @property
    def pairs(self) -> bool:
        """Whether rows are pairs of texts."""
        return self.source is not None

    def columns(self, data: DataConfig) -> tuple[str, ...]:
        """The two columns of pairs, or the text."""
        return (data.field,) if self.source is None or self.target is None else (self.source, self.target)

    def special_tokens(self, sequence_tokens: int) -> tuple[str, ...]:
        """A sentinel for each span of a full row; none for pairs."""
        spans = 0 if self.pairs else self.sizes(self.window(sequence_tokens)).spans
        return tuple(f"<extra_id_{number}>" for number in range(spans))

    def row_tokens(self, context: ObjectiveContext) -> int:
        """The most tokens of either side of a pair, or of the text before spans are taken out."""
        return context.sequence_tokens if self.pairs else self.window(context.sequence_tokens)

    def window(self, sequence_tokens: int) -> int:
        """Tokens of the longest text whose input is at most a sequence; ``PlanError`` if that is under 2."""
        tokens = window_tokens(sequence_tokens, self.noise_density, self.mean_span_tokens)
        if tokens < 2:
            raise PlanError(
                f"batch.sequence_tokens={sequence_tokens} is too short for objective=seq2seq: a kept token, a sentinel "
                "and the end-of-text token need at least 3"
            )
        return tokens

    def sizes(self, tokens: int) -> SpanSizes:
        """Lengths of input and target of a text of ``tokens``; not for pairs."""
        return span_sizes(tokens, self.noise_density, self.mean_span_tokens)

    def build(self, context: ObjectiveContext) -> "Seq2SeqObjective":
        """Make the runtime; ``PlanError`` where model or tokenizer lack a token it needs, or documents are isolated."""
        return Seq2SeqObjective(self, context)


class Seq2SeqObjective:
    """Runtime of ``Seq2Seq``."""

    def __init__(self, options: Seq2Seq, context: ObjectiveContext) -> None:
        if context.decoder_start is None:
            raise PlanError(
                "objective=seq2seq: the model's config has no decoder_start_token_id. Add it, for example "
                "model.config.decoder_start_token_id=0"
            )
        self._options = options
        self._start, self._fill = context.decoder_start, padding_id(context.special)
        if not options.pairs:
            self._prepare_spans(context)

    def batch(self, rows: Sequence[Row], *, seed: int, step: int) -> Batch:
        """Encoder input, the target shifted right as decoder input, and the target as labels."""
        texts = [self._pair(row) if self._options.pairs else self._corrupt(row, seed, step) for row in rows]
        sources, targets = [source for source, _ in texts], [target for _, target in texts]
        inputs: Arrays = {
            "input_ids": pad_right(sources, self._fill),
            "attention_mask": pad_right([np.ones_like(source) for source in sources], 0),
            "decoder_input_ids": pad_right([np.append(self._start, target[:-1]) for target in targets], self._fill),
            "use_cache": False,
        }
        return make_batch(rows, inputs, pad_right(targets, NO_TARGET))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed cross-entropy of the target texts: scalar fp32."""
        return token_loss(model, batch, self._options.softening)

    def _prepare_spans(self, context: ObjectiveContext) -> None:
        needed, sentinels = len(self._options.special_tokens(context.sequence_tokens)), context.special.sentinels
        if len(sentinels) < needed:
            raise PlanError(
                f"objective=seq2seq needs {needed} sentinels for batch.sequence_tokens={context.sequence_tokens}, but "
                f"the tokenizer has {len(sentinels)} (<extra_id_0>, ...). Use shorter sequences, a larger "
                "mean_span_tokens, or leave data.tokenizer out to train one on the data"
            )
        if context.isolate_documents:
            raise PlanError(
                "data.isolate_documents=true does not go with span corruption (objective=seq2seq without source and "
                "target): an encoder-decoder has no packed documents. Use data.isolate_documents=false"
            )
        self._sentinels, self._end = np.array(sentinels, np.int64), context.special.end

    def _pair(self, row: Row) -> tuple[Ints, Ints]:
        assert row.target is not None, "the rows of pairs carry a target"
        return row.tokens, row.target

    def _corrupt(self, row: Row, seed: int, step: int) -> tuple[Ints, Ints]:
        sizes = self._options.sizes(len(row.tokens))
        return corrupt(row.tokens, sizes, self._sentinels, self._end, row_generator(seed, step, row.sequence))
