"""Where a model drops out, and what the dimensions of a dropped tensor count: found by running it.

It is run twice in training mode, on two rows and on three, the second time with one position less. A dimension that
grows counts rows, one that shrinks positions of an input, one that does both both, and one that stays features, heads
or the like. So nothing is read from the family's code, and what fits none of these is said to be unknown.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paceline.models.attention import OURS
from paceline.objectives.base import Batch, logits_of
from paceline.parallel.dropout_calls import Caught, Chance, Numbering, Place, enter

STREAMS = {"input_ids": 12, "decoder_input_ids": 9}
"""Inputs that have positions, and how many of each are tried at most."""
FEWEST = 5
"""Positions: with these no two meanings of a dimension go from one size to the same other."""
CAUGHT_ATTENTION = ("eager", "sdpa", *OURS)
"""Kinds whose dropout is caught; the kernels of others draw by themselves, and may not run on a CPU."""


@dataclass(frozen=True)
class Dimension:
    """What a dimension counts: the rows of a micro-batch, the positions of an input, or ``features``."""

    rows: bool = False
    stream: str | None = None
    features: int | None = None
    """So many in the whole model; heads too."""


ROWS = Dimension(rows=True)
Dimensions = tuple[tuple[Dimension, ...], ...]
"""Of each dimension of a tensor: one thing that it counts, or two, rows first, where these are one dimension."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """The dropouts of a model."""

    dimensions: Mapping[tuple[str, int], Dimensions]
    """Of what is dropped, by module and number of the dropout in it."""
    calls: Mapping[str, int]
    """Of each of these modules, in a forward pass."""
    names: Mapping[str, str]
    """Of each of these modules, by all its names."""
    unknown: str | None
    """What in the model is random otherwise, or drops out something that is not known; None if nothing."""


def find_places(model: nn.Module, sample: Batch) -> Places:
    """Try ``model``, which is whole, on a part of ``sample``, which has two rows or more.

    Neither the model nor any stream of random numbers is changed. Runs one short forward pass, and another one if it
    drops out. A model with other attention than is caught is not run: it is unknown if its config speaks of dropout.
    """
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    if (kind := _other_attention(configs)) is not None:
        return Places(dimensions={}, calls={}, names={}, unknown=_in_kernels(configs, kind))
    tokens = _tokens(sample)
    names: dict[nn.Module, str] = {}
    aliases = {alias: names.setdefault(module, alias) for alias, module in model.named_modules(remove_duplicate=False)}
    first = second = _run(model, aliases, _inputs(sample, [0, 1], tokens))
    if first.found:
        fewer = {stream: number - 1 for stream, number in tokens.items()}
        second = _run(model, aliases, _inputs(sample, [0, 1, 0], fewer))
    unknown = first.drawn or second.drawn
    if [one.place for one in first.found] != [other.place for other in second.found]:
        unknown = unknown or "what drops out changes with the shape of a batch"
    dimensions: dict[tuple[str, int], Dimensions] = {}
    for one, other in zip(first.found, second.found, strict=False):
        counted = _counted(one, other, tokens)
        key = one.place.module, one.place.number
        if counted is None or dimensions.setdefault(key, counted) != counted:
            unknown = unknown or (
                f"{one.place.module or type(model).__name__} drops out a tensor of shape {tuple(one.shape)}, which is "
                "not one of rows and positions"
            )
    placed = {module for module, _ in dimensions}
    return Places(
        dimensions=dimensions,
        calls={module: first.numbering.calls[module] for module in placed},
        names={alias: name for alias, name in aliases.items() if name in placed},
        unknown=unknown,
    )


def _other_attention(configs: Sequence[Any]) -> str | None:
    kinds = [getattr(config, "_attn_implementation", None) for config in configs]
    return next((kind for kind in kinds if kind is not None and kind not in CAUGHT_ATTENTION), None)


def _in_kernels(configs: Sequence[Any], kind: str) -> str | None:
    for config in configs:
        for key, value in getattr(config, "to_dict", dict)().items():
            if "drop" in key and isinstance(value, float) and value > 0.0:
                return f"model.attention={kind} with {key}={value:g} draws random numbers in kernels of its own"
    return None


@dataclass(frozen=True, eq=False)
class _Found:
    place: Place
    tensor: Tensor
    """What is dropped, or the queries of an attention that drops out."""
    shape: torch.Size


class _Trial:
    """One forward pass without dropout."""

    def __init__(self) -> None:
        self.numbering = Numbering()
        self.found: list[_Found] = []
        self.drawn: str | None = None
        """What draws random numbers."""

    def next(self, tensor: Tensor, shape: torch.Size) -> Chance | None:
        """Write it down."""
        self.found.append(_Found(self.numbering.next(), tensor, shape))
        return None


class _Watched(Caught):
    """Also sees which other functions draw random numbers."""

    def __init__(self, trial: _Trial) -> None:
        super().__init__(trial)
        self._trial = trial

    def other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it."""
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            place = self._trial.numbering.next()
            name = getattr(func, "__name__", str(func))
            self._trial.drawn = f"{place.module or 'the model'} draws random numbers ({name})"
        return result


@torch.no_grad()
def _run(model: nn.Module, aliases: Mapping[str, str], inputs: Mapping[str, Tensor | bool]) -> _Trial:
    trial = _Trial()
    with as_it_was(model):
        enter(model, aliases, lambda: trial.numbering)
        model.train()
        before = _streams()
        with _Watched(trial):
            logits_of(model, inputs)
        if trial.drawn is None and _streams() != before:
            trial.drawn = "the model draws random numbers"
    return trial


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """After it, modules have their forwards, modes and buffers back, and streams of random numbers their states."""
    modes = [(module, module.training, vars(module).get("forward")) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for module, training, forward in modes:
            module.training = training
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        for buffer, value in buffers:
            buffer.copy_(value)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _streams() -> tuple[Any, ...]:
    """The states of all streams of random numbers that a model may draw from, as values that can be compared."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())


def short_inputs(sample: Batch, rows: Sequence[int]) -> dict[str, Tensor | bool]:
    """These rows of ``sample``, with as few positions as a trial needs."""
    return _inputs(sample, rows, _tokens(sample))


def _tokens(sample: Batch) -> dict[str, int]:
    """How many positions of each input are tried, another number of each; no more than there are, if they do."""
    tokens: dict[str, int] = {}
    for stream, most in STREAMS.items():
        ids = sample.inputs.get(stream)
        number = min(most, max(FEWEST, ids.shape[1])) if isinstance(ids, Tensor) else most
        tokens[stream] = number - (number in tokens.values())
    return tokens


def _inputs(sample: Batch, rows: Sequence[int], tokens: Mapping[str, int]) -> dict[str, Tensor | bool]:
    """These rows, with so many positions: their own, again and again."""
    return {name: _part(sample, name, value, rows, tokens) for name, value in sample.inputs.items()}


def _part(
    sample: Batch, name: str, value: Tensor | bool, rows: Sequence[int], tokens: Mapping[str, int]
) -> Tensor | bool:
    if not isinstance(value, Tensor):
        return value
    stream = next(stream for stream in reversed(STREAMS) if name.startswith(stream.removesuffix("input_ids")))
    ids = sample.inputs.get(stream)
    value = value[rows]
    for dim in range(1, value.ndim):
        if isinstance(ids, Tensor) and value.shape[dim] == ids.shape[1]:
            value = value.index_select(dim, torch.arange(tokens[stream]) % ids.shape[1])
    return value


def _counted(one: _Found, other: _Found, tokens: Mapping[str, int]) -> Dimensions | None:
    """What the dimensions count; None if that is not known, or if no rows or no positions are among them."""
    if len(one.shape) != len(other.shape) or len(one.shape) < 2:
        return None
    counted = [_meaning(a, b, tokens) for a, b in zip(one.shape, other.shape, strict=True)]
    of_rows = [i for i, dim in enumerate(counted) if dim and ROWS in dim]
    of_positions = [dim for dim in counted if dim and dim[-1].stream]
    if len(of_rows) != 1 or not of_positions or None in counted:
        return None
    # Rows 0 and 2 of the second trial are the same. Rows and positions in one dimension may come in either order.
    values = other.tensor.unflatten(of_rows[0], (3, -1))
    same = torch.allclose(values.select(of_rows[0], 0), values.select(of_rows[0], 2), rtol=1e-3, atol=1e-3)
    return tuple(dim for dim in counted if dim) if same else None


def _meaning(size: int, other: int, tokens: Mapping[str, int]) -> tuple[Dimension, ...] | None:
    """Of a dimension that had these sizes in the two trials."""
    if size == other:
        return (Dimension(features=size),)
    meanings: dict[tuple[int, int], tuple[Dimension, ...]] = {(2, 3): (ROWS,)}
    for stream, number in tokens.items():
        positions = Dimension(stream=stream)
        meanings |= {(number, number - 1): (positions,), (2 * number, 3 * (number - 1)): (ROWS, positions)}
    return meanings.get((size, other))
