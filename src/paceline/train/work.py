"""What a run learns from, piece after piece: its steps, shares of them, or rounds of clients."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from paceline.data.client_loader import ClientLoader
from paceline.data.loader import STEPS_AHEAD, Loader, MicroBatches, Place
from paceline.data.rows import Row
from paceline.errors import NonFiniteError
from paceline.objectives.base import Batch
from paceline.plan.layout import data_rank
from paceline.sync.base import Claiming, Serving, Share
from paceline.train.assemble import Parts
from paceline.train.diagnose import locate
from paceline.train.remote import RemoteClients
from paceline.train.round import train_round
from paceline.train.step import StepResult, train_step


class Position(NamedTuple):
    """How far a run has come: so many steps (or rounds), with so many sequences, have been learned from."""

    step: int
    sequences: int


class Done(NamedTuple):
    """A piece that was learned from."""

    result: StepResult
    sequences: int
    """In it, over the replicas that learned from it together."""
    at: Position
    """After the piece, which is what is told of it."""
    reached: Position
    """Up to where all replicas have come: weights are measured and saved there."""
    pace: float = 1.0
    """The speed of the run, in that of what was learned here."""


class Work(Protocol):
    """Pieces come one after the other; all ranks of a replica have the same."""

    def next(self, done: Position) -> Position:
        """Where the next piece begins, with the number of its step: the rate goes by that."""
        ...

    def learn(self, done: Position, *, rate: float, stop: bool) -> Done:
        """Learn from it. ``rate``: as a share of its peak; ``stop``: this rank was asked to stop.

        Raises ``NonFiniteError``, before weights change, if it went bad.
        """
        ...


def work_of(parts: Parts) -> Work:
    """What this run learns from."""
    if isinstance(parts.loader, ClientLoader | RemoteClients):
        return Rounds(parts, parts.loader)
    if isinstance(parts.sync, Claiming):
        return Shares(parts, parts.loader, parts.sync)
    return Steps(parts, parts.loader)


class Steps:
    """Each replica has its part of every step."""

    def __init__(self, parts: Parts, loader: Loader) -> None:
        self._parts, self._loader = parts, loader

    def next(self, done: Position) -> Position:
        """The step after those that are done."""
        return Position(done.step + 1, done.sequences)

    def learn(self, done: Position, *, rate: float, stop: bool) -> Done:
        """Learn from it; on to where the others are, if they have learned without this replica meanwhile."""
        parts, step = self._parts, done.step + 1
        sequences = parts.batches.at(step).sequences
        result = _train(parts, self._loader.batch(step, done.sequences), step, stop)
        at = Position(step, done.sequences + sequences)
        if isinstance(parts.sync, Serving) and parts.sync.at > step:
            at = Position(parts.sync.at, at.sequences + parts.batches.sequences(step + 1, parts.sync.at))
        return Done(result, sequences, at, reached=at)


class Shares:
    """Each replica takes what is next."""

    def __init__(self, parts: Parts, loader: Loader, sync: Claiming) -> None:
        self._parts, self._loader, self._sync = parts, loader, sync
        self._claimed: Sequence[Share] = ()

    def next(self, done: Position) -> Position:
        """The step of the share that this replica claims."""
        self._claimed = self._sync.claim(done.step, self._parts.built.replica)[: STEPS_AHEAD + 1]
        return Position(*self._place(done, self._claimed[0])[:2])

    def learn(self, done: Position, *, rate: float, stop: bool) -> Done:
        """Learn from it; the run has come to where all have met."""
        parts, batches, claimed = self._parts, self._parts.batches, self._claimed
        rows = self._loader.at([self._place(done, share) for share in claimed])
        step, first, _ = self._place(done, claimed[0])
        result = _train(parts, rows, step, stop)
        whole, met = batches.at(step).sequences, self._sync.at
        return Done(
            result,
            len(range(claimed[0].part, whole, parts.config.all_replicas)),
            Position(step, first + whole),
            reached=Position(met, done.sequences + batches.sequences(done.step + 1, met)),
            pace=self._sync.pace,
        )

    def _place(self, done: Position, share: Share) -> Place:
        """Where a share begins, and whose rows it has."""
        world = self._parts.world
        first = done.sequences + self._parts.batches.sequences(done.step + 1, share.step - 1)
        return Place(share.step, first, data_rank(share.part, world.group_sizes, world.mesh.shard.index))


class Rounds:
    """In each round some clients learn, here or as processes of their own."""

    def __init__(self, parts: Parts, loader: ClientLoader | RemoteClients) -> None:
        self._parts, self._loader = parts, loader
        self._sync: Any = parts.sync

    def next(self, done: Position) -> Position:
        """The round after those that are done."""
        return Position(done.step + 1, done.sequences)

    def learn(self, done: Position, *, rate: float, stop: bool) -> Done:
        """Let its clients learn."""
        built, loader, step = self._parts.built, self._loader, done.step + 1
        if isinstance(loader, RemoteClients):
            result, rows = loader.train_round(built.replica, self._sync, step=step, rate=rate)
        else:
            batch_of = partial(_batch, self._parts)
            result = train_round(built.replica, self._sync, built.schedule, loader, batch_of, step=step, stop=stop)
            rows = loader.rounds.at(step).rows
        at = Position(step, done.sequences + rows)
        return Done(result, rows, at, reached=at)


def _batch(parts: Parts, rows: Sequence[Row], number: int) -> Batch:
    return parts.built.split(parts.objective.batch(rows, seed=parts.config.seed, step=number))


def _train(parts: Parts, rows: MicroBatches, step: int, stop: bool) -> StepResult:
    """A step with the rows of this rank; what is not finite in it is found."""
    built = parts.built
    batches = [_batch(parts, micro, step) for micro in rows]
    try:
        with parts.rate.measuring():
            return train_step(built.replica, parts.sync, built.schedule, batches, step=step, stop=stop)
    except NonFiniteError as error:
        where = f"replica {parts.world.coordinates.replica}, rank {parts.world.coordinates.rank}"
        device_batches = [batch.to(parts.world.device.torch_device) for batch in batches]
        drawing = partial(built.drawing, step)
        raise locate(error, built.model, built.replica, parts.objective, device_batches, where, drawing) from None
