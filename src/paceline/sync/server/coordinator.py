"""The coordinator: who is there, how far each is, and the one order in which all shards do everything.

A push is first staged with all shards, by every rank of its worker, and only then committed here. So it is applied by
all of them or by none, whenever a worker dies; and because all follow one order of entries, a version is the same set
of pushes on every shard, whatever arrived where first.

How pushes become versions is the rule of the mode:

    sync    clock t is closed when all workers but ``backups`` have committed it (Chen et al. 2016, arXiv 1604.00981):
            one update with the mean over their targets. A push that comes after that is dropped, and its worker goes
            on with the clock that is open then.
    stale   (Ho et al. 2013) worker at clock c runs while c - floor <= s, where floor is the clock of the slowest.
            Pushes wait until a worker begins a later clock than theirs, and are then one update together: the mean
            over their targets, times the share of workers it is of. So every read at clock c has all updates of clocks
            up to c - s - 1, and the reader's own; and with s = 0 it is ``sync``.
    async   (Downpour, Dean et al. 2012) each push is an update of its own, at once; with ``scaled`` divided by its
            staleness + 1 (Zhang et al. 2015, arXiv 1511.05950).
    local   workers take leases and push what they have moved by: ``local.py``.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.sync.server import messages as m
from paceline.sync.server.log import Log, NoLog
from paceline.sync.server.rules import Rules

Out = list[tuple[Any, m.Answer]]
"""Answers, each with the token that came with its request."""


@dataclass
class Member:
    """What is known of one worker."""

    life: int = 0
    number: int = 0
    """Of its last push that was committed."""
    clock: int = 0
    """All its pushes of clocks before this are committed."""
    kept: bool = True
    """What became of the last one."""
    alive: bool = True
    base: int = 0
    """The version it reads."""
    staleness: int = 0
    asked: int = -1
    """The clock it last asked for, and what it was granted then."""
    met: int = 0
    granted: tuple[Any, ...] | None = None
    lease: m.Lease | None = None
    """Of ``local``: what it learns from."""
    length: int = 0
    """Of its last lease that it pushed of."""
    speed: float = 0.0
    steps: int = 0


@dataclass
class _State:
    """All that a coordinator remembers, but for who waits for an answer."""

    members: list[Member]
    first: int = 1
    """The number of the first entry that is kept."""
    entries: list[m.Entry] = field(default_factory=list)
    version: int = 0
    round: int = 0
    """The clock that is open; of ``sync``."""
    pending: list[m.Commit] = field(default_factory=list)
    measuring: dict[int, float] | None = None
    """Squared norms that shards have reported of the update under way; None if there is none."""
    norm: float = 0.0
    """Of the gradient of the last version that was measured, before clipping."""
    kept: dict[int, int] = field(default_factory=dict)
    stop: int | None = None
    histogram: Counter[int] = field(default_factory=Counter)
    dropped: int = 0


_PLAIN = ("first", "version", "round", "norm", "stop", "dropped")
"""What of a state is a number, or None."""


class Coordinator:
    """Handles one request after the other. What it decides follows from their order alone, so its log is that order."""

    def __init__(self, rules: Rules, log: Log | None = None, *, first_life: int = 1) -> None:
        self.rules, self._first_life = rules, first_life
        first = rules.first_clock
        self._state = _State([Member(life=first_life - 1, clock=first) for _ in range(rules.workers)], round=first)
        self._turns: dict[int, tuple[Any, m.Turn]] = {}
        self._fetches: dict[int, tuple[Any, m.Fetch]] = {}
        self._log: Log = NoLog()
        self._handlers: dict[type, Any] = {
            m.Join: self._join,
            m.Commit: self._commit,
            m.Turn: self._turn,
            m.Leave: self._leave,
            m.Fetch: self._fetch,
        }
        if log is not None:
            self._recover(log)

    @property
    def histogram(self) -> Mapping[int, int]:
        """How many pushes were applied with which staleness, in versions."""
        return self._state.histogram

    @property
    def dropped(self) -> int:
        """Pushes that came too late."""
        return self._state.dropped

    @property
    def heard_of(self) -> Mapping[int, int]:
        """The life of every worker that has joined or left."""
        return {i: member.life for i, member in enumerate(self._state.members) if member.life >= self._first_life}

    @property
    def last(self) -> int:
        """The number of the last entry."""
        return self._state.first + len(self._state.entries) - 1

    def handle(self, to: Any, request: m.Request) -> Out:
        """What a request leads to: answers to it, and to those that have waited for it."""
        out: Out = []
        self._handlers[type(request)](to, request, out)
        if self._log.is_long:
            self._log.replace(self.snapshot())
        return out

    def told(self) -> dict[str, Any]:
        """What a worker may ask for, as plain values."""
        return {"histogram": dict(self.histogram), "dropped": self.dropped}

    def snapshot(self) -> dict[str, Any]:
        """All that is remembered, as plain values."""
        state = self._state
        return {
            **{key: getattr(state, key) for key in _PLAIN},
            "members": [{**vars(member)} for member in state.members],
            "entries": [m.plain(entry) for entry in state.entries],
            "pending": [m.plain(commit) for commit in state.pending],
            "measuring": None if state.measuring is None else list(state.measuring.items()),
            "kept": list(state.kept.items()),
            "histogram": list(state.histogram.items()),
            # Who waits will ask again, but perhaps in another order.
            "turns": [m.plain(turn) for _, turn in self._turns.values()],
        }

    def _recover(self, log: Log) -> None:
        """Be as an earlier one that kept this log."""
        snapshot, records = log.read()
        if snapshot is not None:
            self._restore(snapshot)
        for request in records:
            self.handle(None, request)
        self._log = log

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._state = _State(
            **{key: saved[key] for key in _PLAIN},
            members=[_member(member) for member in saved["members"]],
            entries=[m.read(entry) for entry in saved["entries"]],
            pending=[m.read(commit) for commit in saved["pending"]],
            measuring=None if saved["measuring"] is None else dict(saved["measuring"]),
            kept=dict(saved["kept"]),
            histogram=Counter(dict(saved["histogram"])),
        )
        for turn in map(m.read, saved["turns"]):
            self._turns[turn.worker] = (None, turn)

    # Requests.

    def _join(self, to: Any, request: m.Join, out: Out) -> None:
        state, member = self._state, self._state.members[request.worker]
        if request.life < member.life or (request.life == member.life and not member.alive):
            reason = f"worker {request.worker} was started again, or given up, since"
            out.append((to, m.Refused(reason, join=request.life == member.life)))
            return
        if request.life > member.life:
            self._log.append(request)
            others = [other.clock for i, other in enumerate(state.members) if other.alive and i != request.worker]
            # Others have not waited for one that was gone, and need not now: it starts where the slowest of them is.
            clock = member.clock if member.alive or not others else max(member.clock, min(others))
            clock = max(clock, state.round) if self.rules.mode == "sync" else clock
            member.life, member.clock, member.alive = request.life, clock, True
            member.asked, member.met, member.granted = -1, 0, None
            self._gone(member)
            self._turns.pop(request.worker, None)
            self._enter(m.Begun(request.worker, request.life, member.number))
            self._advance(out)
        out.append((to, m.Joined(member.number, member.clock)))

    def _commit(self, to: Any, request: m.Commit, out: Out) -> None:
        state, push = self._state, request.push
        member = self._living(to, push.worker, push.life, out)
        if member is None:
            return
        if push.number > member.number + 1:
            out.append((to, m.Refused(f"push {push.number} of worker {push.worker} comes before {member.number + 1}")))
            return
        if push.number == member.number + 1:
            self._log.append(request)
            self._done(member, request)
            member.number, member.clock = push.number, request.clock + 1
            member.kept = self.rules.mode != "sync" or request.clock >= state.round
            if member.kept:
                state.pending.append(request)
            else:
                member.clock = max(member.clock, state.round)
                state.dropped += 1
                self._enter(m.Dropped(push))
            if request.stop and state.stop is None:
                state.stop = self._stops_at()
            self._advance(out)
        out.append((to, m.Committed(push.number, member.kept)))

    def _turn(self, to: Any, request: m.Turn, out: Out) -> None:
        member = self._living(to, request.worker, request.life, out)
        if member is None or (request.clock, request.meet) < (member.asked, member.met):
            return  # a late copy
        if (request.clock, request.meet) == (member.asked, member.met) and member.granted is not None:
            out.append((to, m.Granted(*member.granted)))
            return
        waiting = self._turns.get(request.worker)
        self._turns[request.worker] = (to, request)
        if waiting is None or waiting[1] != request:
            self._log.append(request)
            member.asked, member.met, member.granted = request.clock, request.meet, None
            self._advance(out)

    def _leave(self, to: Any, request: m.Leave, out: Out) -> None:
        member = self._state.members[request.worker]
        if request.life > member.life or (member.alive and member.life == request.life):
            self._log.append(request)
            member.life, member.alive = request.life, False  # also before it has joined: it may not any more
            self._turns.pop(request.worker, None)
            self._gone(member)
            self._enter(m.Left(request.worker, member.life, member.number))
            self._advance(out)
        out.append((to, m.Done()))

    def _fetch(self, to: Any, request: m.Fetch, out: Out) -> None:
        state = self._state
        self._fetches[request.shard] = (to, request)
        if state.measuring is not None and request.measured is not None and request.shard not in state.measuring:
            version, squares = request.measured
            if version == state.version:
                self._log.append(request)
                state.measuring[request.shard] = squares
        self._forget(request)
        self._advance(out)

    # What rules of a mode may add.

    def _gone(self, member: Member) -> None:
        """A worker, or an earlier life of it, is not there any more."""

    def _done(self, member: Member, commit: m.Commit) -> None:
        """A worker has pushed."""

    def _stops_at(self) -> int:
        """The clock before which the run ends: whoever is furthest hears of it before that."""
        return 2 + max(max(other.clock, other.asked) for other in self._state.members if other.alive)

    # What follows.

    def _living(self, to: Any, worker: int, life: int, out: Out) -> Member | None:
        member = self._state.members[worker]
        if member.alive and member.life == life:
            return member
        reason = "was started again since" if life < member.life else "is not here: join first"
        out.append((to, m.Refused(f"worker {worker} {reason}", join=life == member.life)))
        return None

    def _enter(self, entry: m.Entry) -> int:
        self._state.entries.append(entry)
        return self.last

    def _forget(self, fetch: m.Fetch) -> None:
        """Entries that no shard will want again."""
        state = self._state
        state.kept[fetch.shard] = max(fetch.kept, state.kept.get(fetch.shard, 0))
        if len(state.kept) == self.rules.shards and (gone := min(state.kept.values()) - state.first + 1) > 0:
            del state.entries[:gone]
            state.first += gone

    def _advance(self, out: Out) -> None:
        """Do all that can be done now."""
        while self._step() or self._grant(out):
            pass
        for shard, (to, fetch) in list(self._fetches.items()):
            if fetch.after < self.last:
                del self._fetches[shard]
                at = fetch.after + 1 - self._state.first
                if at >= 0:  # else a late copy of a request that was answered long ago
                    out.append((to, m.Entries(fetch.after + 1, tuple(self._state.entries[at:]))))

    def _step(self) -> bool:
        """Finish the update that is measured, or begin one that is due; whether there was any."""
        state, rules = self._state, self.rules
        if state.measuring is not None:
            if len(state.measuring) < rules.shards:
                return False
            norm = state.norm = math.sqrt(sum(state.measuring[shard] for shard in range(rules.shards)))
            most = rules.clip_norm
            scale = most / norm if most is not None and norm > most else 1.0
            state.measuring = None
            self._enter(m.Measured(state.version, scale))
            return True
        if rules.mode == "async" and state.pending:
            self._update(state.pending[:1])
            return True
        if rules.mode == "sync" and self._is_closed():
            self._update(state.pending)
            state.round += 1
            for member in state.members:
                member.clock = max(member.clock, state.round) if not member.alive else member.clock
            return True
        return False

    def _is_closed(self) -> bool:
        alive = [member for member in self._state.members if member.alive]
        done = sum(member.clock > self._state.round for member in alive)
        return bool(alive) and done >= max(1, len(alive) - self.rules.backups)

    def _update(self, commits: Sequence[m.Commit]) -> None:
        """One version of some pushes that are pending, in the order of the workers."""
        state, rules = self._state, self.rules
        commits = sorted(commits, key=lambda commit: (commit.push.worker, commit.push.number))
        state.pending = [commit for commit in state.pending if commit not in commits]
        taken = [commit for commit in commits if commit.targets > 0]
        for commit in commits:
            if commit.targets <= 0:
                self._enter(m.Dropped(commit.push))  # it has nothing to add, and shards may forget it
        targets = sum(commit.targets for commit in taken)
        terms = []
        for commit in taken:
            member = state.members[commit.push.worker]
            member.staleness = state.version - member.base
            state.histogram[member.staleness] += 1
            weight = commit.targets / targets
            if rules.mode == "stale":
                alive = max(1, sum(other.alive for other in state.members))
                weight *= min(1.0, len({c.push.worker for c in commits}) / alive)
            elif rules.scaled:
                weight /= member.staleness + 1
            terms.append(m.Term(commit.push, weight, member.base))
        newest = max(commits, key=lambda commit: (commit.clock, -commit.push.worker))
        state.version += 1
        measured = rules.measures and bool(terms)
        self._enter(m.Update(state.version, tuple(terms), newest.rate, measured))
        state.measuring = {} if measured else None

    def _grant(self, out: Out) -> bool:
        """Let one worker, or all that meet, begin; whether any could, or an update has to come before."""
        state = self._state
        if state.measuring is not None:
            return False
        alive = {i for i, member in enumerate(state.members) if member.alive}
        ready = [worker for worker in sorted(self._turns) if self._may_begin(self._turns[worker][1])]
        clock = min((turn.clock for _, turn in self._turns.values() if turn.meet), default=0)
        meeting = {w for w, (_, turn) in self._turns.items() if turn.meet and turn.clock == clock}
        # One that came back to this clock waits for those who have met there to go on, not to meet there again.
        if meeting and all(state.members[worker].clock > clock for worker in alive - meeting):
            if self._flush(clock):
                return True
            if all(self._may_begin(self._turns[worker][1]) for worker in meeting):
                for worker in sorted(meeting):
                    self._begin(worker, out)
                return True
        for worker in ready:
            turn = self._turns[worker][1]
            if turn.meet:
                continue
            if not self._flush(turn.clock):
                self._begin(worker, out)
            return True
        return False

    def _may_begin(self, turn: m.Turn) -> bool:
        if self.rules.mode == "sync":
            return turn.clock <= self._state.round
        floor = self._floor()
        return turn.clock <= floor if turn.meet else self.rules.mode == "async" or self._is_within(turn.clock, floor)

    def _is_within(self, clock: int, floor: int) -> bool:
        return clock - floor <= self.rules.staleness

    def _flush(self, clock: int) -> bool:
        """Of ``stale``: make an update of what is pending of clocks before ``clock``; whether there is any."""
        due = [commit for commit in self._state.pending if commit.clock < clock]
        if self.rules.mode == "stale" and due:
            self._update(due)
            return True
        return False

    def _floor(self) -> int:
        if self.rules.mode == "sync":
            return self._state.round
        return min((member.clock for member in self._state.members if member.alive), default=0)

    def _begin(self, worker: int, out: Out) -> None:
        to, turn = self._turns.pop(worker)
        state, member = self._state, self._state.members[worker]
        clock = max(turn.clock, state.round) if self.rules.mode == "sync" else turn.clock
        member.base, member.clock = state.version, max(member.clock, clock)
        index = self._enter(m.Pin(worker, member.life))
        granted = m.Granted(clock, state.version, index, self._floor(), member.staleness, state.norm, state.stop)
        member.granted = tuple(granted)
        out.append((to, granted))


def _member(saved: Mapping[str, Any]) -> Member:
    lease = saved["lease"]
    return Member(**{**saved, "lease": None if lease is None else m.Lease(*lease)})
