"""Servers behind real sockets: tensors arrive whole by TCP and by shared memory, and a killed server comes back."""

import os
import signal
import socket
import threading

import pytest
import torch

from paceline.errors import LinkError, TrainError
from paceline.sync.server import messages as m
from paceline.sync.server.ask import Caller
from paceline.sync.server.channel import Channel
from paceline.sync.server.client import GivenUp
from paceline.sync.server.codec import Boxed, pack, padded, raw, unpack
from paceline.sync.server.files import FileLog
from paceline.sync.server.keep import ServerThreads
from paceline.sync.server.leases import Leases
from paceline.sync.server.place import Places
from paceline.sync.server.rules import Rules
from paceline.sync.server.store import Delay
from paceline.sync.server.wire import Inbox, frame, read_frame
from servers import children, processes

SHAPES = {"embedding": (90, 40), "norm": (40,), "matrix": (33, 5, 2), "scalar": ()}
TIMEOUT_S = 30.0


def random(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def channel(addresses, rules, *, worker=0, shared=False, timeout_s=TIMEOUT_S, tables=frozenset()):
    caller = Caller(addresses, timeout_s=timeout_s)
    places = Places(SHAPES, rules.shards, largest_bytes=2_000, tables=tables)
    held = dict.fromkeys(SHAPES)
    made = Channel(caller, places, held, dtype=torch.float32, worker=worker, rank=0, rules=rules, shared=shared)
    return caller, made


class Worker:
    """Pushes made-up gradients, and reads."""

    def __init__(self, addresses, rules, **options):
        self.caller, self.channel = channel(addresses, rules, **options)
        self.number = self.clock = 0
        self.weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def begin(self, optimizer="sgd", lease_s=None):
        self.channel.set_up(1, optimizer={"name": optimizer, "lr": 0.5}, delay=Delay(), lease_s=lease_s)
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


@pytest.mark.parametrize("shared", [False, True])
def test_rows_go_both_ways_and_outlive_their_servers(shared, tmp_path):
    """Servers are killed in one of two runs of AdamW; rows that are fetched, and all in the end, are the same bits."""
    rules, results = Rules(workers=1, shards=2), []
    for kills in (False, True):
        with processes(2, tmp_path / str(kills)) as (keeper, addresses):
            worker = Worker(addresses, rules, shared=shared, tables=frozenset({"embedding"}))
            worker.begin("adamw")
            worker.join()
            for clock in range(40):  # more than the steps after which all rows catch up
                generator = torch.Generator().manual_seed(clock)
                ids = torch.randperm(SHAPES["embedding"][0], generator=generator)[:6].sort().values
                if kills and clock % 9 == 4:
                    os.kill(children(keeper)[clock % 2], signal.SIGKILL)
                worker.channel.pull(worker.granted, {"embedding": worker.weights["embedding"]}, rows={"embedding": ids})
                results.append(worker.weights["embedding"][ids].clone())
                gradient = random(clock)
                touched = torch.zeros(SHAPES["embedding"])
                touched[ids[::2]] = gradient["embedding"][ids[::2]]
                worker.number += 1
                worker.channel.stage(worker.number, {**gradient, "embedding": touched}, {"embedding": ids})
                worker.caller.run(worker.client.commit(worker.number, clock=clock, targets=1.0, rate=1.0))
                worker.granted = worker.caller.run(worker.client.turn(clock + 1))
            worker.channel.pull(worker.granted, worker.weights)
            results += [worker.weights[name] for name in SHAPES]
            assert worker.channel.pushed_rows == 40 * 3 and worker.channel.all_rows == 40 * 90
            with pytest.raises(TrainError, match=r"\d+ values of embedding have a gradient in rows of no token"):
                worker.channel.stage(41, {"embedding": torch.ones(SHAPES["embedding"])}, {"embedding": ids})
            worker.caller.close()
    half = len(results) // 2
    assert all(torch.equal(one, other) for one, other in zip(results[:half], results[half:], strict=True))


def test_one_that_has_hung_up_is_not_waited_for_and_comes_back(tmp_path):
    """Also when the server that knew of it was killed since. What it had staged is void, its numbers go on."""
    rules = Rules(workers=2, shards=2, mode="stale", staleness=0)
    with processes(2, tmp_path) as (keeper, addresses):
        here, gone = (Worker(addresses, rules, worker=i) for i in range(2))
        here.begin(lease_s=0.3)
        for worker in (here, gone):
            worker.join()
        for worker in (here, gone):
            worker.push(random(worker.clock))
        here.read()
        gone.read()
        gone.channel.stage(2, random(7))
        gone.caller.close()
        here.push(random(1))
        os.kill(children(keeper)[0], signal.SIGKILL)
        here.read()  # as soon as the other is given up
        assert (here.granted.clock, here.granted.floor) == (2, 2)
        with pytest.raises(GivenUp, match="worker 1 is not here: join first"):
            gone.caller.run(gone.client.commit(2, clock=1, targets=1.0, rate=1.0))
        assert gone.channel.told()[0]["lives"] == {0: 1, 1: 1}
        gone.client = gone.channel.join(2)
        assert gone.caller.run(gone.client.join()) == m.Joined(1, 2)
        gone.clock = 2
        gone.read()
        expected = {
            n: random(99)[n] - 0.5 * random(0)[n] - 0.5 * random(1)[n] for n in SHAPES
        }  # of both, then of one that was alone
        for name in SHAPES:
            assert torch.equal(gone.weights[name], here.weights[name])
            assert torch.allclose(gone.weights[name], expected[name], rtol=1e-5, atol=1e-6)
        gone.number = 1
        for worker in (here, gone):
            worker.push(random(2))
        for worker in (here, gone):
            worker.read()
            assert worker.granted.version == 3
            worker.caller.close()


def test_a_lease_is_over_once_and_only_of_who_has_hung_up():
    first, second = object(), object()
    leases = Leases(10.0, {2: 5}, now_s=0.0)
    leases.heard(0, 1, first)
    leases.heard(1, 1, second)
    leases.hung_up(first, 3.0)
    assert leases.over(9.0) == [] and leases.over(11.0) == [(2, 5)]
    leases.heard(0, 1, second)
    assert leases.over(99.0) == []
    leases.hung_up(second, 100.0)
    assert sorted(leases.over(111.0)) == [(0, 1), (1, 1)] and leases.over(200.0) == []
    assert Leases(None, {0: 1}, 0.0).over(1e9) == []


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


def logged(folder, numbers):
    log = FileLog(folder, longest_bytes=1 << 30)
    log.replace({"at": torch.arange(2_000.0)})
    for number in numbers:
        log.append(m.Stage(m.Push(0, 1, number), 0, torch.full((3_000,), float(number))))
    (snapshot,), (records,) = folder.glob("snapshot-*.bin"), folder.glob("records-*.bin")
    return snapshot, records


@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 0.5, 0.99, 0.9999])
def test_a_byte_that_has_changed_in_a_log_is_named_and_nothing_goes_on_from_it(share, tmp_path):
    """In the lengths, the words, the values or the checksum of any record, the last too; and in a snapshot."""
    for path in logged(tmp_path, range(3)):
        whole = bytearray(path.read_bytes())
        at = int(share * len(whole))
        for change in (0x01, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            with pytest.raises(
                LinkError, match=rf"{path.name}: the record at byte [\d,]+ is not what was written.*anew"
            ):
                FileLog(tmp_path, longest_bytes=1 << 30).read()
        path.write_bytes(whole)
    assert len(list(FileLog(tmp_path, longest_bytes=1 << 30).read()[1])) == 3


def test_room_that_a_file_was_given_and_never_filled_is_cut_off(tmp_path):
    """As a file system may leave it when the machine dies before a record is on the disk."""
    _, path = logged(tmp_path, range(3))
    whole = path.read_bytes()
    each = len(whole) // 3
    for kept in (2 * each, 2 * each + 5_000):
        path.write_bytes(whole[:kept] + bytes(len(whole) - kept))
        assert len(list(FileLog(tmp_path, longest_bytes=1 << 30).read()[1])) == 2
        assert path.stat().st_size == 2 * each


def test_a_server_whose_log_is_damaged_ends_the_run_with_the_reason(tmp_path):
    with processes(1, tmp_path) as (keeper, addresses):
        worker = Worker(addresses, Rules(workers=1, shards=1))
        worker.begin()
        worker.join()
        worker.push(random(0))
        (snapshot,) = tmp_path.glob("server-0/shard/snapshot-*.bin")
        with snapshot.open("r+b") as file:
            file.seek(snapshot.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        os.kill(children(keeper)[0], signal.SIGKILL)
        ended = os.waitid(os.P_PID, keeper, os.WEXITED | os.WNOWAIT)
        assert ended is not None and ended.si_status == 1
        worker.caller.close()
    assert "snapshot-1.bin: the record at byte 0 is not what was written" in (tmp_path / "damaged.txt").read_text()


def test_last_words_are_heard_although_who_said_them_is_gone():
    ours, theirs = socket.socketpair()
    with ours:
        for buffer in frame(7, m.Refused("no room")):
            theirs.sendall(buffer)
        theirs.close()
        ours.setblocking(False)
        inbox = Inbox()
        ((header, body),) = inbox.receive(ours)
        assert read_frame(header, body, None) == (7, m.Refused("no room"))
        with pytest.raises(ConnectionResetError, match="the other end is gone"):
            inbox.receive(ours)
