"""Servers behind real sockets: tensors arrive whole by TCP and by shared memory, and a killed server comes back."""

import os
import signal
import socket
import threading

import pytest
import torch

from paceline.errors import LinkError
from paceline.sync.server import messages as m
from paceline.sync.server.ask import Caller
from paceline.sync.server.channel import Channel
from paceline.sync.server.codec import Boxed, pack, padded, raw, unpack
from paceline.sync.server.coordinator import Rules
from paceline.sync.server.files import FileLog
from paceline.sync.server.keep import ServerThreads
from paceline.sync.server.place import Places
from paceline.sync.server.store import Delay
from paceline.sync.server.wire import frame
from servers import children, processes

SHAPES = {"embedding": (90, 40), "norm": (40,), "matrix": (33, 5, 2), "scalar": ()}
TIMEOUT_S = 30.0


def random(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def channel(addresses, rules, *, worker=0, shared=False, timeout_s=TIMEOUT_S):
    caller = Caller(addresses, timeout_s=timeout_s)
    places = Places(SHAPES, rules.shards, largest_bytes=2_000)
    held = dict.fromkeys(SHAPES)
    made = Channel(caller, places, held, dtype=torch.float32, worker=worker, rank=0, rules=rules, shared=shared)
    return caller, made


class Worker:
    """Pushes made-up gradients, and reads."""

    def __init__(self, addresses, rules, **options):
        self.caller, self.channel = channel(addresses, rules, **options)
        self.number = self.clock = 0
        self.weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def begin(self, optimizer="sgd"):
        self.channel.set_up(1, optimizer={"name": optimizer, "lr": 0.5}, delay=Delay())
        self.channel.fill(None, random(99))
        self.channel.ready({})

    def join(self):
        self.client = self.channel.join(1)
        self.read()

    def read(self):
        self.granted = self.caller.run(self.client.turn(self.clock))
        self.channel.pull(self.granted, self.weights)

    def push(self, gradient):
        self.number += 1
        self.channel.stage(self.number, gradient)
        self.caller.run(self.client.commit(self.number, clock=self.clock, targets=1.0, rate=1.0))
        self.clock += 1


@pytest.mark.parametrize("shared", [False, True])
def test_two_workers_and_three_servers(shared):
    """Synchronous SGD: after each clock both have the start minus the rate times the mean."""
    rules = Rules(workers=2, shards=3)
    expected = random(99)
    with ServerThreads(3) as servers:
        workers = [Worker(servers.addresses, rules, worker=i, shared=shared) for i in range(2)]
        workers[0].begin()
        for worker in workers:
            worker.join()
        for clock in range(3):
            gradients = [random(2 * clock + i) for i in range(2)]
            threads = [
                threading.Thread(target=lambda w=w, g=g: (w.push(g), w.read()))
                for w, g in zip(workers, gradients, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT_S)
            expected = {n: expected[n] - 0.5 * (gradients[0][n] + gradients[1][n]) / 2 for n in SHAPES}
            for worker in workers:
                for name in SHAPES:
                    assert torch.allclose(worker.weights[name], expected[name], rtol=1e-5, atol=1e-6)
        assert workers[0].channel.told()[0]["histogram"] == {0: 6}
        assert workers[0].caller.sent_bytes == 4 * sum(t.numel() for t in expected.values()) * 4  # filled, three pushes
        for worker in workers:
            worker.caller.close()


@pytest.mark.parametrize("shared", [False, True])
def test_killed_servers_come_back_and_nothing_is_lost_or_twice(shared, tmp_path):
    """AdamW, whose moments must come back too: kill -9 of one server after another, then of both, against one never
    killed. What is compared is every bit."""
    rules = Rules(workers=1, shards=2, mode="sync")
    results = []
    for kills in (False, True):
        with processes(2, tmp_path / str(kills)) as (keeper, addresses):
            worker = Worker(addresses, rules, shared=shared)
            worker.begin("adamw")
            worker.join()
            for clock in range(6):
                if kills:
                    pids = children(keeper)
                    assert len(pids) == 2
                    for pid in pids if clock == 4 else pids[clock % 2 :][:1]:
                        os.kill(pid, signal.SIGKILL)
                worker.push(random(clock))
                worker.read()
            assert worker.granted.version == 6
            results.append(worker.weights)
            worker.caller.close()
    for name in SHAPES:
        assert torch.equal(results[0][name], results[1][name]), name


def test_a_server_killed_before_it_was_filled_says_so(tmp_path):
    """It must not come back with zeros for weights."""
    with processes(1, tmp_path) as (keeper, addresses):
        worker = Worker(addresses, Rules(workers=1, shards=1))
        worker.channel.set_up(1, optimizer={"name": "sgd", "lr": 0.5}, delay=Delay())
        (pid,) = children(keeper)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LinkError, match="has not been set up"):
            worker.channel.fill(None, random(0))
        worker.caller.close()


def test_a_server_that_does_not_answer_is_named():
    with ServerThreads(1) as servers:
        worker = Worker(servers.addresses, Rules(workers=2, shards=1), timeout_s=0.3)
        worker.begin()
        worker.join()
        worker.push(random(0))
        with pytest.raises(LinkError, match=r"parameter server 0 at 127.0.0.1:\d+ did not answer within 0.3 s"):
            worker.read()  # the other worker never comes
        worker.caller.close()


def test_a_server_that_was_not_set_up_says_so():
    with ServerThreads(1) as servers:
        worker = Worker(servers.addresses, Rules(workers=1, shards=1))
        with pytest.raises(LinkError, match="has not been set up"):
            worker.channel.fill(None, random(0))
        worker.caller.close()


def test_a_frame_that_comes_byte_by_byte():
    """And one that is cut off leaves the server at work."""
    with ServerThreads(1) as servers:
        worker = Worker(servers.addresses, Rules(workers=1, shards=1))
        worker.begin()
        words = b"".join(bytes(part) for part in frame(7, m.Ask()))
        with socket.create_connection(servers.addresses[0], timeout=TIMEOUT_S) as slow:
            for i in range(len(words)):
                slow.sendall(words[i : i + 1])
            assert b"histogram" in slow.recv(1 << 16)
        with socket.create_connection(servers.addresses[0]) as cut:
            cut.sendall(words[: len(words) // 2])
        worker.join()
        worker.caller.close()


def test_states_and_messages_come_back_as_they_were():
    push = m.Push(1, 2, 3)
    boxes = ((0, (1, 0), (2, 3)),)
    value = {
        "stage": m.Stage(push, 0, Boxed(boxes, torch.arange(6.0))),
        "pairs": [(1, torch.tensor([1.5], dtype=torch.float64)), (2, torch.empty(0))],
        "number": {3: None, 4: True},
        "half": torch.ones(2, 2, dtype=torch.bfloat16),
    }
    header, tensors = pack(value)
    body = bytearray(b"".join(bytes(raw(t)) + bytes(padded(t.nbytes) - t.nbytes) for t in tensors))
    back = unpack(header, body)
    assert back["stage"].push == push and back["stage"].payload.boxes == boxes
    assert torch.equal(back["stage"].payload.flat, torch.arange(6.0))
    assert back["pairs"][0][1].dtype == torch.float64 and back["number"] == {3: None, 4: True}
    assert torch.equal(back["half"], value["half"])


def test_a_record_that_was_cut_off_is_left_out(tmp_path):
    log = FileLog(tmp_path, longest_bytes=1 << 20)
    log.replace({"at": 1})
    for number in range(3):
        log.append(m.Stage(m.Push(0, 1, number), 0, torch.full((5,), float(number))))
    (records,) = tmp_path.glob("records-*.bin")
    whole = records.read_bytes()
    for cut in (1, 100, len(whole) // 3 + 1):
        records.write_bytes(whole[:-cut])
        again = FileLog(tmp_path, longest_bytes=1 << 20)
        snapshot, kept = again.read()
        kept = list(kept)
        assert snapshot == {"at": 1} and [record.push.number for record in kept] == list(range(len(kept)))
        assert len(kept) == 3 - (1 if cut < len(whole) // 3 else 2)
        again.append(m.Stage(m.Push(0, 1, 9), 0, torch.zeros(1)))
        assert [record.push.number for record in again.read()[1]][-1] == 9
