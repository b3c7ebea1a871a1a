"""The proof that a model can be cut along the sequence: its ranks are played one after the other in one process.

A family fits if, attention apart, it treats each position by itself and reads its place from ``position_ids``. Whether
it does cannot be read from its class: some shift or convolve along the sequence, count positions themselves, or pass
attention more than our form of it reads. So the model at hand is tried.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from paceline.comm.mesh import Axis
from paceline.data.rows import Row
from paceline.errors import PlanError
from paceline.objectives.base import Batch, ObjectiveContext, ObjectiveOptions, logits_of
from paceline.parallel.context import (
    SPANS,
    Attention,
    ContextCut,
    attention_kinds,
    entries,
    multiple_of,
    set_attention_kinds,
)
from paceline.parallel.context_rules import own_attention, refuse
from paceline.parallel.documents import positions_of
from paceline.parallel.partial_attention import Scores
from paceline.parallel.ring import attend
from paceline.parallel.visible import Spans, Visible

Inputs = dict[str, Tensor | bool]

PIECE_TOKENS = 4
"""Positions of a piece in the trial: short, so that a single key seen or not seen shows."""

TRIALS = 3
"""Of which one has to succeed: in a mixture of experts, a near tie may send a token elsewhere by rounding alone."""

ERROR = 1e-4
"""How far a part may be from the same part of the whole sequence, beyond rounding. In fp32, families that fit are at
1e-7 to 5e-6; one that convolves along the sequence was at 6e-4 with fresh weights."""

ROUNDINGS = 64
"""Of fp32, relative to the greatest logit: what another order of sums may come to, be the influence ever so small."""

SMALLEST = 1e-6
"""What counts as 0 among values of the order of 1: some families start with projections that are."""


@torch.no_grad()
def check_context(
    model: nn.Module, options: ObjectiveOptions, context: ObjectiveContext, *, attention: Attention, size: int
) -> None:
    """Try whether the parts of ``model``'s logits that ``size`` ranks compute are those of the whole sequence.

    The model is whole: to be called before any cut, with weights in fp32 at least. Runs about five forward passes of
    one short row, on this rank alone. Raises ``PlanError``, which names the model, if they are not, or if nothing
    could be seen either way.
    """
    refuse(model, size)
    name = f"{type(model).__name__} (model_type {getattr(getattr(model, 'config', None), 'model_type', None)})"
    tokens = min(PIECE_TOKENS * multiple_of(attention, size), context.sequence_tokens)
    context = replace(context, sequence_tokens=tokens)
    for trial in range(TRIALS):
        batch = _batch(model, options, context, trial)
        with _as_it_was(model):
            model.eval()
            expected_BSV = logits_of(model, batch.inputs)
            coupling = _influence(model, batch, expected_BSV, context.special.vocabulary)
            if coupling == 0.0:
                raise PlanError(
                    f"layout.context={size} cannot be checked: with its present weights no logits of {name} depend on "
                    "another position. Use layout.context=1"
                )
            worst = _error_of_parts(model, batch, expected_BSV, coupling, attention, size)
        if worst <= ERROR:
            return
    raise PlanError(
        f"layout.context={size}: {name} computes something else where its sequence is cut (off by {worst:.2%}): more "
        "than our attention looks along the sequence. Use layout.context=1, or another family"
    )


def _batch(model: nn.Module, options: ObjectiveOptions, context: ObjectiveContext, trial: int) -> Batch:
    """A row of three documents, with what the objective makes of them."""
    length = options.row_tokens(context)
    special = [i for i in context.special.ids().values() if i is not None]
    words = np.setdiff1d(np.arange(context.special.vocabulary), special)
    row = Row(0, np.random.default_rng(trial).choice(words, length), np.array([0, length // 3, length - 3]))
    return options.build(context).batch([row], seed=0, step=0).to(next(model.parameters()).device)


def _influence(model: nn.Module, batch: Batch, logits_BSV: Tensor, vocabulary: int) -> float:
    """How far the logits at odd positions move when all tokens at even ones are changed."""
    ids_BS = batch.inputs["input_ids"]
    assert isinstance(ids_BS, Tensor)
    changed_BS = ids_BS.clone()
    changed_BS[:, ::2] = (changed_BS[:, ::2] + 1) % vocabulary
    moved_BSV = logits_of(model, {**batch.inputs, "input_ids": changed_BS})
    return _distance(moved_BSV[:, 1::2], logits_BSV[:, 1::2])


def _error_of_parts(
    model: nn.Module, batch: Batch, expected_BSV: Tensor, coupling: float, attention: Attention, size: int
) -> float:
    """The greatest error, beyond rounding, at any position of any rank, or of the whole sequence by our attention.

    Of logits as a share of ``coupling``; of what attention is given, as a share of its greatest value. The latter shows
    more: with fresh weights attention looks everywhere alike, and its result hardly depends on queries and keys.
    """
    tokens, multiple = expected_BSV.shape[1], multiple_of(attention, size)
    rounding = ROUNDINGS * torch.finfo(torch.float32).eps * float(expected_BSV.abs().max())
    play, cut_of = _Play(), partial(ContextCut, multiple=multiple, positions=positions_of(model))
    whole = cut_of(size=1, spans=lambda tokens: [slice(0, tokens)], attend=play.whole)
    with _attached(model, whole):
        worst = _distance(logits_of(model, whole.split(batch).inputs)[:, :tokens], expected_BSV)
    if not play.kept:
        raise PlanError(own_attention(model, size))
    for index in range(size):
        spans = partial(SPANS[attention], size=size, index=index)
        cut = cut_of(size=size, spans=spans, attend=partial(play.part, spans))
        play.calls = 0
        with _attached(model, cut):
            logits_BPV = logits_of(model, cut.split(batch).inputs)
        places = _places(spans(-(-tokens // multiple) * multiple))
        real = places < tokens
        worst = max(worst, _distance(logits_BPV[:, real], expected_BSV[:, places[real]]))
    return max((worst - rounding) / coupling, play.error)


def _places(spans: Spans) -> Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])


class _Play:
    """Attention of one rank, with the keys and values of all others known from a pass over the whole sequence."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of each call in the pass over the whole: query, key and value."""
        self.calls = 0
        self._alone = Axis(name="context")
        self.error = 0.0
        """How far what was given to parts was from what was given to the whole."""

    def whole(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, visible: Visible, scores: Scores
    ) -> Tensor:
        """The whole sequence."""
        self.kept.append((query, key, value))
        return attend(query, key, value, sinks, visible, scores, self._alone, visible.whole, [visible.whole])

    def part(
        self,
        spans: Callable[[int], Spans],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        visible: Visible,
        scores: Scores,
    ) -> Tensor:
        """The queries of a part, at the same call of the pass over the whole."""
        kept, own = self.kept[self.calls], spans(visible.tokens)
        self.calls += 1
        for given, expected in zip((query, key, value), kept, strict=True):
            size = max(float(expected.abs().max()), SMALLEST)
            self.error = max(self.error, _distance(given, expected[:, :, _places(own)]) / size)
        _, key, value = kept
        return attend(query, key, value, sinks, visible, scores, self._alone, own, [visible.whole])


@contextmanager
def _attached(model: nn.Module, cut: ContextCut) -> Iterator[None]:
    with _as_it_was(model):
        cut.attach(model)
        yield


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """After it, modules are in the mode they were in, and the model has its forward and its kinds of attention back."""
    modes = [(module, module.training) for module in model.modules()]
    kinds = attention_kinds(model)
    forwards = [(module, vars(module).get("forward")) for module in entries(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        set_attention_kinds(kinds)
        for module, forward in forwards:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _distance(a: Tensor, b: Tensor) -> float:
    """What is no number is as far away as can be."""
    return float((a.float() - b.float()).abs().nan_to_num(nan=float("inf")).max()) if a.numel() else 0.0
