"""The two tables over the vocabulary, the embedding and the head, cut by rows over the tensor axis.

Every rank holds equally many rows; behind the last entry of the vocabulary they are padding: zero, never looked up and
in no sum, so their gradient is zero. An embedding adds up what its ranks find, a head gives each rank the logits of its
own entries. They stay apart: the loss is taken from them as they are (``objectives.cross_entropy``), and only sampling
asks for all of them (``objectives.vocabulary.gather_logits``).

Shapes: B rows, S positions, V vocabulary, L rows of a rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paceline.errors import PlanError
from paceline.objectives.vocabulary import VocabularyCut
from paceline.parallel.collectives import all_reduce, copy


def is_plain_lookup(module: nn.Module | None) -> bool:
    """Whether a module is an embedding and nothing more: no norm or other layer in it."""
    return isinstance(module, nn.Embedding) and module._parameters.keys() == {"weight"} and not module._modules


def cut_lookup(embedding: nn.Embedding, cut: VocabularyCut, where: str) -> None:
    """Make an embedding that holds this rank's rows give what the whole one would; ids stay those of the whole.

    ``PlanError`` for one that changes its rows by more than a factor: what the ranks find could not be added up.
    """
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or not _is_linear(embedding):
        raise PlanError(
            f"layout.tensor={cut.axis.size}: {where} normalises its rows, or scales gradients by how often a row is "
            "looked up. Use tensor=1"
        )
    # The row of the padding token gets no gradient; elsewhere no row is it.
    padding = None if embedding.padding_idx is None else embedding.padding_idx - cut.start
    embedding.padding_idx = padding if padding is not None and 0 <= padding < cut.entries else None
    embedding.num_embeddings = cut.rows
    embedding.forward = _Lookup(embedding.forward, cut, where)  # type: ignore[assignment, method-assign]


def cut_head(head: nn.Linear, cut: VocabularyCut, where: str) -> None:
    """Make a head that holds this rank's rows give their logits (..., L)."""
    head.out_features = cut.rows
    head.register_forward_pre_hook(lambda _, args: (copy(args[0], cut.axis, where=where), *args[1:]))


@torch.no_grad()
def _is_linear(embedding: nn.Embedding) -> bool:
    ids = torch.arange(min(8, len(embedding.weight)), device=embedding.weight.device)
    once = embedding(ids)
    embedding.weight.mul_(2.0)
    twice = embedding(ids)
    embedding.weight.mul_(0.5)
    return torch.equal(twice, once * 2.0)  # a power of two changes no digit


class _Lookup:
    """The forward of an embedding: any of its class that is linear in the rows it looks up."""

    def __init__(self, forward: Callable[..., Tensor], cut: VocabularyCut, where: str) -> None:
        self._forward = forward
        self._cut = cut
        self._where = where

    def __call__(self, ids: Tensor, **others: Any) -> Tensor:
        own = ids - self._cut.start
        elsewhere = (own < 0) | (own >= self._cut.entries)
        # One that is outside the whole vocabulary must not pass for another rank's.
        torch._assert_async(((ids >= 0) & (ids < self._cut.vocabulary)).all(), "token id out of bounds")
        rows = self._forward(own.masked_fill(elsewhere, 0), **others)
        return all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self._cut.axis, where=self._where)
