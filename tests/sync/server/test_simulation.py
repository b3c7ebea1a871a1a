"""Ten thousand schedules, and that a server whose logic is broken in some way is caught in one of few, made small."""

from dataclasses import replace

import pytest

import simulate
from paceline.sync.server import messages as m
from paceline.sync.server.coordinator import Coordinator
from paceline.sync.server.delayed_nesterov import Window
from paceline.sync.server.local import LocalCoordinator
from paceline.sync.server.rules import LocalRules, Rules
from paceline.sync.server.shard import ServerShard
from paceline.sync.server.table import Table

CHUNKS, EACH = 5, 2_000


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_all_promises_are_kept_in_every_schedule(chunk):
    for seed in range(chunk * EACH, (chunk + 1) * EACH):
        case = simulate.Case.of(seed)
        what = simulate.broken(case)
        assert what is None, simulate.told(simulate.shrunk(case))


class KeepsDecided(ServerShard):
    """Takes a push that comes again, after it was decided on, for a new one, and keeps it for ever."""

    def _stage(self, request):
        self._log.append(request)
        self._staged.setdefault(request.push, {})[request.rank] = request.payload


class ForgetsStaged(ServerShard):
    """Acknowledges a push before it is in the log."""

    def _stage(self, request):
        log, self._log = self._log, simulate.MemoryLog()
        super()._stage(request)
        self._log = log


class TornReads(ServerShard):
    """Reads what there is now, not the version that was pinned."""

    def _answer_pulls(self):
        self._copies = dict.fromkeys(self._copies, self.store.copy())
        return super()._answer_pulls()


class NoBound(Coordinator):
    """Lets everyone run."""

    def _is_within(self, clock, floor):
        return True


class CountsTheDead(Coordinator):
    """Waits for a worker that has left."""

    def _floor(self):
        return min(member.clock for member in self._state.members)

    def _is_closed(self):
        return all(member.clock > self._state.round for member in self._state.members)


class KeepsLate(Coordinator):
    """Adds a late gradient to whatever clock is open."""

    def _commit(self, to, request, out):
        if self.rules.mode == "sync":
            request = request._replace(clock=max(request.clock, self._state.round))
        super()._commit(to, request, out)


class TakesOldLives(Coordinator):
    """Lets a delayed message of an earlier life speak for the worker."""

    def _living(self, to, worker, life, out):
        return self._state.members[worker]


class CommitsTwice(Coordinator):
    """Takes every commit for a new one."""

    def _commit(self, to, request, out):
        member = self._state.members[request.push.worker]
        if request.push.number == member.number:
            member.number -= 1
        super()._commit(to, request, out)


class LosesLeases(LocalCoordinator):
    """Forgets what a worker that is gone had to learn from."""

    def _gone(self, member):
        member.lease = None


class LearnsTwice(LocalCoordinator):
    """Gives out again what was pushed by a worker that was started anew."""

    def _done(self, member, commit):
        if member.life > 1:
            self._pool.give_back(member.lease)
        super()._done(member, commit)


class MeetsEarly(LocalCoordinator):
    """Does not wait for who is still at work."""

    def _grant(self, out):
        if self._pool.left == 0 and self._turns and not self._state.pending:
            return self._meet(sorted(self._turns), out)
        return super()._grant(out)


class ForgetsWindow(LocalCoordinator):
    """Begins a new window where it comes back from a snapshot."""

    def _restore(self, saved):
        super()._restore(saved)
        self._window = Window(self._local.delay)


class ForgetsNumbers(Coordinator):
    """Takes one that comes back for a new worker."""

    def _join(self, to, request, out):
        member = self._state.members[request.worker]
        if request.life > member.life and not member.alive:
            member.number = 0
        super()._join(to, request, out)


class WaitsToMeetAgain(Coordinator):
    """Lets one that came back to a clock wait for the others to meet there once more."""

    def _grant(self, out):
        meeting = {worker: turn.clock for worker, (_, turn) in self._turns.items() if turn.meet}
        alive = {i for i, member in enumerate(self._state.members) if member.alive}
        if meeting and (meeting.keys() != alive or len(set(meeting.values())) > 1):
            kept = {worker: self._turns.pop(worker) for worker in meeting}
            done = super()._grant(out)
            self._turns |= kept
            return done
        return super()._grant(out)


class IgnoresTheGivenUp(ServerShard):
    """Does not tell one that reads that it was given up."""

    def _answer_pulls(self):
        return [(to, answer) for to, answer in super()._answer_pulls() if not isinstance(answer, m.Refused)]


BROKEN = [
    {"coordinator": ForgetsNumbers},
    {"coordinator": WaitsToMeetAgain},
    {"shard": IgnoresTheGivenUp},
    {"shard": ForgetsStaged},
    {"shard": TornReads},
    {"shard": KeepsDecided},
    {"coordinator": NoBound},
    {"coordinator": CountsTheDead},
    {"coordinator": KeepsLate},
    {"coordinator": TakesOldLives},
    {"coordinator": CommitsTwice},
    {"local": LosesLeases},
    {"local": LearnsTwice},
    {"local": MeetsEarly},
    {"local": ForgetsWindow},
]


@pytest.mark.parametrize("logic", BROKEN, ids=lambda logic: next(iter(logic.values())).__name__)
def test_broken_logic_is_caught_and_its_schedule_made_small(logic, monkeypatch):
    monkeypatch.setattr(simulate, "MOST_EVENTS", 4_000)
    caught = next(case for seed in range(5_000) if simulate.broken(case := simulate.Case.of(seed), **logic))
    small = simulate.shrunk(caught, **logic)
    assert simulate.broken(small, **logic)
    assert small.faults - len(small.muted) <= caught.faults and small.clocks <= caught.clocks
    assert all(simulate.broken(simpler, **logic) is None for simpler in simulate._simpler(small))
    story = simulate.told(small, **logic)
    assert story.count("\n") > 5 and story.startswith("Case(")
    assert simulate.told(small, **logic) == story, "a schedule is the same every time"
    assert simulate.broken(small) is None, "the logic itself keeps its promises in it"


@pytest.mark.parametrize("method", ["_set_aside", "_catch_up"])
def test_rows_that_are_not_set_aside_or_do_not_catch_up_are_noticed(method, monkeypatch):
    cases = [replace(case, rows=True) for seed in range(40) if (case := simulate.Case.of(seed)).rules.local is None]
    assert not any(map(simulate.broken, cases))
    monkeypatch.setattr(Table, method, lambda self, *rest: None)
    assert any(map(simulate.broken, cases))


def test_a_schedule_without_faults_is_one_without_faults():
    case = replace(simulate.Case.of(3), faults=0)
    simulation = simulate.Simulation(case)
    simulation.run()
    assert simulation.happened == 0 and simulation.read_versions


def test_pushes_in_turns_are_the_same_in_every_schedule():
    """Whatever arrives when: what is applied in which order, and what each worker reads."""
    rules = Rules(workers=3, shards=2, mode="local", local=LocalRules(every=2, ordered=True, delay=2))
    seen = set()
    for seed in range(40):
        simulation = simulate.Simulation(simulate.Case(seed, rules, ranks=2, clocks=7, faults=0, meets=5))
        simulation.run()
        seen.add((tuple(push[::2] for push in simulation.content), tuple(sorted(simulation.read_versions))))
    ((content, _),) = seen
    assert content == tuple((worker, number) for number in range(1, 5) for worker in range(3))
