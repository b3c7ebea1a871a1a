"""Documents packed into one row that do not see each other, and the proof that a model keeps them apart.

Positions restart at each document. Decoders of transformers read document boundaries from that; some families ignore
it, without a word, so ``check_isolation`` tries the model at hand.

Shapes: B rows, S positions, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from paceline.data.rows import Ints, Row
from paceline.errors import ModelError
from paceline.objectives.base import ObjectiveContext, ObjectiveOptions, logits_of

Inputs = Mapping[str, Tensor | bool]

LEAK = 0.01
"""How far logits may be from those of isolated documents, as a share of the effect that a document has on its neighbour
without isolation. In fp32, families that keep documents apart are at 0 to 1e-3, others near 1."""


def document_positions(starts: Sequence[Ints], lengths: Sequence[int]) -> Ints:
    """Positions (B, S) that count from 0 in each document; padding after a row of ``lengths`` counts as a document.

    ``starts`` are where documents begin in a row, other than at 0; S is the greatest length.
    """
    positions = np.tile(np.arange(max(lengths)), (len(lengths), 1))
    for row, row_starts, length in zip(positions, starts, lengths, strict=True):
        for start in (*row_starts[row_starts < length].tolist(), length):
            row[start:] = np.arange(len(row) - start)
    return positions


def document_numbers(positions: Ints) -> Ints:
    """Number from 1 of the document that each position (B, S) is in, counted within its row."""
    return np.cumsum(positions == 0, axis=1)


@torch.no_grad()
def check_isolation(model: nn.Module, options: ObjectiveOptions, context: ObjectiveContext) -> None:
    """Try whether ``model`` treats each of two documents in a row as it treats that document alone.

    Runs nine forward passes of one row of full length in evaluation mode. The weights should be fp32: the rounding of
    bf16 can be mistaken for a leak. Under a layout every rank must call it. Nothing is to be checked where a row is one
    document. Raises ``ModelError``, which names the model, if attention crosses, if positions do not restart or are
    not read as they are by default, or if nothing could be seen either way.
    """
    if options.head == "seq2seq":  # a pair is one document; span corruption refuses isolation
        return
    plain, isolated = (
        _inputs(options, replace(context, isolate_documents=isolate), model) for isolate in (False, True)
    )
    numbers_BS = _tensor(isolated, "position_ids").eq(0).cumsum(dim=1)
    if numbers_BS.max() < 2:  # a sequence of one or two tokens
        return
    vocabulary = context.special.vocabulary
    with evaluating(model):
        coupling = _influence(model, plain, numbers_BS, vocabulary)
        leak = _influence(model, isolated, numbers_BS, vocabulary)
        change = _distance_from_alone(model, isolated, numbers_BS)
    name = f"{type(model).__name__} (model_type {getattr(getattr(model, 'config', None), 'model_type', None)})"
    if coupling == 0.0:
        raise ModelError(
            f"data.isolate_documents=true cannot be checked: with its present weights no logits of {name} depend on "
            "another position. Use data.isolate_documents=false"
        )
    if not leak <= LEAK * coupling:
        raise ModelError(
            f"data.isolate_documents=true: {name} lets attention cross document boundaries ({leak / coupling:.0%} of "
            "the effect without isolation). Use data.isolate_documents=false, or another model.attention or family"
        )
    if not change <= LEAK * coupling:
        raise ModelError(
            f"data.isolate_documents=true: {name} does not treat a packed document as the same document alone (logits "
            f"differ by {change:.2g}), so its positions do not restart. Use data.isolate_documents=false"
        )


def _inputs(options: ObjectiveOptions, context: ObjectiveContext, model: nn.Module) -> Inputs:
    """A row of two documents of equal length."""
    tokens = options.row_tokens(context)
    special = [i for i in context.special.ids().values() if i is not None]
    words = np.setdiff1d(np.arange(context.special.vocabulary), special)
    row = Row(0, np.random.default_rng(0).choice(words, tokens), np.array([0, tokens // 2]))
    batch = options.build(context).batch([row], seed=0, step=0)
    return batch.to(next(model.parameters()).device).inputs


def _influence(model: nn.Module, inputs: Inputs, numbers_BS: Tensor, vocabulary: int) -> float:
    """How far the logits of one document move when all tokens of the other are changed, either way."""
    ids_BS, logits_BSV = _tensor(inputs, "input_ids"), logits_of(model, inputs)
    moved = 0.0
    for number in (1, 2):
        ours, others = numbers_BS == number, numbers_BS != number
        changed_BSV = logits_of(model, {**inputs, "input_ids": torch.where(others, (ids_BS + 1) % vocabulary, ids_BS)})
        moved = max(moved, _distance(changed_BSV[ours], logits_BSV[ours]))
    return moved


def _distance_from_alone(model: nn.Module, inputs: Inputs, numbers_BS: Tensor) -> float:
    """How far the logits of a document are from those that its tokens have in a row of their own."""
    ids_BS, logits_BSV = _tensor(inputs, "input_ids"), logits_of(model, inputs)
    distance = 0.0
    for number in (1, 2):
        ours = numbers_BS == number
        alone = logits_of(model, {"input_ids": ids_BS[ours][None], "use_cache": False})
        distance = max(distance, _distance(alone[0], logits_BSV[ours]))
    return distance


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _tensor(inputs: Inputs, name: str) -> Tensor:
    value = inputs[name]
    assert isinstance(value, Tensor), name
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; modules that were in it before stay in it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
