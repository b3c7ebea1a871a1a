"""The parameter server's logic under thousands of made-up schedules, on one thread and without a clock or a socket.

    python tools/simulate.py --schedules 20000
    python tools/simulate.py --only 1234        # one of them, told message by message

A schedule is a seed: it says which message arrives next, which is lost or arrives twice, who asks again, when a
worker, a shard or the coordinator dies and comes back, and when a worker leaves, or is taken for dead and is not. After
every one all that a server promises is checked. The first that breaks a promise is made smaller (faults, workers and
clocks are left out while it still breaks) and printed.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from paceline.errors import LinkError
from paceline.optim.adamw import AdamW
from paceline.optim.sgd import SGD
from paceline.sync.server import messages as m
from paceline.sync.server.client import COORDINATOR, Client, GivenUp
from paceline.sync.server.codec import Boxed, Mixed, Rows
from paceline.sync.server.coordinator import Coordinator
from paceline.sync.server.local import LocalCoordinator
from paceline.sync.server.log import MemoryLog
from paceline.sync.server.mixed import MixedStore
from paceline.sync.server.place import Piece
from paceline.sync.server.rules import LocalRules, Rules
from paceline.sync.server.shard import Gradient, ServerShard
from paceline.sync.server.store import Delay, TensorStore

SUPERVISOR = -1
"""Who says that a worker is dead."""
MOST_EVENTS = 20_000


class BrokenPromise(Exception):
    """What a server has done and must not."""


@dataclass(frozen=True)
class Case:
    """One schedule."""

    seed: int
    rules: Rules
    ranks: int
    clocks: int
    """Of each worker; of ``local`` the steps of the run."""
    faults: int
    """At most so many."""
    meets: int = 0
    """All meet at every so many clocks, and at the end; of ``local`` after so many steps of the run."""
    rows: bool = False
    """Parameters are real ones, of which pushes have rows."""
    log_records: int = 1_000_000
    """After so many a server takes a snapshot of itself."""
    muted: frozenset[int] = frozenset()
    """Faults that are left out, by the order in which they would happen."""
    stops: bool = False
    """Of ``local``: worker 0 is asked to end the run."""

    @classmethod
    def of(cls, seed: int) -> "Case":
        """A case as various as its seed."""
        draw = random.Random(seed)
        mode: Any = draw.choice(["sync", "sync", "stale", "stale", "async", "local", "local"])
        workers = draw.randint(1, 3)
        return cls(
            seed=seed,
            rules=Rules(
                workers=workers,
                shards=draw.randint(1, 2),
                mode=mode,
                staleness=draw.randint(0, 2) if mode == "stale" else 0,
                backups=draw.randint(0, workers - 1) if mode == "sync" else 0,
                clip_norm=draw.choice([None, 1.0]),
                local=_local_rules(draw) if mode == "local" else None,
            ),
            ranks=draw.randint(1, 2),
            clocks=draw.randint(1, 3),
            faults=draw.choice([0, 4, 8, 12]),
            log_records=draw.choice([3, 8, 1_000_000, 1_000_000]),
            meets=draw.randint(1, 3) if mode == "local" else draw.choice([0, 0, 1, 2]),
            stops=draw.random() < 0.2,
            rows=mode != "local" and draw.random() < 0.02,
        )


def _local_rules(draw: random.Random) -> LocalRules:
    how = draw.choice(["dynamic", "dynamic", "static", "ordered"])
    return LocalRules(
        every=draw.randint(1, 4),
        dynamic=how == "dynamic",
        ordered=how == "ordered",
        delay=draw.randint(1, 3),
    )


class CountingStore:
    """Parameters that are the tuple of pushes they were made from."""

    def __init__(self, shard: int, ranks: int, truth: dict[int, tuple[m.Push, ...]], delay: int = 0) -> None:
        self._shard, self._ranks, self._truth, self._delay = shard, ranks, truth, delay
        self._value: tuple[m.Push, ...] = ()
        self._gathered: tuple[m.Push, ...] = ()
        self._open: tuple[float, ...] = ()
        self._version = 0

    def gather(self, gradients: Sequence[Gradient], *, measured: bool) -> float:
        """All ranks' parts of each must be here, and be what was sent to this shard."""
        pushes = []
        for gradient in gradients:
            (push,) = {part[0] for part in gradient.parts.values()}
            whole = {rank: (push, self._shard, rank) for rank in range(self._ranks)}
            _promise(dict(gradient.parts) == whole, f"shard {self._shard} has {gradient.parts} of {push}")
            pushes.append(push)
        self._gathered = tuple(pushes)
        self._weights = tuple(gradient.weight for gradient in gradients)
        return float(len(pushes))

    def push(self, window: float) -> None:
        """A window is of as many pushes as it should be, and its weight that of them."""
        self._open += self._weights
        closes = len(self._open) == self._delay
        weight = sum(self._open) if closes else 0.0
        _promise(abs(window - weight) < 1e-9, f"shard {self._shard}: a window of {self._open} is closed at {window}")
        self._open = () if closes else self._open
        self.step(1.0, 1.0)

    def step(self, rate: float, scale: float) -> None:
        """Nothing twice, and each worker's in order."""
        for push in self._gathered:
            _promise(push not in self._value, f"shard {self._shard} applied {push} twice")
            before = [other.number for other in self._value if other.worker == push.worker]
            _promise(not before or before[-1] < push.number, f"shard {self._shard}: {push} after {before}")
        self._value += self._gathered
        self._version += 1
        known = self._truth.setdefault(self._version, self._value)
        _promise(known == self._value, f"version {self._version} is {known}, and {self._value} on shard {self._shard}")

    def copy(self) -> tuple[m.Push, ...]:
        """Tuples do not change."""
        return self._value

    def release(self, copy: Any) -> None:
        """Nothing to do."""

    def read(self, copy: Any, wanted: Any) -> Any:
        """The tuple."""
        return self._value if copy is None else copy

    def save(self, copies: Mapping[int, Any]) -> Any:
        """Everything."""
        return self._value, self._version, self._open, dict(copies)

    def load(self, saved: Any) -> Mapping[int, Any]:
        """Everything."""
        self._value, self._version, self._open, copies = saved
        return dict(copies)


class RowStore(CountingStore):
    """The same, beside a small table of which pushes have rows, and the same table of which they have all: real ones,
    which have to be equal whenever they are read."""

    PIECES = (Piece("table", (0, 0), (3, 2)), Piece("table", (5, 0), (4, 2)), Piece("other", (0,), (2,)))

    def __init__(self, shard: int, ranks: int, truth: dict[int, tuple[m.Push, ...]]) -> None:
        super().__init__(shard, ranks, truth)
        optimizer = SGD(lr=0.5, momentum=0.9, weight_decay=0.1) if shard else AdamW(lr=0.1, weight_decay=0.5)
        ndims = {"table": 2, "other": 1}
        self._pieces = self.PIECES
        self._rows = MixedStore(self._pieces, ndims, optimizer, torch.float64, Delay(), {"table"})
        self._dense = TensorStore(self._pieces, ndims, optimizer, torch.float64)

    def gather(self, gradients: Sequence[Gradient], *, measured: bool) -> float:
        """Gradients follow from the names of the pushes."""
        squares = super().gather(gradients, measured=measured)
        rows, dense = [], []
        for gradient in gradients:
            (push,) = {part[0] for part in gradient.parts.values()}
            mixed, whole = self._of(push)
            rows.append(Gradient(gradient.weight, {0: mixed}, None, push.worker))
            dense.append(Gradient(gradient.weight, {0: whole}, None, push.worker))
        self._rows.gather(rows, measured=False)
        self._dense.gather(dense, measured=False)
        return squares

    def step(self, rate: float, scale: float) -> None:
        """Of both."""
        super().step(rate, scale)
        self._rows.step(rate, 1.0)
        self._dense.step(rate, 1.0)

    def copy(self) -> Any:
        """Of both."""
        return super().copy(), self._rows.copy(), self._dense.copy()

    def release(self, copy: Any) -> None:
        """Of both."""
        self._rows.release(copy[1])
        self._dense.release(copy[2])

    def read(self, copy: Any, wanted: Any) -> Any:
        """Some rows, then all; they are what they would be if all had taken every step."""
        value, rows, dense = copy or (None, None, None)
        boxes = [(number, (0, 0), self._pieces[number].shape) for number in (0, 1)]
        for some in (torch.tensor([len(self._value) % 3], dtype=torch.int32), None):
            asked = tuple((box, some) for box in boxes)
            for box, late in zip(boxes, self._rows.read(rows, ((), None, None, asked)), strict=True):
                (whole,) = self._dense.read(dense, ((box,), None))
                own = whole.view(box[2]) if some is None else whole.view(box[2])[some.long()]
                _promise(torch.allclose(late, own, rtol=1e-10, atol=1e-12), f"rows are {late}, not {own}")
        return super().read(value, wanted)

    def save(self, copies: Mapping[int, Any]) -> Any:
        """Everything."""
        values, rows, dense = ({version: copy[i] for version, copy in copies.items()} for i in range(3))
        return super().save(values), self._rows.save(rows), self._dense.save(dense)

    def load(self, saved: Any) -> Mapping[int, Any]:
        """Everything."""
        values, rows, dense = super().load(saved[0]), self._rows.load(saved[1]), self._dense.load(saved[2])
        return {version: (values[version], rows[version], dense[version]) for version in values}

    def _of(self, push: m.Push) -> tuple[Mixed, Boxed]:
        draw = torch.Generator().manual_seed(hash((*push, self._shard)) % (1 << 62))
        rows, whole = [], []
        for number, piece in enumerate(self._pieces):
            values = torch.randn(piece.shape, generator=draw, dtype=torch.float64)
            if piece.name == "table":
                ids = (torch.rand(piece.shape[0], generator=draw) < 0.4).nonzero().view(-1)
                rows.append(Rows((number, (0, 0), piece.shape), ids.to(torch.int32), values[ids]))
                values = torch.zeros(piece.shape, dtype=torch.float64).index_copy_(0, ids, values[ids])
            whole.append(values.reshape(-1))
        boxes = tuple((number, (0,) * len(piece.shape), piece.shape) for number, piece in enumerate(self._pieces))
        return Mixed(Boxed(boxes[2:], whole[2]), tuple(rows)), Boxed(boxes, torch.cat(whole))


@dataclass
class _Asker:
    """Who asks: a worker's program, or a shard that wants entries."""

    program: Generator[list[tuple[int, m.Request]], list[m.Answer], None] | None = None
    waiting: dict[int, tuple[int, m.Request]] = field(default_factory=dict)
    """Requests without an answer yet, by their serial number."""
    batch: list[int] = field(default_factory=list)
    answers: dict[int, m.Answer] = field(default_factory=dict)


class Simulation:
    """One schedule at work. ``coordinator`` and ``shard`` make the logic that is tried."""

    def __init__(
        self,
        case: Case,
        *,
        coordinator: Callable[..., Coordinator] = Coordinator,
        local: Callable[..., LocalCoordinator] = LocalCoordinator,
        shard: Callable[..., ServerShard] = ServerShard,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.case, self._say = case, say
        self._make_coordinator = coordinator if case.rules.local is None else local
        self._make_shard = shard
        self._draw = random.Random(case.seed ^ 0x5EED).random
        rules = case.rules
        self._network: list[tuple[Any, ...]] = []
        self._serial = self.events = self.happened = 0
        self._logs = [MemoryLog(case.log_records) for _ in range(rules.shards + 1)]
        self._versions: dict[int, tuple[m.Push, ...]] = {}
        self._servers: dict[int, Any] = {}
        self._fetchers = {shard: _Asker() for shard in range(rules.shards)}
        self._workers = {worker: _Asker() for worker in range(rules.workers)}
        self._supervisor = _Asker()
        self._lives = dict.fromkeys(range(rules.workers), 0)
        self._finished: set[int] = set()
        self._left: set[int] = set()
        self._gone_for_good: set[int] = set()
        self._absent: set[int] = set()
        self._known = dict.fromkeys(range(rules.workers), 0)
        """The life of each worker, and who is away, as the coordinator has heard."""
        self._progress = dict.fromkeys(range(rules.workers), 0)
        """By worker: the clock before which all its pushes are decided on."""
        self._clock_of: dict[m.Push, int] = {}
        """Of every push that was committed and kept."""
        self._dropped: set[m.Push] = set()
        self._required: dict[tuple[int, int], set[m.Push]] = {}
        """By worker and entry of its pin: what it has to read."""
        self.read_versions: list[int] = []
        self._leases: dict[m.Push, m.Lease] = {}
        """Of ``local``: what each push was learned from."""
        self._reached = 0
        """Of ``local``: the step after which all have met last."""
        self.content: tuple[m.Push, ...] = ()
        """All that was applied in the end, in order."""

    def run(self) -> None:
        """Until every worker has finished or is gone; ``BrokenPromise`` if one is broken on the way."""
        for server in (COORDINATOR, *self._fetchers):
            self._start_server(server)
        for worker in self._workers:
            self._start_worker(worker)
        while not all(map(self._is_through, self._workers)) or self._is_behind():
            self.events += 1
            if self.events == MOST_EVENTS:
                raise BrokenPromise(f"nothing ends: {self._standing()}")
            self._event()
        self._check_end()

    def _is_through(self, worker: int) -> bool:
        gone = worker in self._left and self._workers[worker].program is None
        return gone or worker in self._finished

    # What happens next.

    def _event(self) -> None:
        if self.happened < self.case.faults and self._draw() < 0.03:
            self._kill()
        if self.happened < self.case.faults and self._draw() < 0.01:
            self._give_up()
        if len(self._servers) <= len(self._fetchers) and self._draw() < 0.1:
            down = [s for s in (COORDINATOR, *self._fetchers) if s not in self._servers]
            self._start_server(self._pick(down))
        gone = [
            w
            for w, asker in self._workers.items()
            if asker.program is None and w not in self._finished and w not in self._gone_for_good
        ]
        if gone and self._draw() < 0.1:
            self._replace(self._pick(gone))
        if self._network and self._draw() < 0.97:
            self._deliver()
        else:
            self._ask_again()

    def _deliver(self) -> None:
        network = self._network
        at = int(self._draw() * len(network))
        message = network[at]
        network[at] = network[-1]
        network.pop()
        luck = self._draw()
        if luck < 0.06 and self._fault("lost", message):
            return
        if luck > 0.94 and self._fault("twice", message):
            network.append(message)
        if message[0] == "ask":
            _, server, asker, serial, request = message
            if server in self._servers:
                self._tell(asker, "->", "coordinator" if server == COORDINATOR else f"shard {server}", request)
                self._send(self._handle(server, (asker, serial), request))
        else:
            _, asker, serial, answer = message
            self._receive(asker, serial, answer)

    def _ask_again(self) -> None:
        askers = [("worker", w) for w in self._workers] + [("shard", s) for s in self._fetchers] + [("supervisor", 0)]
        waiting = [(asker, serial) for asker in askers for serial in self._asker(asker).waiting]
        if waiting:
            asker, serial = self._pick(waiting)
            server, request = self._asker(asker).waiting[serial]
            self._network.append(("ask", server, asker, serial, request))

    def _kill(self) -> None:
        servers = [("server", s) for s in self._servers]
        workers = [("worker", w) for w in self._workers if self._workers[w].program and w not in self._finished]
        if not servers + workers:
            return
        kind, who = self._pick(servers + workers)
        if not self._fault("killed", kind, who):
            return
        if kind == "server":
            del self._servers[who]
            if who != COORDINATOR:
                self._fetchers[who] = _Asker()
        else:
            self._workers[who] = _Asker()

    def _give_up(self) -> None:
        """Take a worker for dead that is not; of those that take leases none is, for they have no ``lease_s``."""
        if self.case.rules.local is not None:
            return
        here = [w for w, asker in self._workers.items() if asker.program and w not in self._finished]
        if here and not self._supervisor.waiting and self._fault("given up", worker := self._pick(here)):
            self._ask(("supervisor", 0), [(COORDINATOR, m.Leave(worker, self._lives[worker]))])

    def _replace(self, worker: int) -> None:
        """Start a dead worker again, or say that it is dead, which may come first."""
        if worker not in self._left and self._draw() < 0.4 and not self._supervisor.waiting:
            self._ask(("supervisor", 0), [(COORDINATOR, m.Leave(worker, self._lives[worker]))])
        elif worker not in self._left or self._draw() < 0.3:
            self._start_worker(worker)
        else:
            self._gone_for_good.add(worker)

    # Who is there.

    def _start_server(self, server: int) -> None:
        self._tell("start server", server)
        if server == COORDINATOR:
            self._servers[server] = self._make_coordinator(self.case.rules, self._logs[-1])
            return
        local = self.case.rules.local
        store: Any = RowStore(server, self.case.ranks, self._versions)
        if not self.case.rows:
            store = CountingStore(server, self.case.ranks, self._versions, local.delay if local else 0)
        shard = self._make_shard(server, store, self._logs[server])
        self._servers[server] = shard
        self._fetchers[server] = _Asker()
        self._ask(("shard", server), [(COORDINATOR, shard.next_fetch())])

    def _start_worker(self, worker: int) -> None:
        self._lives[worker] += 1
        self._left.discard(worker)
        self._tell("start worker", worker, "life", self._lives[worker])
        asker = self._workers[worker] = _Asker()
        program = self._program if self.case.rules.local is None else self._local_program
        asker.program = program(worker, self._lives[worker])
        self._ask(("worker", worker), next(asker.program))

    def _program(self, worker: int, life: int) -> Generator[Any, Any, None]:
        """A replica that joins again whenever it hears that it was given up, or has left."""
        while True:
            try:
                return (yield from self._live(worker, life))
            except GivenUp:
                life = self._lives[worker] = self._lives[worker] + 1
                self._left.discard(worker)
                self._tell("worker", worker, "comes back with life", life)

    def _live(self, worker: int, life: int) -> Generator[Any, Any, None]:
        """A replica of some ranks: what the strategy does, in small."""
        rules, clocks = self.case.rules, self.case.clocks
        staleness = None if rules.mode == "async" else rules.staleness
        ranks = [
            Client(worker, life, rank, shards=rules.shards, staleness=staleness) for rank in range(self.case.ranks)
        ]
        leader = ranks[0]
        joined = yield from leader.join()
        number, clock = joined.number, joined.clock
        while True:
            granted = yield from leader.turn(clock, meet=self._meets(clock))
            if granted.clock > clock and self._meets(granted.clock):  # others did not wait: it meets them there
                granted = yield from leader.turn(granted.clock, meet=1)
            clock, has_joined = granted.clock, clock == joined.clock
            parts = yield from _together([rank.pull(granted, [None] * rules.shards) for rank in ranks])
            self._check_read(worker, granted, [content for rank in parts for content in rank])
            if self._meets(clock):
                again = yield from leader.turn(clock, meet=2)
                still = again.version == granted.version or has_joined
                _promise(still, f"{worker} met others at {granted.version}, and they went on before it was ready")
                parts = yield from _together([rank.pull(again, [None] * rules.shards) for rank in ranks])
                self._check_read(worker, again, [content for rank in parts for content in rank])
            if clock >= clocks:
                break
            number += 1
            push = m.Push(worker, life, number)
            yield from _together(
                [rank.stage(number, [(push, shard, rank.rank) for shard in range(rules.shards)]) for rank in ranks]
            )
            committed = yield from leader.commit(number, clock=clock, targets=1.0 + worker, rate=1.0)
            _promise(committed.number == number, f"worker {worker} was told of push {committed.number}, not {number}")
            clock += 1
            if self._draw() < 0.05 and self._fault("left", worker):
                yield from leader.leave()
                raise GivenUp
        yield from leader.leave()
        self._finished.add(worker)

    def _local_program(self, worker: int, life: int) -> Generator[Any, Any, None]:
        """A replica that takes leases."""
        rules, steps = self.case.rules, self.case.clocks
        ranks = [Client(worker, life, rank, shards=rules.shards, staleness=None) for rank in range(self.case.ranks)]
        leader = ranks[0]
        joined = yield from leader.join()
        number, clock = joined.number, joined.clock
        granted = yield from leader.lease(clock)
        while True:
            parts = yield from _together([rank.pull(granted, [None] * rules.shards) for rank in ranks])
            self._check_read(worker, granted, [content for rank in parts for content in rank])
            if granted.lease is None:
                _promise(granted.reached >= self._reached, f"all met after {self._reached}, then {granted.reached}")
                self._reached = granted.reached
                if granted.reached == steps or granted.stop is not None:
                    break
                until = min(steps, (granted.reached // self.case.meets + 1) * self.case.meets)
                granted = yield from leader.lease(clock, until=until)
                _promise(granted.lease is not None, f"worker {worker} began with nothing to do")
                continue
            number += 1
            push = m.Push(worker, life, number)
            self._leases[push] = granted.lease
            yield from _together(
                [rank.stage(number, [(push, shard, rank.rank) for shard in range(rules.shards)]) for rank in ranks]
            )
            yield from leader.commit(
                number,
                clock=clock,
                targets=float(granted.lease.length),
                rate=1.0,
                stop=self.case.stops and worker == 0,
                seconds=granted.lease.length * (1.0 + worker),
            )
            clock += 1
            granted = yield from leader.lease(clock)
        yield from leader.leave()
        self._finished.add(worker)

    def _meets(self, clock: int) -> bool:
        every = self.case.meets
        return clock >= self.case.clocks or (every > 0 and clock > 0 and clock % every == 0)

    # Messages.

    def _asker(self, who: tuple[str, int]) -> _Asker:
        kind, number = who
        return (
            self._supervisor
            if kind == "supervisor"
            else (self._workers if kind == "worker" else self._fetchers)[number]
        )

    def _ask(self, who: tuple[str, int], requests: Sequence[tuple[int, m.Request]]) -> None:
        asker = self._asker(who)
        asker.batch, asker.answers = [], {}
        for server, request in requests:
            self._serial += 1
            asker.batch.append(self._serial)
            asker.waiting[self._serial] = (server, request)
            self._network.append(("ask", server, who, self._serial, request))

    def _send(self, out: Sequence[tuple[Any, m.Answer]]) -> None:
        for to, answer in out:
            if to is not None:
                self._network.append(("answer", *to, answer))

    def _receive(self, who: tuple[str, int], serial: int, answer: m.Answer) -> None:
        asker = self._asker(who)
        if serial not in asker.waiting:
            return
        self._tell(who, "<-", answer)
        del asker.waiting[serial]
        asker.answers[serial] = answer
        if asker.waiting:
            return
        if who[0] == "shard":
            shard = self._servers[who[1]]
            assert isinstance(answer, m.Entries)
            self._send(shard.follow(answer))
            self._ask(who, [(COORDINATOR, shard.next_fetch())])
        elif asker.program is not None:
            try:
                self._ask(who, asker.program.send([asker.answers[s] for s in asker.batch]))
            except StopIteration:
                asker.program = None

    def _handle(self, server: int, to: Any, request: m.Request) -> Sequence[tuple[Any, m.Answer]]:
        if server != COORDINATOR:
            out: Sequence[tuple[Any, m.Answer]] = self._servers[server].handle(to, request)
            return out
        coordinator = self._servers[server]
        answers = coordinator.handle(to, request)
        self._note(to, request, answers)
        return answers  # type: ignore[no-any-return]

    # Promises.

    def _note(self, to: Any, request: m.Request, answers: Sequence[tuple[Any, m.Answer]]) -> None:
        """What each answer of the coordinator means for the promises."""
        own = [answer for asker, answer in answers if asker == to]
        if isinstance(request, m.Leave) and request.life == self._lives[request.worker]:
            self._left.add(request.worker)
        if isinstance(request, m.Leave) and request.life >= self._known[request.worker]:
            self._absent.add(request.worker)
            self._known[request.worker] = request.life
        if isinstance(request, m.Commit) and any(isinstance(answer, m.Committed) for answer in own):
            (committed,) = [answer for answer in own if isinstance(answer, m.Committed)]
            worker, known = request.push.worker, request.push in self._clock_of or request.push in self._dropped
            if committed.kept and not known:
                self._clock_of[request.push] = request.clock
            elif not committed.kept and not known:
                self._dropped.add(request.push)
            self._progress[worker] = max(self._progress[worker], request.clock + 1)
        if isinstance(request, m.Join):
            for answer in own:
                if isinstance(answer, m.Joined):
                    if request.life > self._known[request.worker]:
                        self._absent.discard(request.worker)
                        self._known[request.worker] = request.life
                    self._progress[request.worker] = max(self._progress[request.worker], answer.clock)
        # Also those of whom a coordinator that came back does not know whom to tell: they will ask again.
        for worker, member in enumerate(self._servers[COORDINATOR]._state.members):
            if member.granted is not None:
                self._note_granted(worker, m.Granted(*member.granted))

    def _note_granted(self, worker: int, granted: m.Granted) -> None:
        if (worker, granted.entry) in self._required:
            return
        rules = self.case.rules
        clock, bound = granted.clock, rules.staleness
        self._progress[worker] = max(self._progress[worker], clock)
        alive = [w for w in self._workers if w not in self._absent]
        if rules.mode == "stale":
            slow = {w: self._progress[w] for w in alive if self._progress[w] < clock - bound}
            _promise(not slow, f"worker {worker} began clock {clock} with s={bound} while {slow}")
        if rules.mode == "sync":
            ready = [w for w in alive if self._progress[w] >= clock]
            _promise(len(ready) >= len(alive) - rules.backups, f"clock {clock} began with {ready} of {alive}")
        at_once = rules.mode == "async" or (rules.local is not None and not rules.local.ordered)
        has_all = at_once or (rules.local is not None and granted.lease is None)
        reads = {
            push
            for push, of in self._clock_of.items()
            if has_all or push.worker == worker or (rules.local is None and of <= clock - bound - 1)
        }
        self._required[worker, granted.entry] = reads

    def _check_read(self, worker: int, granted: m.Granted, contents: Sequence[tuple[m.Push, ...]]) -> None:
        content = contents[0]
        _promise(all(other == content for other in contents), f"worker {worker} read two versions: {contents}")
        _promise(content == self._versions.get(granted.version, ()), f"version {granted.version} is {content} here")
        missing = self._required.get((worker, granted.entry), set()) - set(content)
        _promise(not missing, f"worker {worker} began clock {granted.clock} without {missing}")
        self.read_versions.append(granted.version)

    def _is_behind(self) -> bool:
        """Whether a server is down, or does not know all yet."""
        coordinator = self._servers.get(COORDINATOR)
        return coordinator is None or any(
            shard is None or shard.index < coordinator.last or shard.next_fetch().measured is not None
            for shard in map(self._servers.get, self._fetchers)
        )

    def _check_end(self) -> None:
        rules = self.case.rules
        contents = [self._servers[shard].store.read(None, None) for shard in self._fetchers]
        content = contents[0]
        _promise(all(other == content for other in contents), f"shards end with {contents}")
        for shard in (self._servers[number] for number in self._fetchers):
            decided = [push for push in shard._staged if push.number <= shard._done.get(push.worker, 0)]
            _promise(not decided, f"shard {shard.number} keeps {decided}, which were decided on")
        pending = self._servers[COORDINATOR].snapshot()["pending"]
        kept = set(self._clock_of) - {m.read(commit).push for commit in pending}
        _promise(set(content) == kept, f"applied {set(content) - kept} too much, {kept - set(content)} too little")
        _promise(not self._dropped & set(content), f"{self._dropped & set(content)} was dropped and applied")
        self.content = content
        if rules.local is not None:
            learned = Counter(
                share
                for first, stride, count in (self._leases[push] for push in content)
                for share in range(first, first + stride * count, stride)
            )
            twice = [share for share, times in learned.items() if times > 1]
            _promise(not twice, f"shares {twice} were learned from twice")
            if self._finished:
                left = set(range(self._reached * rules.workers)) ^ set(learned)
                _promise(
                    not left, f"all met after step {self._reached}, and shares {left} were left out, or are beyond"
                )
        if rules.mode == "sync":
            for version in sorted(self._versions):
                before = self._versions.get(version - 1)
                if before is not None:
                    clocks = {self._clock_of[push] for push in self._versions[version][len(before) :]}
                    _promise(len(clocks) <= 1, f"version {version} mixes clocks {clocks}")
        if rules.mode == "sync" and not self.happened:
            least = self.case.clocks * (rules.workers - rules.backups)
            most = self.case.clocks * rules.workers
            _promise(least <= len(content) <= most, f"applied {len(content)} pushes, not {least} to {most}")

    # Chance, and words.

    def _fault(self, *what: Any) -> bool:
        if self.happened >= self.case.faults:
            return False
        self.happened += 1
        if self.happened in self.case.muted:
            return False
        self._tell("fault", self.happened, *what)
        return True

    def _pick(self, among: Sequence[Any]) -> Any:
        return among[int(self._draw() * len(among))]

    def _tell(self, *what: Any) -> None:
        if self._say is not None:
            self._say(" ".join(map(str, what)))

    def _standing(self) -> str:
        waits = {worker: list(asker.waiting.values()) for worker, asker in self._workers.items()}
        return f"finished {self._finished}, left {self._left}, waiting {waits}, in flight {len(self._network)}"


def _together(exchanges: Sequence[Generator[Any, Any, Any]]) -> Generator[Any, Any, list[Any]]:
    """Exchanges of one round trip each, at the same time."""
    asked = [next(exchange) for exchange in exchanges]
    answers = iter((yield [request for batch in asked for request in batch]))
    results = []
    for exchange, batch in zip(exchanges, asked, strict=True):
        try:
            exchange.send([next(answers) for _ in batch])
        except StopIteration as stop:
            results.append(stop.value)
    return results


def _promise(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenPromise(otherwise)


def broken(case: Case, **logic: Any) -> str | None:
    """What goes wrong in a schedule, if anything does."""
    try:
        Simulation(case, **logic).run()
    except (BrokenPromise, AssertionError, LookupError, LinkError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def shrunk(case: Case, **logic: Any) -> Case:
    """The same break with as few faults, workers, ranks and clocks as leaving them out one by one gives."""
    smaller = True
    while smaller:
        smaller = False
        for simpler in _simpler(case):
            if broken(simpler, **logic):
                case, smaller = simpler, True
                break
    return case


def _simpler(case: Case) -> Generator[Case, None, None]:
    rules = case.rules
    if case.clocks > 1:
        yield replace(case, clocks=case.clocks - 1)
    if case.ranks > 1:
        yield replace(case, ranks=1)
    if case.meets and case.rules.local is None:
        yield replace(case, meets=0)
    if case.rows:
        yield replace(case, rows=False)
    if rules.shards > 1:
        yield replace(case, rules=replace(rules, shards=1))
    if rules.workers > max(1, rules.backups + 1):
        yield replace(case, rules=replace(rules, workers=rules.workers - 1))
    if case.stops:
        yield replace(case, stops=False)
    if case.faults > 0:
        yield replace(case, faults=case.faults - 1, muted=case.muted - {case.faults})
    for fault in range(1, case.faults):
        if fault not in case.muted:
            yield replace(case, muted=case.muted | {fault})


def told(case: Case, **logic: Any) -> str:
    """A schedule, message by message, and what goes wrong in it."""
    lines: list[str] = []
    what = broken(case, say=lines.append, **logic)
    return "\n".join([str(case), *lines, what or "all promises are kept"])


def main() -> int:
    """Try schedules until one breaks a promise; its number is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    if options.only is not None:
        print(told(Case.of(options.only)))
        return 0
    start, events, faults = time.perf_counter(), 0, 0
    for seed in range(options.first, options.first + options.schedules):
        simulation = Simulation(Case.of(seed))
        try:
            simulation.run()
        except (BrokenPromise, AssertionError, LookupError, LinkError):
            print(told(shrunk(Case.of(seed))))
            print(f"schedule {seed} breaks a promise; the whole of it: python tools/simulate.py --only {seed}")
            return 1
        events += simulation.events
        faults += simulation.happened
    seconds = time.perf_counter() - start
    print(
        f"{options.schedules:,} schedules, {events:,} events, {faults:,} faults in {seconds:.1f} s: all promises kept"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
