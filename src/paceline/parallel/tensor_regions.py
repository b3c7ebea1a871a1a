"""Regions: the parts of a block in which each rank computes with its own heads, columns or slices of experts.

What enters a region is the same on all ranks, and each makes something else of it; what leaves it is a sum over them.
So its input is copied (the gradients are summed) and its output summed (the gradient is copied). Everything outside of
regions is computed by all ranks alike:

                     into a region                      out of it
    tensor           copy                               all_reduce
    with sequence    all_gather along the positions     reduce_scatter along the positions

With sequence parallelism the hidden states between the regions of a stack of blocks are pieces of the sequence. Before
the first block and after the last one they are whole, so that masks, positions and embeddings are the family's own.

Shapes: B rows, S positions, T tokens, D width, N query heads; hidden states are (B, S, D) or (T, D).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.comm.mesh import Axis
from paceline.errors import ModelError, PlanError
from paceline.parallel.collectives import all_gather, all_reduce, copy, gather_equal, piece, reduce_scatter
from paceline.parallel.kept import kept
from paceline.parallel.tensor_heads import Heads

POSITIONS = -2
"""The dimension of hidden states (B, S, D) or (T, D) along which a sequence is cut."""

ALSO_WHOLE = ("key_value_states", "encoder_hidden_states")
"""Arguments of a region, besides its hidden states, that all ranks hold alike, and whole."""
OF_OWN_HEADS = ("position_bias",)
"""Arguments that are already of this rank's heads, or that never enter what is cut."""
OF_TOKENS = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)
"""Arguments of experts, each a row for every token."""
PASSED_BY = ("residual",)
"""Arguments that only go round what is cut, and are added to what leaves the region."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Border:
    """How one region is entered and left."""

    axis: Axis
    where: str
    """Name of the module, for the tally and for errors."""
    sequence: bool
    """Whether the hidden states outside are pieces of the sequence."""

    def enter(self, hidden: Tensor) -> Tensor:
        """What every rank needs whole."""
        if not self.sequence:
            return copy(hidden, self.axis, where=self.where)
        if not hidden.is_floating_point():
            return kept(lambda: self.axis.all_gather(hidden, POSITIONS, where=self.where))
        return all_gather(hidden, self.axis, POSITIONS, where=self.where)

    def leave(self, part: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.sequence:
            return reduce_scatter(part, self.axis, POSITIONS, where=self.where)
        return all_reduce(part, self.axis, where=self.where)


def enter_by_hidden_states(module: nn.Module, border: Border) -> None:
    """Enter a region with the first argument of ``module``; ``PlanError`` for another one that learns."""
    names = list(inspect.signature(module.forward).parameters)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(names, args, strict=False)) | kwargs
        hidden = names[0] if names[0] in named else "hidden_states"
        entered = {hidden: border.enter(named[hidden])}
        for name, value in named.items():
            if name in ALSO_WHOLE and isinstance(value, Tensor):
                entered[name] = copy(value, border.axis, where=border.where)
            elif name not in (hidden, *OF_OWN_HEADS, *PASSED_BY) and _learns(value):
                raise PlanError(
                    f"layout.tensor={border.axis.size}: {border.where} gets {name!r} with a gradient, besides its "
                    f"hidden states; expected only {', '.join((*ALSO_WHOLE, *OF_OWN_HEADS, *PASSED_BY))}. Use tensor=1"
                )
        args = tuple(entered.get(name, value) for name, value in zip(names, args, strict=False))
        return args, {name: entered.get(name, value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def enter_by_all_tensors(module: nn.Module, border: Border) -> None:
    """Enter experts with their tokens and with the choice and weights of the router.

    Along a sequence these are put together token by token, in whatever order; ``PlanError`` if they may not be.
    """
    names = tuple(inspect.signature(module.forward).parameters)
    if border.sequence and names not in OF_TOKENS:
        raise PlanError(
            f"layout.sequence=true: {border.where} takes ({', '.join(names)}); expected ({', '.join(OF_TOKENS[0])}), "
            "which list tokens one by one. Use sequence=false"
        )

    def entered(value: Any) -> Any:
        return border.enter(value) if isinstance(value, Tensor) else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(entered, args)), {name: entered(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def leave_by_output(module: nn.Module, border: Border) -> None:
    """Leave a region with what ``module`` returns, a tensor."""
    module.register_forward_hook(lambda _, __, output: border.leave(output))


def leave_by_row(linear: nn.Module, border: Border) -> None:
    """Leave a region through a linear layer that holds this rank's rows (of input features)."""
    linear.forward = _Row(linear, border)


class _Row:
    """A product of which each rank has a part; the bias is added once, to the sum."""

    def __init__(self, linear: nn.Module, border: Border) -> None:
        self._linear = linear
        self._border = border

    def __call__(self, x: Tensor) -> Tensor:
        weight: Tensor = self._linear.weight  # type: ignore[assignment]
        bias: Tensor | None = self._linear.bias  # type: ignore[assignment]
        output = self._border.leave(F.linear(x, weight) if isinstance(self._linear, nn.Linear) else x @ weight)
        return output if bias is None else output + bias


def select_columns(linear: nn.Module, columns: Tensor) -> None:
    """Let a layer that holds all its output features compute only some of them, in this order."""
    linear.forward = _Selected(linear, columns)


class _Selected:
    def __init__(self, linear: nn.Module, columns: Tensor) -> None:
        self._linear = linear
        self._columns = columns

    def __call__(self, x: Tensor) -> Tensor:
        weight: Tensor = self._linear.weight  # type: ignore[assignment]
        bias: Tensor | None = self._linear.bias  # type: ignore[assignment]
        columns = self._columns.to(weight.device)
        return F.linear(x, weight[columns], None if bias is None else bias[columns])


def select_features(module: nn.Module, features: Tensor) -> None:
    """Of what a module gives keep only some features, in this order."""
    module.register_forward_hook(lambda _, __, output: output[..., features.to(output.device)])


def add_share(module: nn.Module, key: str, axis: Axis) -> None:
    """While ``module`` runs let it find a parameter divided by the number of ranks, all of which add it."""

    def before(_: nn.Module, __: Any) -> None:
        module.__dict__[key] = module.get_parameter(key) / axis.size  # found before the parameter

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        module.__dict__.pop(key, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def cut_alibi(module: nn.Module, heads: Heads) -> None:
    """Of the distances that a model adds to the scores of every head (B x N, 1, S), keep those of this rank's heads."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("alibi") is None:
            return args, kwargs
        alibi_BN1S = kwargs["alibi"].unflatten(0, (-1, heads.query))[:, heads.own_queries]
        return args, kwargs | {"alibi": alibi_BN1S.flatten(0, 1)}

    if "alibi" in inspect.signature(module.forward).parameters:
        module.register_forward_pre_hook(hook, with_kwargs=True)


def see_all_features(module: nn.Module, axis: Axis, where: str) -> None:
    """Give a module inside a region (a norm over all heads) the features of all ranks, and take back the own ones."""
    module.register_forward_pre_hook(lambda _, args: (gather_equal(args[0], axis, -1, where=where), *args[1:]))
    module.register_forward_hook(lambda _, __, output: piece(output, axis, -1, where=where))


def cut_stack(blocks: Sequence[nn.Module], axis: Axis, where: str) -> None:
    """Between the first and the last of ``blocks`` each rank holds its piece of the sequence."""
    first, last = blocks[0], blocks[-1]
    hidden = next(iter(inspect.signature(first.forward).parameters))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_own_positions(args[0], axis, where), *args[1:]), kwargs
        return args, kwargs | {hidden: _own_positions(kwargs[hidden], axis, where)}

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return gather_equal(output, axis, POSITIONS, where=where)
        return (gather_equal(output[0], axis, POSITIONS, where=where), *output[1:])

    first.register_forward_pre_hook(before, with_kwargs=True)
    last.register_forward_hook(after, prepend=True)


def _own_positions(hidden: Tensor, axis: Axis, where: str) -> Tensor:
    if hidden.shape[POSITIONS] % axis.size:
        raise ModelError(
            f"layout.sequence=true: {where} gets {hidden.shape[POSITIONS]} positions, which do not divide by "
            f"tensor={axis.size}. Use a sequence length that does, or sequence=false"
        )
    return piece(hidden, axis, POSITIONS, where=where)


class PadSequence:
    """Pads what enters a model to a multiple of positions, and cuts its logits back.

    The padding comes last and is seen by nothing: causal attention does not look ahead, other models get a mask.
    """

    def __init__(self, multiple: int) -> None:
        self._multiple = multiple
        self._positions = 0

    def install(self, model: nn.Module) -> None:
        """Hook a model that is called by keywords."""
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        self._positions = 0 if ids is None else ids.shape[1]
        return args, {name: self._pad(name, value) for name, value in kwargs.items()}

    def _pad(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not (missing := -value.shape[-1] % self._multiple):
            return value
        if value.ndim == 2 and not value.is_floating_point():  # ids, positions, a mask of 0 and 1
            return F.pad(value, (0, missing))
        if name == "attention_mask" and value.ndim == 4 and value.is_floating_point():
            # To be added to the scores (B, 1, S, S): no query sees the padding, which itself sees all the rest.
            return F.pad(F.pad(value, (0, missing), value=-torch.inf), (0, 0, 0, missing))
        raise ModelError(
            f"layout.sequence=true: {name} of shape {tuple(value.shape)} cannot be padded to a multiple of "
            f"{self._multiple} positions. Use sequences of such a length, or sequence=false"
        )

    def _after(self, _: nn.Module, __: Any, output: Any) -> Any:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or not self._positions or logits.shape[1] == self._positions:
            return output
        if logits is output:
            return logits[:, : self._positions]
        output.logits = logits[:, : self._positions]
        return output


def _learns(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        return any(_learns(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_learns(item) for item in value)
