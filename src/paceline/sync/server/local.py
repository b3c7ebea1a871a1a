"""The coordinator of workers that learn alone and push what they have moved by (Liu et al. 2024, arXiv 2401.09135).

A worker has a lease: shares of the run that it learns from, step by step, before it pushes. Its turn is the next one.
Leases go up to where all meet, because weights are measured or saved there; a worker that finds nothing left waits for
that, and after it says where all meet next. A run that goes through all its meetings has learned from every share
exactly once, whichever worker had it and whoever died.

A push is an update of its own, at once, by the rule of ``delayed_nesterov.py``; with ``ordered`` one after the other in
the order of the workers, each of which reads right after its own push, so that a second run gives the same bits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from paceline.sync.server import messages as m
from paceline.sync.server.coordinator import Coordinator, Member, Out
from paceline.sync.server.delayed_nesterov import Window
from paceline.sync.server.log import Log
from paceline.sync.server.rules import LocalRules, Rules
from paceline.sync.server.shares import Pool, dynamic_steps, length_by_speed

_OLD_SHARE = 0.5
"""Of a worker's speed when it was measured before, in what is taken for its speed now."""


class LocalCoordinator(Coordinator):
    """See ``Coordinator``."""

    def __init__(self, rules: Rules, log: Log | None = None, *, first_life: int = 1) -> None:
        assert rules.local is not None
        self._local: LocalRules = rules.local
        done = rules.first_clock * rules.workers
        self._pool = Pool(rules.workers, self._local.every, not self._local.dynamic, begin=done, end=done)
        self._window = Window.of(self._local.delay, self._local.window)
        self._cursor = 0
        """Of ``ordered``: the worker whose push, and then whose turn, is next."""
        super().__init__(rules, None, first_life=first_life)
        nothing = (0,) * rules.workers
        speeds, steps = self._local.speeds or nothing, self._local.steps or nothing
        for i, member in enumerate(self._state.members):
            member.speed, member.steps = speeds[i], steps[i]
        self._state.histogram = Counter(dict(self._local.histogram))
        if log is not None:
            self._recover(log)

    def told(self) -> dict[str, Any]:
        """See ``Coordinator``; also the numbers of ``LocalRules`` as they are now."""
        members = self._state.members
        return {
            **super().told(),
            "window": list(self._window.numbers),
            "speeds": [member.speed for member in members],
            "steps": [member.steps for member in members],
        }

    def snapshot(self) -> dict[str, Any]:
        """See ``Coordinator``."""
        own = {"pool": self._pool.saved(), "window": asdict(self._window), "cursor": self._cursor}
        return {**super().snapshot(), "local": own}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        super()._restore(saved)
        own = saved["local"]
        self._pool, self._window = Pool.of(own["pool"]), Window(**own["window"])
        self._cursor = own["cursor"]

    # What a worker's push means for what is left to do.

    def _gone(self, member: Member) -> None:
        """What it had is for others."""
        if member.lease is not None:
            self._pool.give_back(member.lease)
            member.lease = None

    def _done(self, member: Member, commit: m.Commit) -> None:
        assert member.lease is not None, f"{commit.push} is of no lease"
        count, member.lease = member.lease.length, None
        member.length = count
        member.steps += count
        if commit.seconds > 0:
            now = count / commit.seconds
            member.speed = _OLD_SHARE * member.speed + (1 - _OLD_SHARE) * now if member.speed > 0 else now

    def _stops_at(self) -> int:
        """The step after which all meet, now earlier."""
        self._pool.close()
        return self._pool.steps

    # Pushes.

    def _step(self) -> bool:
        pending = self._state.pending
        if self._local.ordered:
            pending = [commit for commit in pending if commit.push.worker == self._cursor]
        if not pending:
            return False
        self._push(pending[0])
        return True

    def _push(self, commit: m.Commit) -> None:
        state, push = self._state, commit.push
        member = state.members[push.worker]
        state.pending.remove(commit)
        if commit.targets <= 0:  # no step of its lease was taken
            self._enter(m.Dropped(push))
            return
        weight, closed = self._window.take(commit.targets, commit.targets / member.length * self._usual_length())
        member.staleness = state.version - member.base
        state.histogram[member.staleness] += 1
        state.version += 1
        self._enter(m.Update(state.version, (m.Term(push, weight, member.base),), commit.rate, False, closed))

    # Turns.

    def _grant(self, out: Out) -> bool:
        alive = [i for i, member in enumerate(self._state.members) if member.alive]
        if alive and set(alive) == set(self._turns) and self._pool.left == 0 and not self._state.pending:
            return self._meet(alive, out)
        if self._local.ordered:
            return self._grant_in_order(alive, out)
        return self._pool.left > 0 and sum(self._offer(worker, out) for worker in sorted(self._turns)) > 0

    def _meet(self, alive: Sequence[int], out: Out) -> bool:
        """Nobody has anything to learn from any more: tell those who do not know; then go on when all say where to."""
        untold = [worker for worker in alive if not self._turns[worker][1].meet]
        for worker in untold:
            self._begin_with(worker, None, out)
        if not untold and self._state.stop is None:
            (until,) = {self._turns[worker][1].until for worker in alive}
            self._pool.open(until)
            self._cursor = 0
            for place, worker in enumerate(alive):
                if self._pool.left > 0:
                    self._begin_with(worker, self._pool.take(worker, self._count(worker, len(alive) - place - 1)), out)
            return True
        return bool(untold)

    def _offer(self, worker: int, out: Out) -> bool:
        """Give a worker that waits a lease, if there is one for it."""
        turn = self._turns[worker][1]
        count = 0 if turn.meet or self._pool.left == 0 else self._count(worker)
        if count > 0:
            self._begin_with(worker, self._pool.take(worker, count), out)
        return count > 0

    def _grant_in_order(self, alive: Sequence[int], out: Out) -> bool:
        pending = {commit.push.worker for commit in self._state.pending}
        waits = self._cursor in self._turns and self._cursor not in pending
        if self._cursor in alive and not waits:
            return False  # it is at work: its push is next
        offered = waits and self._offer(self._cursor, out)
        if offered or (alive and (pending or self._pool.left > 0 or not set(alive) <= set(self._turns))):
            self._cursor = (self._cursor + 1) % self.rules.workers
            return True
        return False

    def _count(self, worker: int, others: int | None = None) -> int:
        """How many shares a worker takes, or 0; ``others``: where all begin, so many are to have one each besides."""
        local = self._local
        if not local.dynamic:
            return local.every
        left = self._pool.left
        count = dynamic_steps(worker, self._known_speeds(), left, every=local.every, least=local.least)
        return count if others is None else max(1, min(count, left - others))

    def _known_speeds(self) -> dict[int, float]:
        """Of all that are there; who has not been measured is taken to be as quick as the quickest."""
        known = {i: member.speed for i, member in enumerate(self._state.members) if member.alive}
        usual = max(known.values(), default=0.0) or 1.0
        return {i: speed or usual for i, speed in known.items()}

    def _usual_length(self) -> float:
        """Of a lease, where no meeting is near."""
        local = self._local
        if not local.dynamic:
            return local.every
        speeds = self._known_speeds()
        lengths = [length_by_speed(speed, speeds, every=local.every, least=local.least) for speed in speeds.values()]
        return sum(lengths) / len(lengths) if lengths else local.every

    def _begin_with(self, worker: int, lease: m.Lease | None, out: Out) -> None:
        to, turn = self._turns.pop(worker)
        state, member = self._state, self._state.members[worker]
        member.base, member.lease = state.version, lease
        index = self._enter(m.Pin(worker, member.life))
        speeds = [other.speed for other in state.members if other.alive]
        pace = sum(speeds) / member.speed if all(speeds) else float(len(speeds))
        reached = self._pool.steps
        granted = m.Granted(
            turn.clock, state.version, index, turn.clock, member.staleness, 0.0, state.stop, lease, reached, pace
        )
        member.granted = tuple(granted)
        out.append((to, granted))
