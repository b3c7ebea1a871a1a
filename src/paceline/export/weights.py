"""The tensors of a model under the names and in the shapes in which its family is published.

Transformers keeps some families otherwise in memory than on disk (Mixtral's experts are one tensor in memory, many on
disk); other programs read the published form. The conversion is undone one block of the model at a time.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.errors import ModelError
from paceline.export.stream import write_sharded


def write_weights(
    folder: Path, model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write ``tensors`` as the weights of ``model``, which may be on the meta device.

    Parameters are rounded to ``dtype``, buffers stay as they are, a tied tensor is stored once. Raises ``ModelError``
    if names or shapes are not those of the model.
    """
    stored = _stored(model)
    given = _match(model, stored, tensors)
    blocks = _blocks(stored)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def cast(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if name in parameters and tensor.is_floating_point() else tensor

    def fetch(name: str) -> Tensor:
        tensor = tensors[given[name]]
        if tensor.shape != stored[name].shape:
            raise ModelError(f"{name} has the shape {list(tensor.shape)}; the model has {list(stored[name].shape)}.")
        return cast(name, tensor)

    def published(block: Iterable[str]) -> dict[str, Tensor]:
        return _publish(model, {name: cast(name, stored[name]) for name in block})

    shapes = {name: tensor for block in blocks for name, tensor in published(block).items()}
    if shapes.keys() != published(stored).keys():  # a family that joins tensors of several blocks into one
        blocks, shapes = [list(stored)], published(stored)

    def values() -> Iterator[tuple[str, Tensor]]:
        for block in blocks:
            yield from _publish(model, {name: fetch(name) for name in block}).items()

    write_sharded(folder, shapes, values(), shard_bytes)


def _stored(model: Any) -> dict[str, Tensor]:
    """The tensors that go into the file: each tied one under the one name that loading looks for."""
    left_out = set(model.all_tied_weights_keys) | set(model._keys_to_ignore_on_save)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in left_out}


def _match(model: Any, stored: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each stored name the name under which ``tensors`` has it."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    given = {name: next((alias for alias in names[id(t)] if alias in tensors), "") for name, t in stored.items()}
    known = {name for group in names.values() for name in group}
    problems = [f"{name} is missing" for name, alias in given.items() if not alias]
    problems += [f"{name} is not a tensor of the model" for name in tensors if name not in known]
    if problems:
        raise ModelError(f"the weights are not those of {type(model).__name__}: {', '.join(problems[:6])}.")
    return given


def _blocks(names: Iterable[str]) -> list[list[str]]:
    """Names grouped by what stands before and at their first number (``model.layers.3``); others are alone."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
        blocks[".".join(parts[: number + 1])].append(name)
    return list(blocks.values())


def _publish(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        return dict(revert_weight_conversion(model, tensors))
