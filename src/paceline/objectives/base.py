"""What an objective is: it turns rows into a batch, and a batch into a loss.

Its config class declares what data, tokenizer and model must bring; ``build`` then makes the runtime, which computes.
The loss is always a sum over the targets of a batch, and their number is known before the forward pass. So the sum over
any division of a global batch is the same, and the step divides once, by the global count.

Shapes: B rows, S positions, V vocabulary.
"""

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paceline.config import DataConfig, Fraction, NonNegative, Options
from paceline.data.rows import Ints, Row
from paceline.data.tokenizer import SpecialTokens
from paceline.errors import ModelError
from paceline.models.heads import Head
from paceline.objectives.cross_entropy import plain_cross_entropy, summed_cross_entropy
from paceline.objectives.deferred import DeferredLogits, deferring
from paceline.objectives.drawn import Draw, drawn_labels
from paceline.objectives.fused_cross_entropy import fuses_loss
from paceline.objectives.head_cross_entropy import head_cross_entropy
from paceline.objectives.mixup import Mixed, mixing
from paceline.objectives.softening import CERTAIN, NO_TARGET, Softening
from paceline.objectives.vocabulary import vocabulary_cut

Arrays = dict[str, NDArray[Any] | bool]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch, ready for the model."""

    inputs: dict[str, Tensor | bool]
    """Keyword arguments of the model's forward; its labels are not among them, so that no model shifts them again."""
    labels: Tensor
    """(B, S) int64, aligned with the logits: the target at each position, -100 where there is none."""
    count: int
    """How many targets there are; may be 0."""
    sequences: tuple[int, ...]
    """Place of each row in the run's global order."""
    mixed: Mixed | None = None
    """What of other sequences is mixed in; None for nothing."""
    columns: Tensor | None = None
    """(P,) int64, on the CPU: the positions of the whole sequence that the inputs are a part of; None for all."""
    scale: float = 1.0
    """What the loss will be multiplied by before the backward pass: in fp16, gradients that are computed ahead of it
    would be too small without."""
    draw: Draw | None = None
    """The model draws the labels of all targets itself; None for those above."""
    twice: bool = False
    """The gradient of the loss is to be differentiated in its turn."""

    @property
    def tokens(self) -> Tensor:
        """Those that the model looks up, (N,) int64."""
        ids = [value for key, value in self.inputs.items() if key.endswith("input_ids") and isinstance(value, Tensor)]
        ids += [] if self.mixed is None else [self.mixed.ids]
        return torch.cat([self.labels.new_empty(0), *(each.reshape(-1) for each in ids)])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        mixed = None if self.mixed is None else self.mixed.to(device)
        return replace(self, inputs=inputs, labels=self.labels.to(device), mixed=mixed)


@dataclass(frozen=True, kw_only=True)
class ObjectiveContext:
    """What an objective is told about tokenizer, model and batch."""

    special: SpecialTokens
    """Of the tokenizer, with the size of its vocabulary; the model may have more logits (a padded vocabulary)."""
    sequence_tokens: int
    isolate_documents: bool = False
    decoder_start: int | None = None
    """``decoder_start_token_id`` of the model's config; sequence-to-sequence models only. It stands here, and is not
    read from the model, because batches are made where no model is."""


class Objective(Protocol):
    """The runtime of an objective."""

    def batch(self, rows: Sequence[Row], *, seed: int, step: int) -> Batch:
        """Make a micro-batch on the CPU; what is random about a row is a function of (seed, step, row.sequence)."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of all targets: scalar, fp32."""
        ...


class ObjectiveOptions(Options):
    """Base of the config classes of objectives: what they need is declared before anything is built."""

    head: ClassVar[Head]
    """Which model head the objective trains."""
    overlap: ClassVar[int] = 0
    """Tokens that neighbouring rows share."""

    label_smoothing: Fraction = 0.0
    """Share of a target that is spread evenly over the vocabulary; in training, not where the held-out part is
    measured."""
    z_loss: NonNegative = 0.0
    """Strength of a penalty on the square of log(sum(exp(logits))) of each target, in training; 1e-4 is usual."""

    @property
    def mixes_rows(self) -> bool:
        """Whether each row is to come with another one of its step."""
        return False

    @property
    def softening(self) -> Softening:
        """What is added to the loss of a target."""
        return Softening(label_smoothing=self.label_smoothing, z_loss=self.z_loss)

    def columns(self, data: DataConfig) -> tuple[str, ...]:
        """The columns to read: one, or (source, target) for pairs."""
        return (data.field,)

    def special_tokens(self, sequence_tokens: int) -> tuple[str, ...]:
        """Tokens besides end-of-text and padding that a tokenizer must have; one trained on the data reserves them."""
        return ()

    @abstractmethod
    def row_tokens(self, context: ObjectiveContext) -> int:
        """Tokens of a full row."""

    @abstractmethod
    def build(self, context: ObjectiveContext) -> Objective:
        """Make the runtime; ``PlanError`` where tokenizer, model or data do not fit."""


def token_loss(model: nn.Module, batch: Batch, softening: Softening = CERTAIN) -> Tensor:
    """Summed cross-entropy of the model's logits at all targets of the batch: scalar fp32.

    While the model is in training mode ``softening`` is part of it, but not of the loss of labels that are drawn.

    Where the logits are what the model's linear head gives, no more than a chunk of them is ever there. Where the
    model's vocabulary is cut over ranks, each has the logits of its own entries, and all get the same sum.
    Raises ``ModelError`` if the model does not take the batch's inputs or gives no (B, S, V) logits.
    """
    with deferring(model), mixing(model, batch.mixed):
        logits_BSV = logits_of(model, batch.inputs)
    if logits_BSV.shape[:-1] != batch.labels.shape:
        raise ModelError(
            f"{type(model).__name__} gave logits of shape {tuple(logits_BSV.shape)}; expected "
            f"({', '.join(str(size) for size in batch.labels.shape)}, vocabulary)"
        )
    labels_BS, cut = batch.labels, vocabulary_cut(model)
    softening = softening if model.training else CERTAIN
    second = None if batch.mixed is None else batch.mixed.second
    if batch.draw is not None:
        labels_BS = drawn_labels(
            logits_BSV, labels_BS, batch.draw, sequences=batch.sequences, columns=batch.columns, cut=cut
        )
        softening, second = CERTAIN, None  # the curvature is that of the model's own distribution
    if batch.twice:
        return plain_cross_entropy(logits_BSV, labels_BS, softening, second)
    if isinstance(logits_BSV, DeferredLogits):
        parts, fused = logits_BSV.parts(), fuses_loss(model)
        return head_cross_entropy(*parts, labels_BS, cut, softening, second, scale=batch.scale, fused=fused)
    return summed_cross_entropy(logits_BSV, labels_BS, cut, softening, second)


@torch.no_grad()
def holds_all_logits(model: nn.Module, batch: Batch) -> bool:
    """Whether ``token_loss`` needs all logits of the batch at once: the model's output is not its head's as it is."""
    with deferring(model):
        return not isinstance(logits_of(model, batch.inputs), DeferredLogits)


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor | bool]) -> Tensor:
    """Call the model and return its logits (B, S, V): its output, or the ``logits`` of its output.

    A model that lacks a keyword is called without it where that changes nothing (``use_cache=False``, a mask that masks
    nothing). Raises ``ModelError`` for any other keyword it lacks, and for an output without logits.
    """
    parameters = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        lacking = [name for name in inputs if name not in parameters and not _says_nothing(name, inputs[name])]
        if lacking:
            raise ModelError(
                f"{type(model).__name__}.forward takes ({', '.join(parameters)}), but this batch needs "
                f"{', '.join(lacking)}. Add the keyword to forward"
            )
        inputs = {name: value for name, value in inputs.items() if name in parameters}
    output = model(**{name: _as_model_reads_it(model, value) for name, value in inputs.items()})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"{type(model).__name__} gave {type(output).__name__}; expected logits or an object with .logits"
        )
    return logits


def _says_nothing(name: str, value: Tensor | bool) -> bool:
    return name == "use_cache" or (name == "attention_mask" and isinstance(value, Tensor) and bool(value.all()))


def _as_model_reads_it(model: nn.Module, value: Tensor | bool) -> Tensor | bool:
    """A mask of truth values becomes one to add to the scores: eager attention would add the truth values themselves,
    and so let every document see every other; all implementations read the added form."""
    if not isinstance(value, Tensor) or value.dtype is not torch.bool:
        return value
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(value.shape, dtype=dtype, device=value.device).masked_fill_(~value, float("-inf"))


def make_batch(rows: Sequence[Row], inputs: Arrays, labels: Ints) -> Batch:
    """Arrays (B, S) to tensors; the labels of rows that only fill up the batch (weight 0) are dropped."""
    assert all(row.weight in (0.0, 1.0) for row in rows), [row.weight for row in rows]
    labels[[row.weight == 0.0 for row in rows]] = NO_TARGET
    return Batch(
        inputs={name: value if isinstance(value, bool) else torch.from_numpy(value) for name, value in inputs.items()},
        labels=torch.from_numpy(labels),
        count=int(np.count_nonzero(labels != NO_TARGET)),
        sequences=tuple(row.sequence for row in rows),
    )


def pad_right(arrays: Sequence[Ints], fill: int) -> Ints:
    """Stack arrays of at most S tokens to (B, S), ``fill`` after the end of each."""
    padded = np.full((len(arrays), max(len(array) for array in arrays)), fill, np.int64)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded


def padding_id(special: SpecialTokens) -> int:
    """The id that fills short rows; without one of its own any id serves, because padding is masked or comes last."""
    return 0 if special.pad is None else special.pad
