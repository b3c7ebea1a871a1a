"""One rank's tensors on their way to the servers and back, by the boxes of its layout."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from paceline.comm.boxes import Part
from paceline.errors import LinkError
from paceline.sync.server import messages as m
from paceline.sync.server.ask import Caller
from paceline.sync.server.client import Client
from paceline.sync.server.codec import Boxed, padded
from paceline.sync.server.coordinator import Rules
from paceline.sync.server.place import Cuts, Places
from paceline.sync.server.store import Delay
from paceline.sync.server.wire import SharedMemory


class Channel:
    """Pushes and pulls local tensors, each the ``held`` part of its parameter (None: all of it).

    ``shared``: servers are on this machine, and tensors go through memory that both map. A push lies there until the
    worker's next pull: by then every shard has done with it, for what was pulled has it in, or it was dropped.
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
        self._caller, self._places, self._held, self._dtype = caller, places, held, dtype
        self._worker, self._rank, self._rules = worker, rank, rules
        self._cuts_of: dict[tuple[str, ...], list[Cuts]] = {}
        self.client = Client(worker, 1, rank, shards=rules.shards, staleness=self._staleness)
        sizes = [padded(cuts.numel * dtype.itemsize) for cuts in self._cuts(list(held))]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._memory = SharedMemory(2 * self._starts[-1]) if shared else None
        self._plain = torch.empty(0 if shared else self._starts[-1] // dtype.itemsize, dtype=dtype)

    @property
    def _staleness(self) -> int | None:
        return self._rules.bound

    def set_up(self, life: int, *, optimizer: Mapping[str, Any], delay: Delay) -> None:
        """Let every server begin anew: nothing of what was before is left. One rank of all calls it."""
        options = {
            "rules": asdict(self._rules),
            "shapes": {name: list(shape) for name, shape in self._places.shapes.items()},
            "largest_bytes": self._places.largest_bytes,
            "dtype": str(self._dtype).removeprefix("torch."),
            "optimizer": dict(optimizer),
            "delay": asdict(delay),
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

    def join(self, life: int) -> Client:
        """As the leader of this worker."""
        self.client = Client(self._worker, life, self._rank, shards=self._rules.shards, staleness=self._staleness)
        if self._rank == 0:
            self._caller.run(self.client.join())
        return self.client

    def stage(self, number: int, gradients: Mapping[str, Tensor]) -> None:
        """Give every shard its part of this rank's gradients."""
        cuts = self._cuts(list(gradients))
        payloads, bodies = [], []
        for shard, own in enumerate(cuts):
            flat = self._buffer(shard, own.numel, pulled=False)
            for name, slot, values in own.split(flat):
                values.copy_(gradients[name][slot])
            payloads.append(Boxed(own.boxes, flat))
            if self._memory is not None:
                bodies.append(self._memory.place(self._starts[shard]))
        self._caller.run(self.client.stage(number, payloads), bodies=bodies or None)

    @torch.no_grad()
    def pull(self, granted: m.Granted, into: Mapping[str, Tensor], key: str | None = None) -> None:
        """Fill local tensors with the version that was granted, or with what the optimizer keeps by a key."""
        cuts = self._cuts(list(into))
        places = [
            self._memory.place(self._starts[-1] + self._starts[shard]) if self._memory is not None else None
            for shard in range(len(cuts))
        ]
        wanted = [(own.boxes, key, place) for own, place in zip(cuts, places, strict=True)]
        parts = self._caller.run(self.client.pull(granted, wanted))
        for shard, (own, part) in enumerate(zip(cuts, parts, strict=True)):
            if part is None:
                flat = self._buffer(shard, own.numel, pulled=True)
            else:
                flat = torch.cat([values.reshape(-1) for values in part]) if part else torch.empty(0)
            for name, slot, values in own.split(flat):
                into[name][slot] = values

    def close(self) -> None:
        """Let its memory go."""
        if self._memory is not None:
            self._memory.close()

    def _buffer(self, shard: int, numel: int, *, pulled: bool) -> Tensor:
        if self._memory is None:
            return self._plain[self._starts[shard] // self._dtype.itemsize :][:numel]
        return self._memory.tensor(self._starts[shard] + pulled * self._starts[-1], numel, self._dtype)

    def _cuts(self, names: Sequence[str]) -> list[Cuts]:
        key = tuple(names)
        if key not in self._cuts_of:
            self._cuts_of[key] = [self._places.cuts(self._held, key, shard) for shard in range(self._places.shards)]
        return self._cuts_of[key]

    def _to_all(self, request: Callable[[int], m.Request]) -> list[m.Answer]:
        answers = self._caller.ask([(shard, request(shard)) for shard in range(self._places.shards)])
        for answer in answers:
            if isinstance(answer, m.Refused):
                raise LinkError(f"the parameter server refused: {answer.reason}")
        return answers


def _gathered(tensors: Mapping[str, Tensor], cuts: Cuts, dtype: torch.dtype) -> Tensor:
    flat = torch.empty(cuts.numel, dtype=dtype)
    for name, slot, values in cuts.split(flat):
        values.copy_(tensors[name][slot])
    return flat
