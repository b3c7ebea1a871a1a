"""Messages and states as bytes: a JSON header, then the tensors one after the other. Nothing is unpickled."""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.sync.server import messages
from paceline.sync.server.place import Box


class Boxed(NamedTuple):
    """Values of some boxes of a shard's pieces, one box after the other."""

    boxes: tuple[Box, ...]
    flat: Tensor


class Rows(NamedTuple):
    """Some rows of a box of a shard's pieces: ``ids`` (K,) count from where the box starts, and ascend."""

    box: Box
    ids: Tensor
    values: Tensor
    """(K, columns of the box)"""


class Mixed(NamedTuple):
    """Boxes that are whole, and boxes of which there are some rows."""

    whole: Boxed
    rows: tuple[Rows, ...]


_ALIGNED_BYTES = 64
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
DTYPES |= {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}


def pack(value: Any) -> tuple[bytes, list[Tensor]]:
    """A header, and the tensors that follow it, each at a multiple of 64 bytes."""
    tensors: list[Tensor] = []
    tree = _tree(value, tensors)
    shapes = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]
    return json.dumps([tree, shapes], separators=(",", ":")).encode(), tensors


def values_bytes(payload: Any) -> int:
    """Of all tensors in a payload, without the room between them."""
    if isinstance(payload, Tensor):
        return payload.nbytes
    return sum(map(values_bytes, payload)) if isinstance(payload, tuple) else 0


def body_bytes(tensors: Sequence[Tensor]) -> int:
    """Of some tensors, one after the other."""
    return sum(padded(tensor.nbytes) for tensor in tensors)


def padded(n_bytes: int) -> int:
    """Bytes up to the next place where a tensor may begin."""
    return -(-n_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; of its own memory if it is contiguous."""
    array: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def unpack(header: bytes, body: Any) -> Any:
    """The value, whose tensors lie in ``body``, a writable buffer."""
    tree, shapes = json.loads(header)
    return built(tree, shapes, body)


def built(tree: Any, shapes: Sequence[Any], body: Any) -> Any:
    """The same of a header that has been read."""
    tensors, at = [], 0
    for name, shape in shapes:
        dtype, numel = DTYPES[name], math.prod(shape)
        tensor = torch.empty(0, dtype=dtype)
        if numel > 0:
            tensor = torch.frombuffer(body, dtype=dtype, count=numel, offset=at)
        tensors.append(tensor.view(shape))
        at += padded(tensor.nbytes)
    return _value(tree, tensors)


def _tree(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"t": len(tensors) - 1}
    if isinstance(value, Boxed):
        tensors.append(value.flat)
        return {"b": _written(value.boxes), "t": len(tensors) - 1}
    if isinstance(value, Rows):
        tensors += value[1:]
        return {"r": _written((value.box,)), "t": len(tensors) - 2}
    if isinstance(value, Mixed):
        return {"m": [_tree(part, tensors) for part in (value.whole, *value.rows)]}
    if isinstance(value, tuple):
        name = type(value).__name__
        return [name if name in messages.KINDS else "", *(_tree(item, tensors) for item in value)]
    if isinstance(value, list):
        return ["[", *(_tree(item, tensors) for item in value)]
    if isinstance(value, dict):
        return {"d": [[_tree(key, tensors), _tree(item, tensors)] for key, item in value.items()]}
    assert value is None or isinstance(value, int | float | str), value
    return value


def _value(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, list):
        name, items = tree[0], [_value(item, tensors) for item in tree[1:]]
        return items if name == "[" else messages.KINDS[name](*items) if name else tuple(items)
    if isinstance(tree, dict):
        if "b" in tree:
            return Boxed(_read(tree["b"]), tensors[tree["t"]])
        if "r" in tree:
            (box,), at = _read(tree["r"]), tree["t"]
            return Rows(box, tensors[at], tensors[at + 1])
        if "m" in tree:
            whole, *rows = (_value(part, tensors) for part in tree["m"])
            return Mixed(whole, tuple(rows))
        if "t" in tree:
            return tensors[tree["t"]]
        return {_value(key, tensors): _value(item, tensors) for key, item in tree["d"]}
    return tree


@lru_cache(maxsize=64)
def _written(boxes: tuple[Box, ...]) -> str:
    return json.dumps(boxes, separators=(",", ":"))


@lru_cache(maxsize=64)
def _read(written: str) -> tuple[Box, ...]:
    return tuple((number, tuple(start), tuple(shape)) for number, start, shape in json.loads(written))
