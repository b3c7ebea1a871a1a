import os
import signal

import pytest

from paceline.comm.ranks import ALONE, Coordinates
from paceline.errors import WorkerError
from paceline.launch.local import LocalRun


def deaf(coordinates, rendezvous, line):
    """A rank that cannot finish its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line.send("ready")
    while True:
        signal.pause()


def test_a_second_interrupt_ends_ranks_that_do_not_stop(tmp_path):
    run = LocalRun(deaf, [ALONE], port=0, logs=tmp_path)
    messages = run.messages()
    assert next(messages) == (0, {"kind": "ready"})
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(messages)
    with pytest.raises(ProcessLookupError):
        os.kill(run.ranks[0].pid, 0)


def mortal(coordinates, rendezvous, line):
    """A rank that goes on when it is told of in the store, or dies."""
    store = rendezvous.connect()
    if coordinates.replica == 1 and coordinates.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if coordinates.replica == 1:
        signal.pause()  # a rank that waits for the one that died
    line.send("going on")
    store.set(str(coordinates.global_rank), "done")


@pytest.mark.parametrize("is_elastic", [True, False])
def test_a_replica_that_dies_ends_alone_where_a_run_can_go_on_without_it(is_elastic, tmp_path):
    ranks = [Coordinates.of(i, replicas=3, ranks=2, local_rank=i, local_ranks=6) for i in range(6)]
    run = LocalRun(mortal, ranks, port=0, logs=tmp_path, is_elastic=is_elastic)
    if not is_elastic:
        with pytest.raises(WorkerError, match=r"rank 2 \(replica 1\) died: killed by SIGKILL"):
            list(run.messages())
        return
    told = list(run.messages())
    (lost,) = [message["message"] for _, message in told if message["kind"] == "lost"]
    assert "the others go on without replica 1" in lost
    assert sorted(rank for rank, message in told if message["kind"] == "going on") == [0, 1, 4, 5]
    for rank in run.ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank.pid, 0)


def doomed(coordinates, rendezvous, line):
    if coordinates.replica == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_no_run_goes_on_without_its_first_replica(tmp_path):
    ranks = [Coordinates.of(i, replicas=2, ranks=1, local_rank=i, local_ranks=2) for i in range(2)]
    run = LocalRun(doomed, ranks, port=0, logs=tmp_path, is_elastic=True)
    with pytest.raises(WorkerError, match=r"rank 0 \(replica 0\) died"):
        list(run.messages())
