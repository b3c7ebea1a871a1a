"""What is verified: the user's model, made small unless asked otherwise, on rows that show what is often wrong."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paceline.config import Config
from paceline.data.clients import Clients
from paceline.data.counts import Statistics
from paceline.data.order import SampleOrder
from paceline.data.prepare import Prepared
from paceline.data.rows import Row
from paceline.data.tokenizer import SpecialTokens
from paceline.errors import ConfigError
from paceline.models.source import ModelSource
from paceline.objectives.base import Batch, ObjectiveContext, ObjectiveOptions
from paceline.train.assemble import Material
from paceline.verify.cases import SEQUENCE_TOKENS
from paceline.verify.small import SIZES, small_sizes

SOURCES = (23, 11)
"""Rows of the two sources that are mixed, two to one: a few steps are an epoch of each."""
HELD_OUT = 5


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, an objective and rows, as every rank makes them alike."""

    source: ModelSource
    options: ObjectiveOptions
    context: ObjectiveContext
    seed: int
    shuffled: int = 0
    """So many rows from the first on have their tokens in disorder: a batch that is wrong on purpose."""
    owned: int | None = None
    """By so many clients, of a federated run."""

    @classmethod
    def of(cls, config: Config, *, full: bool) -> "Subject":
        """The subject a config gives; ``full`` keeps the model's sizes and weights."""
        if config.model is None:
            raise ConfigError("model is missing; set model.config, model.preset or model.path")
        assert isinstance(config.objective, ObjectiveOptions)
        source = ModelSource.of(config.model, config.objective.head)
        defaults = source.hugging_face_config().to_dict()
        changes = {} if full else small_sizes(defaults)
        written = source.settings if source.folder is None or full else defaults
        source = replace(source, settings={**written, **changes}, folder=source.folder if full else None)
        if source.vocabulary is None:
            source = source.with_vocabulary(SIZES["vocab_size"])
        assert source.vocabulary is not None
        sentinels = tuple(range(source.vocabulary - 1, source.vocabulary - 21, -1))
        special = SpecialTokens(
            vocabulary=source.vocabulary, end=2, bos=1, eos=2, pad=0, mask=3, cls=1, sep=2, unk=4, sentinels=sentinels
        )
        start = source.hugging_face_config().decoder_start_token_id if source.head == "seq2seq" else None
        return cls(
            source=source,
            options=config.objective,
            context=ObjectiveContext(
                special=special,
                sequence_tokens=SEQUENCE_TOKENS,
                isolate_documents=config.data.isolate_documents,
                decoder_start=0 if source.head == "seq2seq" and start is None else start,
            ),
            seed=config.seed,
            owned=None if config.data.clients is None else config.data.clients.count or 5,
        )

    def model(self, dtype: torch.dtype) -> nn.Module:
        """Whole, on the CPU, in ``dtype``; norms and biases at random values, for ones and zeros hide mistakes."""
        model: Any = self.source.build(self.seed).to(dtype)
        if dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # torch's grouped products know no fp64
        if self.source.folder is None:
            for index, (name, parameter) in enumerate(model.named_parameters()):
                if parameter.ndim == 1:
                    generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.data.add_(0.3 * noise.to(dtype))
                    assert parameter.data.isfinite().all(), name
        whole: nn.Module = model
        return whole

    def material(self, dtype: torch.dtype) -> Material:
        """All that a run learns and is measured on."""
        train = [TrialRows(self, source, rows) for source, rows in enumerate(SOURCES)]
        return Material(
            model=self.model(dtype),
            source=None,
            prepared=Prepared(
                tokenizer=Path(),
                train=(),
                held_out=(),
                fingerprint="rows of a trial",
                special=self.context.special,
                statistics=Statistics.of((), Path()),
            ),
            options=self.options,
            context=self.context,
            objective=self.options.build(self.context),
            train=train,
            order=SampleOrder(SOURCES, (2.0, 1.0), self.seed),
            held_out=[TrialRows(self, len(SOURCES), HELD_OUT)],
            clients=None if self.owned is None else self._clients(self.owned),
        )

    def _clients(self, count: int) -> Clients:
        return Clients([np.arange(rows) % count for rows in SOURCES], count, self.seed)

    def sample(self) -> Batch:
        """A small micro-batch."""
        rows = TrialRows(self, 0, SOURCES[0])
        return self.options.build(self.context).batch([rows.row(i, i) for i in (1, 2)], seed=self.seed, step=0)


@dataclass(frozen=True)
class TrialRows:
    """Rows of uneven length, documents inside them, and some without a target."""

    subject: Subject
    source: int
    count: int

    def __len__(self) -> int:
        """How many rows there are."""
        return self.count

    def row(self, index: int, sequence: int) -> Row:
        """Row ``index``, to be learned as sample ``sequence``."""
        options, context, seed = self.subject.options, self.subject.context, self.subject.seed
        most = options.row_tokens(context)
        rng = np.random.default_rng([seed, self.source, index])
        length = most if index % 3 else most // 2
        low = min(8, context.special.vocabulary - 1)
        high = context.special.vocabulary - (20 if options.head == "seq2seq" else 0)
        tokens = rng.integers(low, max(high, low + 1), length)
        starts = np.array(sorted({0, *rng.integers(2, max(3, length - 2), 2).tolist()}))
        tokens[starts[starts > 0] - 1] = context.special.end
        if sequence < self.subject.shuffled:
            rng.shuffle(tokens)
        return Row(sequence, tokens, starts, weight=0.0 if index % 4 == 1 else 1.0)
