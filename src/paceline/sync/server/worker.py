"""A replica as a worker of parameter servers: what happens in a step, and how it joins, is given up and comes back."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paceline.comm.replica import Finish, Remote, Replica
from paceline.config import strategy_name
from paceline.errors import PlanError
from paceline.sync.base import NOTHING, SyncContext, SyncState, check_equal_start, start_total
from paceline.sync.served import Servers, as_remote, owned
from paceline.sync.server import messages as m
from paceline.sync.server.channel import Channel
from paceline.sync.server.client import GivenUp
from paceline.sync.server.contents import fetch_state, fill, full_shapes
from paceline.sync.server.rules import Rules
from paceline.sync.server.store import Delay

if TYPE_CHECKING:
    from paceline.sync.parameter_server import ParameterServer


class ParameterServerSync:
    """One rank of a worker."""

    def __init__(self, options: "ParameterServer", context: SyncContext) -> None:
        self._options, self._context, self._link = options, context, context.link
        self._servers: Servers
        self._channel: Channel | None = None
        self._life = self._number = self._counted = 0
        self._is_open = False
        self._step = self._count = 0
        self._granted: m.Granted
        self._touched: dict[str, Tensor] | None = None
        """By table: the rows that are as the granted version has them, ascending; None for all of all tables."""
        self._stop: int | None = None
        self._asked = False
        self.at = 0
        """The step after which this replica goes on: later than 0 if others have learned without it."""

    def start(self, replica: Replica) -> None:
        """Find the servers: those that were started, or threads of the first. Check that replicas start equal, or join
        those that have learned without this one."""
        if self._link.size == 1:
            return
        self._device = replica.shards[0].local.device if replica.shards else torch.device("cpu")
        self._servers = Servers(self._context, self._options.servers, self._options.timeout_s)
        if self._context.servers and self._options.lease_s is not None and self._comes_back(as_remote(replica)):
            return
        check_equal_start(self._link, replica)
        self._servers.find(as_remote(replica))

    def fetch(self, replica: Replica, ids: Tensor) -> None:
        """Before a step: the rows that any rank of the replica looks up, as the version that was granted has them."""
        if self._channel is None or not self._is_open or not self._channel.places.tables or self._touched is None:
            return
        remote = as_remote(replica)
        lengths = {name: self._channel.places.shapes[name][0] for name in self._channel.places.tables}
        mask = torch.zeros(max(lengths.values()), dtype=torch.float64)
        mask[ids] = 1.0
        rows = remote.sum_of(mask).nonzero().view(-1)
        self._touched = {name: rows[rows < length] for name, length in lengths.items()}
        if self._given_up(remote, partial(self._pull, remote, self._touched)):
            self._go_on(remote, self._granted.clock, joins=True)
        self._count_sent()
        replica.refresh()

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """This replica's own targets: servers weigh its gradient by them."""
        if self._link.size > 1 and not self._is_open:
            self._open(as_remote(replica), step)
        self._step, self._count = step, count
        return count

    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """Servers have the sum of gradients. In lock step values are those of all replicas; else a replica's own, and
        all stop when they next meet."""
        if values is None:
            return NOTHING, False
        if self._link.size == 1:
            return values, stop
        if self._options.tells:
            return start_total(self._link, values, stop, self._device)()
        self._asked = stop
        return values, self._stop == self._step

    def update(self, replica: Replica) -> Finish:
        """Let servers take the step, and go on from what comes of it."""
        if self._link.size == 1:
            return replica.finish(vote=lambda wish: wish)
        remote = as_remote(replica)
        finish = remote.finish(vote=self._vote, step=lambda: self._exchange(remote))
        if finish.stepped and self._options.clips:
            return Finish(stepped=True, gradient_norm=self._granted.norm)
        return finish

    def is_agreed(self, step: int) -> bool:
        """In lock step always, unless rows are left where they were; else where all meet."""
        always = self._options.is_lock_step and not self._options.sparse
        return always or self._link.size == 1 or self._meets(step)

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """Where replicas meet they hold the same; in lock step, but for rows, everywhere."""
        return {shard.name: shard.local for shard in replica.shards}

    def state(self) -> Mapping[str, SyncState]:
        """All that outlives a step is the optimizer's, and saved as such."""
        return {}

    def restored(self) -> None:
        """Weights or the optimizer's state were set from outside: servers begin anew with these."""
        self._is_open = False

    def gather(self, replica: Replica) -> None:
        """Before a save: fill the replica's optimizer with what servers keep, and all rows."""
        if self._channel is not None and self._is_open and not self._meets(self._granted.clock):
            if self._channel.places.tables:
                self._pull(as_remote(replica), None)
                replica.refresh()
            fetch_state(self._channel, as_remote(replica), self._granted)

    def words(self) -> str | None:
        """How stale pushes were, of all replicas, and how many rows of tables this rank has pushed; None if nothing."""
        if self._channel is None:
            return None
        words = []
        if not self._options.is_lock_step:
            told = self._channel.told()[0]
            counts = ", ".join(f"{staleness}: {count:,}" for staleness, count in sorted(told["histogram"].items()))
            words.append(f"pushes by their staleness in versions: {counts}")
            if self._options.backups:
                words.append(f"pushes that came too late and were left out: {told['dropped']:,}")
        if self._channel.all_rows:
            pushed, every = self._channel.pushed_rows, self._channel.all_rows
            words.append(
                f"rows of the embedding pushed by the first rank: {pushed:,} of {every:,}; bytes it sent in all: "
                f"{self._servers.caller.sent_bytes:,}"
            )
        return "; ".join(words) or None

    def _vote(self, wish: bool) -> bool:
        """In lock step none steps if one must not; who runs at its own pace decides alone."""
        if not self._options.tells:
            return wish
        unwilling = torch.tensor([float(not wish)], dtype=torch.float64, device=self._device)
        self._link.all_reduce(unwilling).wait()
        return bool(unwilling == 0)

    @torch.no_grad()
    def _exchange(self, replica: Remote) -> None:
        assert self._channel is not None
        gradients = {shard.name: g for shard in owned(replica) if (g := shard.gradient) is not None}
        self._number += 1
        self._channel.stage(self._number, gradients, self._touched)
        replica.sum_of(torch.zeros(1))  # all ranks have staged
        clock = self._granted.clock
        client, rate = self._channel.client, replica.rate / replica.learns_by.lr
        commit = client.commit(self._number, clock=clock, targets=self._count, rate=rate, stop=self._asked)
        joins = self._given_up(replica, lambda: self._servers.caller.run(commit) if replica.is_first else None)
        self._go_on(replica, clock + 1, joins=joins)
        self._count_sent()
        if self._meets(self._granted.clock):
            fetch_state(self._channel, replica, self._granted)
            self._barrier(replica)

    def _go_on(
        self, replica: Remote, clock: int, *, joins: bool = False, whole: bool = False, meeting: int = 1
    ) -> None:
        """Wait for the weights of a clock; all ranks of the replica read one version.

        ``joins``: this worker was given up, and comes back first. ``whole``: with all rows, as where replicas meet.
        ``meeting``: for which time, if they do there.
        """
        assert self._channel is not None
        while True:
            if joins:
                self._join(replica, self._life + 1)
                clock, whole = max(clock, self._first_clock), True
            granted: m.Granted | None = None

            def turn(at: int = clock) -> None:
                nonlocal granted
                assert self._channel is not None
                if replica.is_first:
                    granted = self._servers.caller.run(self._channel.client.turn(at, meet=meeting * self._meets(at)))
                    if granted.clock > at and self._meets(granted.clock):  # where others wait for this one
                        turn(granted.clock)

            joins = self._given_up(replica, turn)
            if joins:
                continue
            self._granted = _told(replica, granted)
            self._stop = self._granted.stop
            whole = whole or self._meets(self._granted.clock)
            self._touched = None if whole or not self._channel.places.tables else {}
            joins = self._given_up(replica, partial(self._pull, replica, self._touched, others=True))
            if not joins:
                self.at = self._granted.clock
                return

    def _pull(self, replica: Remote, rows: Mapping[str, Tensor] | None, *, others: bool = False) -> None:
        """Rows of tables, None for all; with ``others`` all other parameters too."""
        assert self._channel is not None
        into = {s.name: s.local for s in replica.shards if others or s.name in self._channel.tables}
        self._channel.pull(self._granted, into, rows=rows)

    def _given_up(self, replica: Remote, act: Callable[[], object]) -> bool:
        """Do what servers may refuse to a worker that was given up; whether they did so to any rank."""
        if self._options.lease_s is None:
            act()
            return False
        refused = torch.zeros(1)
        try:
            act()
        except GivenUp:
            refused += 1.0
        return bool(replica.sum_of(refused) > 0)

    def _count_sent(self) -> None:
        """Of what was sent since the last time."""
        self._link.count(self._servers.caller.sent_bytes - self._counted)
        self._counted = self._servers.caller.sent_bytes

    def _meets(self, step: int) -> bool:
        """Whether all replicas wait for each other after a step, whatever the mode."""
        return step in {self._context.steps, self._stop} or self._context.meets(step)

    # Servers, and what they start from.

    def _make_channel(self, replica: Remote, first_clock: int) -> Channel:
        options, context = self._options, self._context
        shapes = full_shapes(replica, context.shapes)
        tables = context.lookups & shapes.keys() if options.sparse else frozenset()
        if options.sparse and not tables:
            raise PlanError(
                "sync=parameter_server, sparse=true: this model has no embedding that is learned and only looked up. "
                "It is frozen, or the output head too (tie_word_embeddings): use sparse=false"
            )
        rules = Rules(
            workers=self._link.size,
            shards=options.servers,
            mode=options.mode,
            staleness=options.staleness if options.mode == "stale" else 0,
            scaled=options.scale_rate,
            backups=options.backups,
            clip_norm=context.clip_norm,
            first_clock=first_clock,
        )
        return self._servers.channel(replica, rules, shapes, tables)

    def _open(self, replica: Remote, step: int) -> None:
        """Give servers the weights and the optimizer's state that replica 0 has, and join."""
        options = self._options
        self._stop = None
        if self._channel is not None:
            self._channel.close()
        self._channel = self._make_channel(replica, step - 1)
        strength = options.compensation_strength or {"constant": 0.04}.get(options.compensation, 2.0)
        delay = Delay(kind=options.compensation, strength=strength, decay=options.compensation_decay)
        life = self._life + 1
        if self._link.index == 0 and replica.is_first:
            learns_by = {"name": strategy_name(replica.learns_by), **replica.learns_by.model_dump(mode="json")}
            self._channel.set_up(life, optimizer=learns_by, delay=delay, lease_s=options.lease_s)
        self._barrier(replica)
        if self._link.index == 0:
            fill(self._channel, replica, owned(replica))
        self._barrier(replica)
        self._counted = self._servers.caller.sent_bytes
        self._is_open = True
        self._join(replica, life)
        self._go_on(replica, step - 1, whole=True)

    def _join(self, replica: Remote, life: int) -> None:
        """With a new life, ``life`` or later; all ranks hear where it goes on."""
        assert self._channel is not None
        told = torch.zeros(3)
        while replica.is_first:
            self._channel.join_as(life)
            try:
                joined = self._servers.caller.run(self._channel.client.join())
            except GivenUp:  # before it had joined
                life += 1
                continue
            told = torch.tensor([life, joined.number, joined.clock])
            break
        self._life, self._number, self._first_clock = map(int, replica.sum_of(told).tolist())
        self._channel.join_as(self._life)

    def _comes_back(self, replica: Remote) -> bool:
        """Join those that have learned without this replica, if there are any."""
        self._servers.find(replica)
        life = torch.zeros(1)
        if replica.is_first:
            (told,) = self._servers.caller.ask([(0, m.Ask())])
            assert isinstance(told, m.Done)
            life += told.payload["lives"].get(self._link.index, 0)
        self._life = int(replica.sum_of(life).item())
        if not self._life:
            return False
        self._channel = self._make_channel(replica, 0)
        self._is_open = True
        self._go_on(replica, 0, joins=True)
        replica.refresh()
        return True

    def _barrier(self, replica: Remote) -> None:
        """All ranks of all replicas are here; where some may be gone, those that are left."""
        if self._options.lease_s is not None and self._is_open:
            self._go_on(replica, self._granted.clock, meeting=2)
            return
        self._servers.barrier(replica)


def _told(replica: Remote, granted: m.Granted | None) -> m.Granted:
    """What the first rank was granted, on all ranks."""
    told = torch.zeros(7, dtype=torch.float64)
    if granted is not None:
        told = torch.tensor([-1.0 if value is None else float(value) for value in granted[:7]], dtype=torch.float64)
    clock, version, entry, floor, staleness, norm, stop = replica.sum_of(told).tolist()
    last = None if stop < 0 else int(stop)
    return m.Granted(int(clock), int(version), int(entry), int(floor), int(staleness), norm, last)
