"""A replica that is killed in the middle of a push: the others go on, and it comes back where they are."""

import math
import multiprocessing
import os
import signal
import traceback
from functools import partial

import torch
from torch.distributed import PrefixStore, TCPStore

from paceline.comm import link
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.optim.adamw import AdamW
from paceline.parallel.precision import Masters
from paceline.schedule.accumulate import Accumulate
from paceline.sync.base import SyncContext
from paceline.sync.parameter_server import ParameterServer
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from parity import CPU, objective, share, tiny_llama
from servers import children, processes

STEPS, DIES_AT, WAITS_AT = 9, 3, 6
TIMEOUT_S = 60.0


class Absent(LocalLink):
    """Of a replica that comes when the others' link has long been formed: it must not be used."""

    def __init__(self, index, size):
        self.index, self.size = index, size

    def count(self, n_bytes):
        pass

    def all_reduce(self, tensor):
        raise AssertionError("there is no link")

    broadcast = all_reduce


def then_die(run, *arguments, **options):
    run(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)


def told_of(line, *arguments):
    """What goes wrong is told too."""
    try:
        replica_of(line, *arguments)
    except Exception:
        line.send(traceback.format_exc())


def replica_of(line, index, mode, port, addresses, comes_back):
    """One of two replicas; what it tells: where it began, its losses, the weights in the end."""
    torch.set_num_threads(1)
    if comes_back:
        between = Absent(index, 2)
    else:
        store = PrefixStore("run", TCPStore("127.0.0.1", port, is_master=False))
        between = link.connect(store, index=index, size=2, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True)
    model = tiny_llama()
    replica = ModuleReplica(Masters(model, torch.float64), AdamW(lr=0.01), mesh=Mesh.alone())
    options = ParameterServer(mode=mode, staleness=1, servers=2, lease_s=0.3, timeout_s=TIMEOUT_S)
    sync = options.build(SyncContext(link=between, steps=STEPS, servers=addresses))
    sync.start(replica)
    goal = objective()
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    line.send(sync.at)
    step, losses = sync.at, []
    while step < STEPS:
        step += 1
        if index == 0 and step == WAITS_AT:
            line.recv()
        if index == 1 and step == DIES_AT and not comes_back:
            sync._servers.caller.run = partial(then_die, sync._servers.caller.run)
        batches = [goal.batch(micro, seed=0, step=step) for micro in share(step, 7, index, 2, 4)]
        losses.append(train_step(replica, sync, schedule, batches, step=step, stop=False).loss)
        step = max(step, sync.at)
    told = sync._channel.told()
    line.send((losses, {s.name: s.local.clone().numpy() for s in replica.shards}, told[0]["histogram"], sync._number))


def test_a_replica_is_killed_between_staging_and_committing_and_comes_back(pool, tmp_path):
    """In both modes; a server is killed as well. Its pushes count once each, the one that it only staged does not."""
    context = multiprocessing.get_context("forkserver")  # the pool's, which has imported everything
    for mode in ("async", "stale"):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with processes(2, tmp_path / mode) as (keeper, addresses):
            started = []

            def start(index, comes_back=False, mode=mode, port=store.port, addresses=addresses, started=started):
                ours, theirs = context.Pipe()
                process = context.Process(target=told_of, args=(theirs, index, mode, port, addresses, comes_back))
                process.start()
                theirs.close()
                started.append(process)
                return process, ours

            try:
                (_, first), (dying, other) = start(0), start(1)
                assert first.recv() == 0 and other.recv() == 0
                dying.join(TIMEOUT_S)
                assert dying.exitcode == -signal.SIGKILL
                os.kill(children(keeper)[1], signal.SIGKILL)
                _, other = start(1, comes_back=True)
                began = other.recv()
                assert began >= DIES_AT - 1
                first.send("go on")
                ends = first.recv(), other.recv()
                assert not any(isinstance(end, str) for end in ends), ends
                (losses, weights, histogram, _), (late, same, _, number) = ends
            finally:
                for process in started:
                    process.kill()
                    process.join()
        assert len(losses) == STEPS and len(late) == STEPS - began
        assert all(map(math.isfinite, losses + late))
        assert number == DIES_AT - 1 + len(late)
        assert sum(histogram.values()) == len(losses) + number
        assert all((weights[name] == same[name]).all() for name in weights)
