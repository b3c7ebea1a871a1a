"""Context parallelism: a sequence is cut over ranks, and only attention looks beyond a rank's own part.

``cut_context`` makes a model of transformers compute attention for sharded sequences, and ``ContextCut.split`` gives
this rank's part of a micro-batch. Everything else in the model works position by position, and is told the positions.

What a query sees stays the business of the family. It asks for its masks as always, naming functions of positions;
these are asked about positions of the whole sequence here. Documents and padding, which are in no such function, are
found before the micro-batch is cut, and travel with its inputs. A mask reaches attention as an argument, so that a
later forward pass, or one repeated in the backward pass, has its own.

Shapes: B rows, S positions of a micro-batch, P positions of this rank, T = c x P >= S positions after padding.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paceline.comm.mesh import Mesh
from paceline.errors import PlanError
from paceline.models.attention import REFUSED
from paceline.objectives.base import Batch
from paceline.objectives.softening import NO_TARGET
from paceline.parallel.context_rules import own_attention, refuse, require_divisible
from paceline.parallel.documents import Positions, find_documents, positions_of
from paceline.parallel.dropout import Dropout
from paceline.parallel.partial_attention import Scores
from paceline.parallel.ring import ring_attention, ring_spans
from paceline.parallel.ulysses import ulysses_attention, ulysses_spans
from paceline.parallel.visible import Sees, Spans, Visible

Attention = Literal["ring", "ulysses"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Visible, Scores], Tensor]
"""Attention of this rank's queries, keys and values, with sinks or without: (B, N, P, V)."""

Kinds = list[tuple[Any, str | None]]
"""Configs and the attention they name."""

SPANS: dict[Attention, Callable[..., Spans]] = {"ring": ring_spans, "ulysses": ulysses_spans}
ALONG_SEQUENCE = ("input_ids", "position_ids", "token_type_ids")
DOCUMENTS = "context_documents"
"""Input (B, T) int64: the document of every position of the whole sequence, -1 where no query sees it; (B, 0) where all
is one document. That it is there says that the other inputs are a part of a sequence."""
MASK_GIVEN = "context_mask_given"
"""Input: the documents were given as a mask of all pairs, which families take as it is, whatever a layer's kind."""


def cut_context(model: nn.Module, mesh: Mesh, *, attention: Attention, dropout: Dropout | None = None) -> "ContextCut":
    """Make ``model`` compute on the parts of micro-batches that ``ContextCut.split`` gives.

    Parameters stay whole. Each rank of ``mesh.context`` computes the loss of its own positions; losses, counts and
    gradients are to be summed over the axis. Inputs that were not split are computed whole, on each rank by itself and
    as before the cut. Raises ``PlanError`` for what cannot be right; ``check_context`` finds what only a trial shows.
    """
    axis = mesh.context
    refuse(model, axis.size)
    if attention == "ulysses":
        require_divisible(model, axis.size, mesh.tensor.size)
    compute = ring_attention if attention == "ring" else ulysses_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, visible: Visible, scores: Scores
    ) -> Tensor:
        return compute(query, key, value, sinks, visible=visible, scores=scores, axis=axis)

    cut = ContextCut(
        size=axis.size,
        multiple=multiple_of(attention, axis.size),
        spans=partial(SPANS[attention], size=axis.size, index=axis.index),
        positions=positions_of(model),
        attend=attend,
        dropout=dropout,
    )
    cut.attach(model)
    return cut


def multiple_of(attention: Attention, size: int) -> int:
    """A micro-batch is padded to a multiple of this many positions."""
    return 2 * size if attention == "ring" else size


@dataclass(frozen=True)
class _Part:
    """What the masks of one forward pass are made from, beside their functions."""

    documents: Tensor | None
    mask_given: bool


class ContextCut:
    """One rank's place on the context axis: how micro-batches are cut, and what attention computes with them."""

    def __init__(
        self,
        *,
        size: int,
        multiple: int,
        spans: Callable[[int], Spans],
        positions: Positions,
        attend: Attend,
        dropout: Dropout | None = None,
    ) -> None:
        self._size, self._multiple, self._spans = size, multiple, spans
        self._positions, self._attend, self._dropout = positions, attend, dropout
        self._part: _Part | None = None
        """Of the forward pass that is running; None outside."""
        self._before: Kinds = []
        self._after: Kinds = []

    def split(self, batch: Batch) -> Batch:
        """This rank's part of a micro-batch; its ``count`` is that of its own targets.

        Positions that fill up the sequence have no target, and no other position sees them. Raises ``PlanError`` for
        inputs that it does not know how to cut.
        """
        rows, tokens = batch.labels.shape
        padded = -(-tokens // self._multiple) * self._multiple
        columns_P = torch.cat([torch.arange(span.start, span.stop) for span in self._spans(padded)])
        places_P = columns_P.to(batch.labels.device)
        fill_P, places_P = places_P >= tokens, places_P.clamp(max=tokens - 1)
        inputs = dict(batch.inputs)
        mask = inputs.pop("attention_mask", None)
        unknown = inputs.keys() - {*ALONG_SEQUENCE, "use_cache"}
        if unknown:
            raise _cannot(f"there is no rule by which to cut the input {', '.join(sorted(unknown))}")
        documents = find_documents(inputs.get("position_ids"), mask)
        if padded > tokens:
            documents = torch.zeros_like(batch.labels) if documents is None else documents
            documents = nn.functional.pad(documents, (0, padded - tokens), value=-1)
        whole = {name: value for name in ALONG_SEQUENCE if isinstance(value := inputs.get(name), Tensor)}
        whole.setdefault("position_ids", self._positions(whole["input_ids"]))
        labels = batch.labels[:, places_P].masked_fill(fill_P, NO_TARGET)
        inputs |= {name: value[:, places_P] for name, value in whole.items()}
        # Where there is no mask, families look for documents, and would find some in our order of the pieces.
        inputs["attention_mask"] = torch.ones_like(labels)
        inputs[DOCUMENTS] = labels.new_empty(rows, 0) if documents is None else documents
        inputs[MASK_GIVEN] = isinstance(mask, Tensor) and mask.ndim == 4
        count = int((labels != NO_TARGET).sum())
        mixed = None if batch.mixed is None else batch.mixed.at(places_P)
        return replace(batch, inputs=inputs, labels=labels, count=count, mixed=mixed, columns=columns_P)

    def attach(self, model: nn.Module) -> None:
        """Register this attention with transformers, under a name of its own, and make ``model`` use it."""
        from transformers import AttentionInterface, AttentionMaskInterface

        name = f"paceline-context-{id(self)}"
        AttentionInterface.register(name, torch.compiler.disable(_weak(self._attention)))
        AttentionMaskInterface.register(name, _weak(self._mask))
        self._before = attention_kinds(model)
        hugging_face: Any = model
        hugging_face.set_attn_implementation(name)
        self._after = attention_kinds(model)
        if name not in [kind for _, kind in self._after]:
            raise PlanError(own_attention(model, self._size))
        for module in entries(model):
            module.forward = _Forward(module.forward, self)

    @contextmanager
    def on(self, documents: Tensor | None, mask_given: bool) -> Iterator[None]:
        """While it lasts, masks and attention are for a part of a sequence; for whole ones without ``documents``.

        Inside of another, as where a model calls the one below its head, it changes nothing.
        """
        if self._part is not None:
            assert documents is None
            yield
        elif documents is None:
            set_attention_kinds(self._before)
            try:
                yield
            finally:
                set_attention_kinds(self._after)
        else:
            self._part = _Part(documents if documents.shape[1] else None, mask_given)
            try:
                yield
            finally:
                self._part = None

    def _mask(
        self,
        *,
        q_length: int,
        kv_length: int,
        mask_function: Sees,
        device: torch.device,
        q_offset: int = 0,
        kv_offset: int = 0,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        **_: Any,
    ) -> Visible:
        """As transformers asks for a mask; what is given for one is only ever handed on to ``_attention``.

        The two permissions to leave the mask out say that it is the plain one of its kind, with ``local_size`` or
        without; what lays something else over it, such as images that see themselves, withdraws them.
        """
        part = self._part
        assert part is not None, "a mask is made in the forward pass only"
        if q_length != kv_length or q_offset or kv_offset:
            raise _cannot(
                f"the model asks for a mask from {q_offset} + {q_length} queries to {kv_offset} + {kv_length} keys, "
                "not of all of a part"
            )
        if not (allow_is_causal_skip or allow_is_bidirectional_skip):
            raise _cannot("the model's mask has more to it than order and a window, known for a part only")
        tokens = q_length * self._size
        reach = local_size if local_size is not None and local_size < tokens else None
        if part.mask_given and (allow_is_causal_skip or reach is not None):
            raise _cannot("a mask of all pairs was given to a model that is causal or has a window")
        return Visible(
            sees=mask_function,
            causal=allow_is_causal_skip,
            reach=reach,
            documents=part.documents,
            tokens=tokens,
            device=torch.device(device),
        )

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Visible | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: query (B, N, P, H), key (B, K, P, H), value (B, K, P, V), and sinks (N,) if the
        family has any, give (B, P, N, V)."""
        name = type(module).__name__
        if not isinstance(attention_mask, Visible):
            raise _cannot(f"{name} makes its attention mask itself, and from a part of the sequence")
        refused = [name for name in (*REFUSED, "position_bias") if others.get(name) is not None]
        refused += ["output_attentions"] if others.get("output_attentions") else []
        if refused:
            raise _cannot(f"{name} asks for {', '.join(refused)}, which attention over ranks does not compute")
        chance_BN = self._dropout.attention(query, dropout) if self._dropout else None
        if dropout and chance_BN is None:
            raise _cannot(f"{name} drops out {dropout:g} of attention outside of a step, where no rank knows which")
        positions = attention_mask.tokens // self._size
        if query.shape[2] != positions or key.shape[2] != positions:
            raise _cannot(f"{name} attends from {query.shape[2]} to {key.shape[2]} of a part's {positions} positions")
        scores = Scores(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            dropout=dropout,
            chance_BN=chance_BN,
        )
        return self._attend(query, key, value, s_aux, attention_mask, scores).transpose(1, 2).contiguous(), None


def _weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method as long as its object lives, which the model's forward keeps: transformers' tables outlive both."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        assert alive is not None
        return alive(*args, **kwargs)

    return call


class _Forward:
    """A model's forward that also takes what ``split`` adds to the inputs."""

    def __init__(self, forward: Callable[..., Any], cut: ContextCut) -> None:
        self._forward, self._cut = forward, cut
        signature = inspect.signature(forward)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in (DOCUMENTS, MASK_GIVEN)
        ]
        self.__signature__ = signature.replace(parameters=[*named, *added, *rest])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._cut.on(kwargs.pop(DOCUMENTS, None), kwargs.pop(MASK_GIVEN, False)):
            return self._forward(*args, **kwargs)


def attention_kinds(model: nn.Module) -> Kinds:
    """The attention that each config of a model names, those inside of others after them."""
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in found}
    return [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]


def set_attention_kinds(kinds: Kinds) -> None:
    """Undo changes of what ``attention_kinds`` gave."""
    for config, kind in kinds:
        config._attn_implementation = kind


def entries(model: nn.Module) -> list[nn.Module]:
    """The modules that may be called with inputs: the model, and the one below its head."""
    below = getattr(model, "base_model", model)
    return [model] if below is model else [model, below]


def _cannot(reason: str) -> PlanError:
    return PlanError(f"layout.context > 1: {reason}. Use layout.context=1")
