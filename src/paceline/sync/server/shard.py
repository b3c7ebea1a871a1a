"""A shard of the server: a part of the parameters, which follows the coordinator's order.

It keeps pushes that are staged until the order says what becomes of them, and versions as long as a worker reads them.
What it needs to come back from is a snapshot of itself, the pushes staged since, and the coordinator's entries since.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from paceline.sync.server import messages as m
from paceline.sync.server.coordinator import Out
from paceline.sync.server.log import Log, NoLog


class Gradient(NamedTuple):
    """A push as the store sees it."""

    weight: float
    parts: Mapping[int, Any]
    """What each rank of the worker staged."""
    base: Any
    """The copy of the parameters that it is the gradient at; None if these are the parameters of now."""
    worker: int


class Store(Protocol):
    """Parameters and the optimizer's state of one shard."""

    def gather(self, gradients: Sequence[Gradient], *, measured: bool) -> float:
        """Sum gradients for the next step; the squared norm of the sum, if it is to be ``measured``."""
        ...

    def step(self, rate: float, scale: float) -> None:
        """One step of the optimizer, at a share of its peak rate, with the sum times ``scale``."""

    def copy(self) -> Any:
        """The parameters as they are, in memory of their own."""
        ...

    def release(self, copy: Any) -> None:
        """A copy is not read any more."""

    def read(self, copy: Any, wanted: Any) -> Any:
        """What is asked for of a copy, or of the parameters of now (None), in memory of its own."""
        ...

    def save(self, copies: Mapping[int, Any]) -> Any:
        """All it needs to come back, with copies of some versions."""
        ...

    def load(self, saved: Any) -> Mapping[int, Any]:
        """Be as saved; the copies."""
        ...


@runtime_checkable
class OuterStore(Store, Protocol):
    """A store whose workers push what they have moved by."""

    def push(self, window: float) -> None:
        """Go along the sum that was gathered; see ``Update`` for ``window``."""


class ServerShard:
    """Handles one request after the other; ``next_fetch`` is what it wants to ask the coordinator."""

    def __init__(self, number: int, store: Store, log: Log | None = None, *, first_life: int = 0) -> None:
        self.number, self.store = number, store
        self.index = self.version = self._kept = 0
        self._measured: tuple[int, float] | None = None
        self._rate = 1.0
        self._staged: dict[m.Push, dict[int, Any]] = {}
        self._done: dict[int, int] = {}  # by worker: number of the last push decided on
        self._lives: dict[int, int] = {}  # by worker: the first life whose pushes are still wanted
        self._first_life = first_life
        self._pins: dict[int, tuple[int, int, int]] = {}  # by worker: life, entry, version
        self._copies: dict[int, Any] = {}
        self._pulls: list[tuple[Any, m.Pull]] = []
        self._log: Log = NoLog()
        if log is not None:
            self._recover(log)
            self._log = log

    def handle(self, to: Any, request: m.Stage | m.Pull) -> Out:
        """Answers to a request, and to those that have waited for it."""
        if isinstance(request, m.Stage):
            self._stage(request)
            return [(to, m.Done())]
        self._pulls.append((to, request))
        return self._answer_pulls()

    def next_fetch(self) -> m.Fetch:
        """What to ask the coordinator now, and again until it answers."""
        return m.Fetch(self.number, self.index, self._kept, self._measured)

    def follow(self, answer: m.Entries) -> Out:
        """Do what the coordinator says; what of it is known already is passed over."""
        for number, entry in enumerate(answer.entries, answer.first):
            if number == self.index + 1:
                self._do(entry)
                self.index = number
        if not self._log.keeps:
            self._kept = self.index
        elif self._log.is_long and self._measured is None:
            self.keep()
        return self._answer_pulls()

    def keep(self) -> None:
        """Write all of this shard into its log."""
        self._log.replace(self._snapshot())
        self._kept = self.index

    def _stage(self, request: m.Stage) -> None:
        push = request.push
        if push.number <= self._done.get(push.worker, 0) or push.life < self._lives.get(push.worker, self._first_life):
            return  # decided on already, or never to be committed
        parts = self._staged.setdefault(push, {})
        if request.rank not in parts:
            self._log.append(request)
            parts[request.rank] = request.payload

    def _do(self, entry: m.Entry) -> None:
        match entry:
            case m.Update():
                self._begin_update(entry)
            case m.Measured():
                self._finish_update(entry.scale)
            case m.Pin(worker, life):
                self._pins[worker] = (life, self.index + 1, self.version)
                self._release()
            case m.Dropped(push):
                self._decide(push)
                self._release()
            case m.Begun(worker, life, number):
                self._void(worker, life, number)
            case m.Left(worker, life, number):
                self._void(worker, life + 1, number)
                self._pins.pop(worker, None)
                self._release()

    def _begin_update(self, entry: m.Update) -> None:
        gradients = []
        for push, weight, base in entry.terms:
            parts = self._staged.get(push)
            assert parts is not None, f"shard {self.number}: {push} was committed before it was staged"
            at = self._copies.get(base) if base != self.version else None
            gradients.append(Gradient(weight, parts, at, push.worker))
        squares = self.store.gather(gradients, measured=entry.measured) if gradients else 0.0
        for push, _, _ in entry.terms:
            self._decide(push)
        self._release()
        self._rate = entry.rate
        if entry.measured:
            self._measured = (entry.version, squares)
            return
        self._next_version()
        if entry.window is not None:
            assert isinstance(self.store, OuterStore), self.store
            self.store.push(entry.window)
        elif gradients:
            self.store.step(self._rate, 1.0)

    def _finish_update(self, scale: float) -> None:
        self._measured = None
        self._next_version()
        self.store.step(self._rate, scale)

    def _next_version(self) -> None:
        """Keep what is read of the version that ends here."""
        if any(version == self.version for _, _, version in self._pins.values()):
            self._copies[self.version] = self.store.copy()
        self.version += 1

    def _decide(self, push: m.Push) -> None:
        """Its worker has read what it will of the version that it had pinned: all its ranks stage after they have."""
        self._staged.pop(push, None)
        assert push.number == self._done.get(push.worker, 0) + 1, (push, self._done)
        self._done[push.worker] = push.number
        if self._pins.get(push.worker, (0,))[0] == push.life:
            del self._pins[push.worker]

    def _void(self, worker: int, life: int, number: int) -> None:
        """Forget what lives before ``life`` staged after ``number``."""
        self._lives[worker] = life
        for push in [push for push in self._staged if push.worker == worker]:
            if push.life < life and push.number > number:
                del self._staged[push]

    def _release(self) -> None:
        """Forget versions that nobody reads."""
        read = {version for _, _, version in self._pins.values()}
        for version in [version for version in self._copies if version not in read]:
            self.store.release(self._copies.pop(version))

    def _answer_pulls(self) -> Out:
        out: Out = []
        waiting = []
        for to, pull in self._pulls:
            if pull.entry > self.index:
                waiting.append((to, pull))
            elif self._pins.get(pull.worker) == (pull.life, pull.entry, pull.version):
                copy = None if pull.version == self.version else self._copies[pull.version]
                out.append((to, m.Values(pull.version, self.store.read(copy, pull.payload))))
            elif pull.life < self._lives.get(pull.worker, self._first_life):
                out.append((to, m.Refused(f"worker {pull.worker} was given up, or started again, since", join=True)))
            # else a late copy of a request whose answer the worker has had
        self._pulls = waiting
        return out

    def _snapshot(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "version": self.version,
            "staged": [(push, rank, part) for push, parts in self._staged.items() for rank, part in parts.items()],
            "done": list(self._done.items()),
            "lives": list(self._lives.items()),
            "pins": [(worker, *pin) for worker, pin in self._pins.items()],
            "store": self.store.save(self._copies),
        }

    def _recover(self, log: Log) -> None:
        snapshot, records = log.read()
        if snapshot is not None:
            self.index = self._kept = snapshot["index"]
            self.version = snapshot["version"]
            self._done, self._lives = dict(snapshot["done"]), dict(snapshot["lives"])
            self._pins = {worker: (life, index, version) for worker, life, index, version in snapshot["pins"]}
            self._copies = dict(self.store.load(snapshot["store"]))
            for push, rank, part in snapshot["staged"]:  # some may be of lives of which no more is wanted
                self._staged.setdefault(push, {})[rank] = part
        for request in records:
            self._stage(request)
