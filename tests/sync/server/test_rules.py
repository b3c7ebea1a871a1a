"""What each mode computes, against a few lines in fp64; and where values are kept."""

import itertools
import math

import pytest
import torch

from paceline.comm.boxes import Part, block
from paceline.optim.adamw import AdamW
from paceline.optim.sgd import SGD
from paceline.sync.server import messages as m
from paceline.sync.server.client import COORDINATOR, Client
from paceline.sync.server.codec import Boxed
from paceline.sync.server.coordinator import Coordinator
from paceline.sync.server.log import MemoryLog
from paceline.sync.server.place import Places
from paceline.sync.server.rules import Rules
from paceline.sync.server.shard import ServerShard
from paceline.sync.server.store import Delay, TensorStore
from tolerances import FP64_EQUAL

SHAPES = {"embedding": (7, 4), "norm": (4,), "matrix": (3, 5, 2), "scalar": ()}
NDIMS = {name: len(shape) for name, shape in SHAPES.items()}


class Local:
    """A whole server in this process: a request is answered when all that follows from it has been done."""

    def __init__(self, rules, *, optimizer=None, delay=None, largest_bytes=40):
        self.rules = rules
        self.places = Places(SHAPES, rules.shards, value_bytes=8, largest_bytes=largest_bytes)
        self.logs = [MemoryLog() for _ in range(rules.shards)]
        self._make = lambda pieces: TensorStore(
            pieces, NDIMS, optimizer or SGD(lr=1.0), torch.float64, delay or Delay()
        )
        self.coordinator = Coordinator(rules)
        self.shards = [self.started(number) for number in range(rules.shards)]
        self.answers = {}
        self.serial = itertools.count()
        self.cuts = [self.places.cuts(dict.fromkeys(SHAPES), list(SHAPES), n) for n in range(rules.shards)]

    def started(self, number):
        return ServerShard(number, self._make(self.places.pieces[number]), self.logs[number])

    def settle(self):
        moved = True
        while moved:
            moved = False
            for shard in self.shards:
                self.note(self.coordinator.handle(("shard", shard.number), shard.next_fetch()))
                self.coordinator._fetches.clear()
                first = shard.index + 1 - self.coordinator._state.first
                entries = tuple(self.coordinator._state.entries[first:])
                if entries:
                    answer = m.Entries(shard.index + 1, entries)
                    self.note(shard.follow(answer))
                    moved = True

    def note(self, out):
        self.answers.update({to: answer for to, answer in out if isinstance(to, int)})

    def ask(self, exchange):
        """The result of an exchange, or None if it has to wait; ``again`` goes on with it."""
        try:
            asked = next(exchange)
            while True:
                serials = [self.tell(server, request) for server, request in asked]
                self.settle()
                if not all(serial in self.answers for serial in serials):
                    return None
                asked = exchange.send([self.answers[serial] for serial in serials])
        except StopIteration as stop:
            return stop.value

    def tell(self, server, request):
        serial = next(self.serial)
        self.note((self.coordinator if server == COORDINATOR else self.shards[server]).handle(serial, request))
        return serial

    def payloads(self, gradient):
        return [Boxed(cuts.boxes, flattened(gradient, cuts)) for cuts in self.cuts]

    def read(self, client, granted):
        parts = self.ask(client.pull(granted, [(cuts.boxes, None) for cuts in self.cuts]))
        whole = {name: torch.full(shape, math.nan, dtype=torch.float64) for name, shape in SHAPES.items()}
        for cuts, part in zip(self.cuts, parts, strict=True):
            flat = torch.cat([piece.reshape(-1) for piece in part])
            for name, slot, values in cuts.split(flat):
                whole[name][slot] = values
        return whole


def flattened(gradient, cuts):
    parts = [gradient[name][slot].reshape(-1) for name, slot in cuts.slots]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def random(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


class Worker:
    def __init__(self, server, number):
        staleness = None if server.rules.mode == "async" else server.rules.staleness
        self.server = server
        self.client = Client(number, 1, 0, shards=server.rules.shards, staleness=staleness)
        server.ask(self.client.join())
        self.number = self.clock = 0

    def turn(self, clock=None):
        self.granted = self.server.ask(self.client.turn(self.clock if clock is None else clock))
        return self.granted

    def read(self):
        return self.server.read(self.client, self.granted)

    def push(self, gradient, *, targets=1.0, rate=1.0):
        self.number += 1
        self.server.ask(self.client.stage(self.number, self.server.payloads(gradient)))
        clock = self.granted.clock
        self.clock = clock + 1
        return self.server.ask(self.client.commit(self.number, clock=clock, targets=targets, rate=rate)).kept


def close(one, other, tolerance=FP64_EQUAL):
    for name in SHAPES:
        assert torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance), name


def minus(theta, *terms):
    return {name: theta[name] - sum(weight * gradient[name] for weight, gradient in terms) for name in SHAPES}


def zeros():
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("mode", ["sync", "stale"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_clock_is_one_step_with_the_mean_over_the_targets(mode, shards):
    """Stale with a bound of 0 is sync."""
    server = Local(Rules(workers=3, shards=shards, mode=mode))
    workers = [Worker(server, i) for i in range(3)]
    expected = zeros()
    for clock in range(3):
        gradients = [random(10 * clock + i) for i in range(3)]
        assert all(worker.turn() for worker in workers)
        for i in (2, 0, 1):  # in whatever order they come
            close(workers[i].read(), expected)
            assert workers[i].push(gradients[i], targets=i + 1)
        expected = minus(expected, *((w / 6, g) for w, g in zip((1, 2, 3), gradients, strict=True)))
    workers[0].turn()
    close(workers[0].read(), expected)
    assert server.coordinator.histogram == {0: 9}


def test_clipping_is_by_the_norm_of_the_sum_on_all_shards():
    server = Local(Rules(workers=2, shards=2, clip_norm=0.5))
    workers = [Worker(server, i) for i in range(2)]
    gradients = [random(i) for i in range(2)]
    for worker, gradient in zip(workers, gradients, strict=True):
        worker.turn()
        worker.push(gradient)
    granted = workers[1].turn()
    norm = math.sqrt(sum(float((gradients[0][n] / 2 + gradients[1][n] / 2).square().sum()) for n in SHAPES))
    assert granted.norm == pytest.approx(norm, rel=1e-12)
    close(workers[1].read(), minus(zeros(), *((0.5 / norm / 2, g) for g in gradients)))


def test_the_first_are_taken_and_the_late_are_told_and_dropped():
    server = Local(Rules(workers=3, shards=2, backups=1))
    workers = [Worker(server, i) for i in range(3)]
    gradients = [random(i) for i in range(3)]
    assert all(worker.turn() for worker in workers)
    assert workers[2].push(gradients[2]) and workers[0].push(gradients[0])
    assert workers[0].turn(1).clock == 1
    assert not workers[1].push(gradients[1]), "clock 0 is closed"
    assert workers[1].turn(1).clock == 1
    close(workers[1].read(), minus(zeros(), (0.5, gradients[0]), (0.5, gradients[2])))
    assert server.coordinator.dropped == 1
    assert not any(shard._staged for shard in server.shards)


@pytest.mark.parametrize("mode", ["sync", "stale", "async"])
def test_a_push_without_targets_ticks_the_clock_and_no_more(mode):
    server = Local(Rules(workers=2, shards=2, mode=mode))
    workers = [Worker(server, i) for i in range(2)]
    for clock in range(3):
        for worker in workers:
            worker.turn()
        workers[0].push(random(clock), targets=0.0 if clock < 2 else 1.0)
        workers[1].push(random(9), targets=0.0)
    for worker in workers:
        assert worker.turn().clock == 3
    close(workers[0].read(), minus(zeros(), (1.0, random(2))))
    assert not any(shard._staged for shard in server.shards)


def test_who_is_dropped_goes_on_with_the_clock_that_is_open():
    server = Local(Rules(workers=2, shards=1, backups=1))
    fast, slow = Worker(server, 0), Worker(server, 1)
    slow.turn()
    for _ in range(3):
        fast.turn()
        assert fast.push(random(0))
    assert not slow.push(random(1))
    assert slow.turn().clock == 3


@pytest.mark.parametrize("bound", [1, 2])
def test_a_fast_worker_runs_ahead_by_the_bound_and_reads_its_own(bound):
    server = Local(Rules(workers=2, shards=2, mode="stale", staleness=bound))
    fast, slow = Worker(server, 0), Worker(server, 1)
    slow.turn()
    gradients, expected = [random(i) for i in range(4)], zeros()
    for clock in range(bound + 1):
        assert fast.turn().clock == clock
        close(fast.read(), expected)
        fast.push(gradients[clock])
        expected = minus(expected, (0.5, gradients[clock]))  # its share of two workers
    assert fast.turn() is None, "it is ahead by the bound"
    slow.push(random(9))
    assert fast.turn().clock == bound + 1
    close(fast.read(), minus(expected, (0.5, random(9))))
    histogram = server.coordinator.histogram
    assert sum(histogram.values()) == bound + 2 and max(histogram) == bound


def test_one_that_leaves_is_not_waited_for():
    server = Local(Rules(workers=2, shards=1, mode="stale", staleness=0))
    here, gone = Worker(server, 0), Worker(server, 1)
    gone.turn()
    here.turn()
    here.push(random(0))
    assert here.turn() is None
    server.ask(gone.client.leave())
    assert here.turn().clock == 1
    again = Client(1, 2, 0, shards=1, staleness=0)
    assert server.ask(again.join()).clock == 1, "it begins where the slowest of the others is"


@pytest.mark.parametrize("scaled", [False, True])
def test_asynchronous_pushes_are_steps_of_their_own(scaled):
    server = Local(Rules(workers=3, shards=2, mode="async", scaled=scaled))
    workers = [Worker(server, i) for i in range(3)]
    expected = zeros()
    for worker in workers:
        worker.turn()
    for staleness, worker in enumerate(workers):
        gradient = random(staleness)
        worker.push(gradient, targets=7, rate=0.5)
        expected = minus(expected, (0.5 / (staleness + 1 if scaled else 1), gradient))
    for worker in workers:
        worker.turn()
        close(worker.read(), expected)
    assert server.coordinator.histogram == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("kind", ["constant", "adaptive"])
def test_delay_is_compensated_from_what_the_worker_had_read(kind):
    server = Local(Rules(workers=2, shards=2, mode="async"), delay=Delay(kind=kind, strength=0.3, decay=0.9))
    one, other = Worker(server, 0), Worker(server, 1)
    one.turn()
    other.turn()
    first, late, last = random(0), random(1), random(2)
    one.push(first)
    other.push(late)  # at the start's weights, while those of now are minus the first
    one.turn()
    one.push(last)
    theta, backups, mean_square = zeros(), [zeros(), zeros(), None], zeros()
    for gradient, backup in zip((first, late, last), backups, strict=True):
        now = theta if backup is None else backup
        mean_square = {n: 0.9 * mean_square[n] + 0.1 * gradient[n] ** 2 for n in SHAPES}
        strength = {n: 0.3 / (mean_square[n] + 1e-7).sqrt() if kind == "adaptive" else 0.3 for n in SHAPES}
        theta = {n: theta[n] - gradient[n] - strength[n] * gradient[n] ** 2 * (theta[n] - now[n]) for n in SHAPES}
    other.turn()
    close(other.read(), theta, 1e-10)


def test_the_optimizer_treats_pieces_as_it_would_the_whole():
    """AdamW with decay for matrices only, cut in pieces over three shards, against torch's on whole tensors."""
    options = AdamW(lr=0.1, weight_decay=0.5)
    server = Local(Rules(workers=1, shards=3), optimizer=options)
    start = random(5)
    for shard, payload in zip(server.shards, server.payloads(start), strict=True):
        shard.store.fill(None, payload)
    whole = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    reference = options.build(whole, None)
    worker = Worker(server, 0)
    for clock in range(4):
        worker.turn()
        gradient = random(clock)
        if clock == 2:
            server.shards[1] = server.started(1)  # comes back from its log
            for n, payload in enumerate(server.payloads(start)):
                if n == 1:
                    server.shards[1].store.fill(None, payload)
            server.settle()
        worker.push(gradient, rate=1.0 / (clock + 1))
        for group in reference.param_groups:
            group["lr"] = 0.1 / (clock + 1)
        for name, parameter in whole.items():
            parameter.grad = gradient[name].clone()
        reference.step()
    worker.turn()
    close(worker.read(), {name: parameter.detach() for name, parameter in whole.items()})


def test_a_parameter_of_which_no_push_has_a_gradient_is_left_alone():
    options = AdamW(lr=0.1, weight_decay=0.5)
    places = Places(SHAPES, 1, value_bytes=8)
    store = TensorStore(places.pieces[0], NDIMS, options, torch.float64)
    store.flat.fill_(1.0)
    cuts = places.cuts(dict.fromkeys(SHAPES), ["norm"], 0)
    shard = ServerShard(0, store)
    shard.handle(None, m.Stage(m.Push(0, 1, 1), 0, Boxed(cuts.boxes, torch.ones(4, dtype=torch.float64))))
    terms = (m.Term(m.Push(0, 1, 1), 1.0, 0),)
    shard.follow(m.Entries(1, (m.Update(1, terms, 1.0, False),)))
    (embedding,) = store.read(None, (places.cuts(dict.fromkeys(SHAPES), ["embedding"], 0).boxes, None))
    (norm,) = store.read(None, (cuts.boxes, None))
    assert (embedding == 1.0).all() and (norm < 1.0).all()


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("largest", [8, 40, 1 << 20])
def test_pieces_are_balanced_and_every_value_is_in_one(shards, largest):
    places = Places(SHAPES, shards, value_bytes=8, largest_bytes=largest)
    seen = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    loads = []
    for pieces in places.pieces:
        loads.append(sum(piece.numel for piece in pieces))
        for piece in pieces:
            seen[piece.name][tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))] += 1
            assert piece.numel * 8 <= largest
    assert all((count == 1).all() for count in seen.values())
    assert max(loads) - min(loads) <= max(p.numel for pieces in places.pieces for p in pieces)


def test_a_rank_talks_of_its_own_boxes_whatever_they_are():
    """Two ranks hold a matrix by every other pair of columns; what they send is the whole."""
    places = Places({"w": (6, 8)}, 2, value_bytes=8, largest_bytes=100)
    full = torch.arange(48.0).view(6, 8)
    stores = [TensorStore(pieces, {"w": 2}, SGD(), torch.float32) for pieces in places.pieces]
    for rank in range(2):
        starts = [0 + 2 * rank, 4 + 2 * rank]
        local = torch.cat([full[:, s : s + 2] for s in starts], 1)
        blocks = tuple(block((6, 2), (0, s)) for s in starts)
        blocks = tuple(type(b)(b.start, b.shape, (0, 2 * i)) for i, b in enumerate(blocks))
        for number, store in enumerate(stores):
            cuts = places.cuts({"w": Part((6, 8), blocks)}, ["w"], number)
            store.fill(None, Boxed(cuts.boxes, torch.cat([local[slot].reshape(-1) for _, slot in cuts.slots])))
    for number, store in enumerate(stores):
        cuts = places.cuts({"w": None}, ["w"], number)
        flat = torch.cat([part.reshape(-1) for part in store.read(None, (cuts.boxes, None))])
        for _, slot, values in cuts.split(flat):
            assert torch.equal(values, full[slot])
