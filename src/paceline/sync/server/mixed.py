"""The store of a shard some of whose parameters are tables: of these pushes and pulls name rows."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.optim.base import OptimizerConfig
from paceline.sync.server.codec import Boxed, Mixed, Rows
from paceline.sync.server.place import Box, Piece
from paceline.sync.server.shard import Gradient
from paceline.sync.server.store import Delay, TensorStore
from paceline.sync.server.table import Before, Table


def store(
    pieces: Sequence[Piece],
    ndims: Mapping[str, int],
    optimizer: OptimizerConfig,
    dtype: torch.dtype,
    delay: Delay,
    names: Set[str] = frozenset(),
) -> "TensorStore | MixedStore":
    """The store of a shard: of parameters in ``names`` rows are pushed."""
    if names:
        return MixedStore(pieces, ndims, optimizer, dtype, delay, names)
    return TensorStore(pieces, ndims, optimizer, dtype, delay)


class _Copy(NamedTuple):
    """Of a version."""

    whole: Tensor
    tables: dict[str, Before]


class MixedStore:
    """A ``TensorStore``, and a ``Table`` for each parameter in ``names``, whose pieces here are rows of it."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        ndims: Mapping[str, int],
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        delay: Delay,
        names: Set[str],
    ) -> None:
        self.whole = TensorStore(pieces, ndims, optimizer, dtype, delay, apart=names)
        self._pieces, self._delay = pieces, delay
        self._names = names
        self._starts: dict[int, int] = {}
        """By the number of a piece: the row of its table with which it starts."""
        rows: dict[str, int] = {}
        for number, piece in enumerate(pieces):
            if piece.name in names:
                self._starts[number] = rows.get(piece.name, 0)
                rows[piece.name] = self._starts[number] + piece.shape[0]
        widths = {piece.name: piece.shape[1] for piece in pieces if piece.name in names}
        self.tables = {
            name: Table(name, torch.zeros(count * widths[name], dtype=dtype), widths[name], optimizer)
            for name, count in rows.items()
        }
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        """By table: the rows that are touched, each once, and their gradients."""

    def gather(self, gradients: Sequence[Gradient], *, measured: bool) -> float:
        """See ``Store``."""
        whole = []
        parts: dict[str, list[tuple[float, Rows, Tensor]]] = {}
        for gradient in gradients:
            base = gradient.base
            boxes = {rank: part.whole if isinstance(part, Mixed) else part for rank, part in gradient.parts.items()}
            whole.append(gradient._replace(parts=boxes, base=None if base is None else base.whole))
            for _, part in sorted(gradient.parts.items()):
                for rows in part.rows if isinstance(part, Mixed) else ():
                    values = self._compensated(rows, base)
                    parts.setdefault(self._pieces[rows.box[0]].name, []).append((gradient.weight, rows, values))
        squares = self.whole.gather(whole, measured=measured)
        self._sums = {name: self._sum_of(self.tables[name], some) for name, some in parts.items()}
        return squares + sum(float(values.square().sum()) for _, values in self._sums.values() if measured)

    def step(self, rate: float, scale: float) -> None:
        """See ``Store``."""
        self.whole.step(rate, scale)
        for name, (ids, gradients) in self._sums.items():
            self.tables[name].step(ids, gradients * scale if scale != 1.0 else gradients, rate)

    def copy(self) -> _Copy:
        """See ``Store``."""
        return _Copy(self.whole.copy(), {name: table.copy() for name, table in self.tables.items()})

    def release(self, copy: _Copy) -> None:
        """See ``Store``."""
        self.whole.release(copy.whole)
        for name, before in copy.tables.items():
            self.tables[name].release(before)

    def read(self, copy: _Copy | None, wanted: Any) -> list[Tensor]:
        """Boxes, then rows of boxes. ``wanted``: boxes, None or a key, a place, and boxes with the rows of each."""
        boxes, key, *_ = wanted
        values = self.whole.read(None if copy is None else copy.whole, (boxes, key))
        for box, ids in wanted[3] if len(wanted) > 3 else ():
            name, columns = self._pieces[box[0]].name, _columns(box)
            rows = self._rows(box, ids)
            if key is None:
                table = self.tables[name].read(rows, None if copy is None else copy.tables[name])
            else:
                table = self.tables[name].kept_values(key)[rows]
            values.append(table[:, columns])
        return values

    def fill(self, key: str | None, values: Boxed) -> None:
        """Set parameters (None), or what the optimizer keeps, before the first step."""
        rest: list[tuple[Box, Tensor]] = []
        for box, part in _parts(values):
            piece = self._pieces[box[0]]
            if piece.name not in self._names:
                rest.append((box, part))
                continue
            table = self.tables[piece.name]
            target = table.values if key is None else table.kept_values(key).clone()
            target[self._rows(box, None), _columns(box)] = part.view(box[2])
            if key is not None:
                table.fill(key, target)
        if rest:
            self.whole.fill(key, Boxed(tuple(box for box, _ in rest), torch.cat([part for _, part in rest])))

    def kept(self) -> dict[str, dict[str, Any]]:
        """What the optimizer keeps of each parameter: None for a tensor like it, else the number and its dtype."""
        return {**self.whole.kept(), **{name: kept for name, table in self.tables.items() if (kept := table.kept())}}

    def set_scalars(self, scalars: Mapping[str, Mapping[str, tuple[float, str]]]) -> None:
        """Set the numbers that the optimizer keeps, before the first step."""
        self.whole.set_scalars(scalars)
        for name, table in self.tables.items():
            for key, (value, dtype) in scalars.get(name, {}).items():
                table.set_number(key, torch.tensor(value, dtype=getattr(torch, dtype)))

    def save(self, copies: Mapping[int, _Copy]) -> dict[str, Any]:
        """Everything, as plain values and tensors in memory of their own."""
        numbers = list(self.tables)
        tables = [
            (version, numbers.index(name), self.tables[name].read(None, before))
            for version, copy in copies.items()
            for name, before in copy.tables.items()
        ]
        return {
            "whole": self.whole.save({version: copy.whole for version, copy in copies.items()}),
            "copies": tables,
            "tables": [table.save() for table in self.tables.values()],
        }

    def load(self, saved: Mapping[str, Any]) -> Mapping[int, _Copy]:
        """As saved."""
        whole = self.whole.load(saved["whole"])
        names = list(self.tables)
        for table, state in zip(self.tables.values(), saved["tables"], strict=True):
            table.load(state)
        befores: dict[int, dict[str, Before]] = {version: {} for version in whole}
        for version, number, values in saved["copies"]:
            befores[version][names[number]] = self.tables[names[number]].loaded_copy(values)
        return {version: _Copy(flat, befores[version]) for version, flat in whole.items()}

    def _rows(self, box: Box, ids: Tensor | None) -> Tensor:
        """Rows of the table, of those of a box."""
        number, start, shape = box
        first = self._starts[number] + start[0]
        return torch.arange(first, first + shape[0]) if ids is None else ids.long() + first

    def _compensated(self, rows: Rows, base: _Copy | None) -> Tensor:
        if base is None or self._delay.kind == "none":
            return rows.values
        name, ids, columns = self._pieces[rows.box[0]].name, self._rows(rows.box, rows.ids), _columns(rows.box)
        table = self.tables[name]
        moved = (table.read(ids) - table.read(ids, base.tables[name]))[:, columns]
        return rows.values + self._delay.strength * rows.values.square() * moved

    def _sum_of(self, table: Table, parts: Sequence[tuple[float, Rows, Tensor]]) -> tuple[Tensor, Tensor]:
        """In the order of the workers, as whole parameters are summed."""
        numbers = [self._rows(rows.box, rows.ids) for _, rows, _ in parts]
        ids = torch.unique(torch.cat(numbers))
        total = table.values.new_zeros(len(ids), table.values.shape[1])
        for own, (weight, rows, values) in zip(numbers, parts, strict=True):
            at, columns = torch.searchsorted(ids, own), _columns(rows.box)
            total[at, columns] += weight * values  # no row twice in one part
        return ids, total


def _columns(box: Box) -> slice:
    _, start, shape = box
    return slice(start[1], start[1] + shape[1])


def _parts(values: Boxed) -> Iterator[tuple[Box, Tensor]]:
    at = 0
    for box in values.boxes:
        numel = int(torch.Size(box[2]).numel())
        yield box, values.flat[at : at + numel]
        at += numel
