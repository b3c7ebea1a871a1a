"""One rank's tensors on their way to the servers and back, by the boxes of its layout."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from paceline.comm.boxes import Part
from paceline.errors import LinkError, TrainError
from paceline.sync.server import messages as m
from paceline.sync.server.ask import Caller
from paceline.sync.server.client import Client
from paceline.sync.server.codec import Boxed, Mixed, Rows, padded
from paceline.sync.server.place import Box, Cuts, Places
from paceline.sync.server.rules import Rules
from paceline.sync.server.store import Delay
from paceline.sync.server.wire import SharedMemory

_ID = torch.int32
ROW_BYTES = _ID.itemsize
"""Of the number of a row."""


class Channel:
    """Pushes and pulls local tensors, each the ``held`` part of its parameter (None: all of it).

    ``tables``: parameters of which only rows that a step touched are pushed. ``shared``: servers are on this machine,
    and tensors go through memory that both map. A push lies there until the worker's next pull: by then every shard has
    done with it, for what was pulled has it in, or it was dropped.
    """

    def __init__(
        self,
        caller: Caller,
        places: Places,
        held: Mapping[str, Part | None],
        *,
        dtype: torch.dtype,
        worker: int,
        rank: int,
        rules: Rules,
        shared: bool,
    ) -> None:
        self._caller, self.places, self._held, self._dtype = caller, places, held, dtype
        self._worker, self._rank, self._rules = worker, rank, rules
        self._cuts_of: dict[tuple[str, ...], list[Cuts]] = {}
        self.client = Client(worker, 1, rank, shards=rules.shards, staleness=self._staleness)
        self.tables = frozenset(held) & places.tables
        self.pushed_rows = self.all_rows = 0
        """Of tables: how many were pushed, and how many there were."""
        sizes = [self._most_bytes(shard) for shard in range(rules.shards)]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._memory = SharedMemory(2 * self._starts[-1]) if shared else None
        self._plain = torch.empty(0 if shared else self._starts[-1], dtype=torch.uint8)

    @property
    def _staleness(self) -> int | None:
        return self._rules.bound

    def set_up(self, life: int, *, optimizer: Mapping[str, Any], delay: Delay, lease_s: float | None = None) -> None:
        """Let every server begin anew: nothing of what was before is left. One rank of all calls it.

        ``lease_s``: after so long without a connection a worker is given up; None for never.
        """
        options = {
            "rules": asdict(self._rules),
            "shapes": {name: list(shape) for name, shape in self.places.shapes.items()},
            "largest_bytes": self.places.largest_bytes,
            "dtype": str(self._dtype).removeprefix("torch."),
            "optimizer": dict(optimizer),
            "delay": asdict(delay),
            "tables": sorted(self.places.tables),
            "lease_s": lease_s,
        }
        self._to_all(lambda _: m.Setup(life, options))

    def fill(self, key: str | None, tensors: Mapping[str, Tensor]) -> None:
        """Set this rank's part of some parameters, or of what the optimizer keeps by a key."""
        cuts = self._cuts(list(tensors))
        self._to_all(lambda shard: m.Fill(key, Boxed(cuts[shard].boxes, _gathered(tensors, cuts[shard], self._dtype))))

    def ready(self, scalars: Mapping[str, Mapping[str, Any]]) -> None:
        """All ranks have filled theirs."""
        self._to_all(lambda _: m.Ready(dict(scalars)))

    def told(self) -> list[dict[str, Any]]:
        """What each server says of itself."""
        return [answer.payload for answer in self._to_all(lambda _: m.Ask())]  # type: ignore[union-attr]

    def join_as(self, life: int) -> None:
        """Speak with a new life from here on."""
        self.client = Client(self._worker, life, self._rank, shards=self._rules.shards, staleness=self._staleness)

    def join(self, life: int) -> Client:
        """As the leader of this worker."""
        self.join_as(life)
        if self._rank == 0:
            self._caller.run(self.client.join())
        return self.client

    def stage(self, number: int, gradients: Mapping[str, Tensor], touched: Mapping[str, Tensor] | None = None) -> None:
        """Give every shard its part of this rank's gradients.

        ``touched``: by table, the rows of the whole that may have a gradient, ascending; None for all. ``TrainError``
        if others have one.
        """
        tables = {name: gradients[name] for name in gradients if name in self.tables}
        cuts = self._cuts([name for name in gradients if name not in tables])
        row_cuts = self._cuts(list(tables))
        payloads: list[Any] = []
        pushed = dict.fromkeys(tables, 0)
        for shard, own in enumerate(cuts):
            buffer = _Buffer(self._part(shard, pulled=False))
            flat = buffer.take((own.numel,), self._dtype)
            for name, slot, values in own.split(flat):
                values.copy_(gradients[name][slot])
            if not tables:
                payloads.append(Boxed(own.boxes, flat))
                continue
            rows = []
            for (name, slot), box in zip(row_cuts[shard].slots, row_cuts[shard].boxes, strict=True):
                own_rows = None if touched is None else self._within(shard, box, touched[name])
                rows.append(_with_gradient(tables[name][slot], box, own_rows, buffer, self._dtype))
                pushed[name] += int(torch.count_nonzero(rows[-1].values))
                self.pushed_rows += len(rows[-1].ids)
                self.all_rows += box[2][0]
            payloads.append(Mixed(Boxed(own.boxes, flat), tuple(rows)))
        for name, table in tables.items():
            _check_all_pushed(name, table, pushed[name])
        bodies = None
        if self._memory is not None:
            bodies = [self._memory.place(self._starts[shard]) for shard in range(len(cuts))]
        self._caller.run(self.client.stage(number, payloads), bodies=bodies)

    @torch.no_grad()
    def pull(
        self,
        granted: m.Granted,
        into: Mapping[str, Tensor],
        key: str | None = None,
        *,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fill local tensors with the version that was granted, or with what the optimizer keeps by a key.

        ``rows``: by table, those of the whole that are wanted, ascending; of other tables in ``into`` none is pulled.
        None for all rows of all.
        """
        tables = [name for name in into if name in self.tables and (rows is None or name in rows)]
        cuts, row_cuts = self._cuts([name for name in into if name not in self.tables]), self._cuts(tables)
        wanted: list[Any] = []
        for shard, own in enumerate(cuts):
            some = []
            for (name, _), box in zip(row_cuts[shard].slots, row_cuts[shard].boxes, strict=True):
                some.append((box, None if rows is None else self._within(shard, box, rows[name])))
            place = None
            if self._memory is not None:
                place = self._memory.place(self._starts[-1] + self._starts[shard])
            wanted.append((own.boxes, key, place, tuple(some)))
        parts = self._caller.run(self.client.pull(granted, wanted))
        for shard, (own, part) in enumerate(zip(cuts, parts, strict=True)):
            counts = [box[2][0] if ids is None else len(ids) for box, ids in wanted[shard][3]]
            total = own.numel + sum(n * box[2][1] for n, (box, _) in zip(counts, wanted[shard][3], strict=True))
            if part is None:
                flat = _Buffer(self._part(shard, pulled=True)).take((total,), self._dtype)
            else:
                flat = torch.cat([values.reshape(-1) for values in part]) if part else torch.empty(0)
            for name, slot, values in own.split(flat):
                into[name][slot] = values
            at = own.numel
            for (name, slot), (box, ids), count in zip(row_cuts[shard].slots, wanted[shard][3], counts, strict=True):
                values = flat[at : at + count * box[2][1]].view(count, box[2][1])
                at += values.numel()
                local = into[name][slot]
                local[slice(None) if ids is None else ids.long().to(local.device)] = values.to(local.device)

    def close(self) -> None:
        """Let its memory go."""
        if self._memory is not None:
            self._memory.close()

    def _most_bytes(self, shard: int) -> int:
        """Of a shard's part of a push or a pull."""
        itemsize = self._dtype.itemsize
        whole = self._cuts([name for name in self._held if name not in self.tables])[shard]
        tables = self._cuts(sorted(self.tables))[shard]
        ids = sum(padded(_ID.itemsize * shape[0]) for _, _, shape in tables.boxes)
        values = sum(padded(itemsize * shape[0] * shape[1]) for _, _, shape in tables.boxes)
        return padded(itemsize * whole.numel) + ids + values

    def _part(self, shard: int, *, pulled: bool) -> Tensor:
        """Bytes of a shard's part of a push or a pull."""
        low, high = self._starts[shard : shard + 2]
        if self._memory is None:
            return self._plain[low:high]
        return self._memory.tensor(low + pulled * self._starts[-1], high - low, torch.uint8)

    def _within(self, shard: int, box: Box, rows: Tensor) -> Tensor:
        """Of ascending rows of the whole those in a box, counted from where it starts."""
        number, start, shape = box
        first = self.places.pieces[shard][number].start[0] + start[0]
        low, high = torch.searchsorted(rows, torch.tensor([first, first + shape[0]])).tolist()
        return (rows[low:high] - first).to(_ID)

    def _cuts(self, names: Sequence[str]) -> list[Cuts]:
        key = tuple(names)
        if key not in self._cuts_of:
            self._cuts_of[key] = [self.places.cuts(self._held, key, shard) for shard in range(self.places.shards)]
        return self._cuts_of[key]

    def _to_all(self, request: Callable[[int], m.Request]) -> list[m.Answer]:
        answers = self._caller.ask([(shard, request(shard)) for shard in range(self.places.shards)])
        for answer in answers:
            if isinstance(answer, m.Refused):
                raise LinkError(f"the parameter server refused: {answer.reason}")
        return answers


class _Buffer:
    """Memory of which one tensor after the other is taken, as they lie in the body of a message."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._at = memory, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next one."""
        n_bytes = dtype.itemsize * math.prod(shape)
        taken = self._memory[self._at : self._at + n_bytes].view(dtype).view(shape)
        self._at += padded(n_bytes)
        return taken


def _with_gradient(gradient: Tensor, box: Box, rows: Tensor | None, buffer: _Buffer, dtype: torch.dtype) -> Rows:
    """Of the gradient of a box (R, C) the rows that have any, among some."""
    some = gradient if rows is None else gradient[rows.long().to(gradient.device)]
    has = (some != 0).any(1).nonzero().view(-1)
    ids = has.cpu() if rows is None else rows[has.cpu()]
    pushed = Rows(box, buffer.take((len(ids),), _ID), buffer.take((len(ids), box[2][1]), dtype))
    pushed.ids.copy_(ids)
    pushed.values.copy_(some[has])
    return pushed


def _check_all_pushed(name: str, gradient: Tensor, pushed: int) -> None:
    """That no row has a gradient which was not looked up, and so was not up to date."""
    if (count := int(torch.count_nonzero(gradient))) != pushed:
        raise TrainError(
            f"sync=parameter_server, sparse=true: {count - pushed} values of {name} have a gradient in rows of no "
            "token of the batch: this model does more with its table than look tokens up. Use sparse=false"
        )


def _gathered(tensors: Mapping[str, Tensor], cuts: Cuts, dtype: torch.dtype) -> Tensor:
    flat = torch.empty(cuts.numel, dtype=dtype)
    for name, slot, values in cuts.split(flat):
        values.copy_(tensors[name][slot])
    return flat
