"""The shapes of what stages hand on, known from the shapes of a micro-batch's inputs.

They are seen when a micro-batch of a new shape is run forward once, and told from what was seen as soon as that settles
them: every dimension is a number, or a fixed part of a dimension of the inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
"""Dtypes that a stage can hand on; a header names one by its place here."""

HEADER_TENSORS, HEADER_DIMS = 16, 6
"""The most tensors that a stage can hand on, and their most dimensions."""


@dataclass(frozen=True)
class Wire:
    """One tensor that goes from a stage to the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        """Memory to receive it in."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


Wires = tuple[Wire, ...]
Signature = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of each input that is a tensor."""


def wires_of(tensors: Sequence[Tensor]) -> Wires:
    """What is sent."""
    return tuple(Wire(tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def signature_of(inputs: Mapping[str, Tensor | bool]) -> Signature:
    """What shapes are told from."""
    return tuple((name, tuple(value.shape)) for name, value in sorted(inputs.items()) if isinstance(value, Tensor))


def header(wires: Wires) -> Tensor:
    """Shapes and dtypes as numbers: int64, always of the same length."""
    assert len(wires) <= HEADER_TENSORS and all(len(wire.shape) <= HEADER_DIMS for wire in wires), wires
    rows = [[DTYPES.index(w.dtype), len(w.shape), *w.shape, *[0] * (HEADER_DIMS - len(w.shape))] for w in wires]
    rows += [[0] * (2 + HEADER_DIMS)] * (HEADER_TENSORS - len(wires))
    return torch.tensor([len(wires), *[number for row in rows for number in row]])


def empty_header() -> Tensor:
    """Memory to receive one in, on the CPU."""
    return header(())


def read_header(numbers: Sequence[int]) -> Wires:
    """The inverse of ``header``."""
    count, *rest = numbers
    rows = [rest[i : i + 2 + HEADER_DIMS] for i in range(0, count * (2 + HEADER_DIMS), 2 + HEADER_DIMS)]
    return tuple(Wire(tuple(row[2 : 2 + row[1]]), DTYPES[row[0]]) for row in rows)


class Shapes:
    """What one rank has seen of the borders of its stages."""

    def __init__(self) -> None:
        self._seen: list[tuple[Signature, tuple[Wires, ...]]] = []

    def see(self, signature: Signature, borders: tuple[Wires, ...]) -> None:
        """Remember what went over each border for such inputs."""
        self._seen.append((signature, borders))

    def tell(self, signature: Signature) -> tuple[Wires, ...] | None:
        """What will go over each border for such inputs; None if that cannot be told yet.

        A size of the inputs that is new has to have changed before: then what does not follow it is known to be free of
        it.
        """
        alike = [(sizes_of(s), borders) for s, borders in self._seen if kinds_of(s) == kinds_of(signature)]
        inputs, new = [sizes for sizes, _ in alike], sizes_of(signature)
        if not alike or any(size != inputs[0][i] and len({s[i] for s in inputs}) == 1 for i, size in enumerate(new)):
            return None
        told = []
        for seen in zip(*(borders for _, borders in alike), strict=True):
            if len({tuple((wire.dtype, len(wire.shape)) for wire in wires) for wires in seen}) > 1:
                return None
            wires = [_told_wire(column, inputs, new) for column in zip(*seen, strict=True)]
            if None in wires:
                return None
            told.append(tuple(wire for wire in wires if wire is not None))
        return tuple(told)


def sizes_of(signature: Signature) -> tuple[int, ...]:
    """All sizes, one after the other."""
    return tuple(size for _, shape in signature for size in shape)


def kinds_of(signature: Signature) -> tuple[tuple[str, int], ...]:
    """Names and numbers of dimensions."""
    return tuple((name, len(shape)) for name, shape in signature)


def _told_wire(seen: Sequence[Wire], inputs: Sequence[tuple[int, ...]], new: tuple[int, ...]) -> Wire | None:
    sizes = [_told_size(values, inputs, new) for values in zip(*(wire.shape for wire in seen), strict=True)]
    return None if None in sizes else Wire(tuple(size for size in sizes if size is not None), seen[0].dtype)


def _told_size(values: Sequence[int], inputs: Sequence[tuple[int, ...]], new: tuple[int, ...]) -> int | None:
    """A size that was ``values`` with these sizes of the inputs; None if what explains it does not agree on one."""
    found = {values[0]} if len(set(values)) == 1 else set()
    for i, size in enumerate(new):
        parts = {
            before[i] // value if before[i] % value == 0 else 0 for before, value in zip(inputs, values, strict=True)
        }
        part = parts.pop()
        if part and not parts and size % part == 0:
            found.add(size // part)
    return found.pop() if len(found) == 1 else None
