import os

import pytest
import torch

from paceline.errors import WorkerError
from paceline.workers.pool import CALLS


def hello(member, word):
    member.store.set(f"said/{member.index}", word)
    others = [member.store.get(f"said/{i}").decode() for i in range(member.size)]
    return member.index, others, torch.get_num_threads()


def stumble(member):
    raise ValueError(f"rank {member.index} stumbled")


def vanish(member):
    if member.index == 1:
        os._exit(3)
    member.store.get("never")


def process(member):
    return os.getpid()


def test_a_worker_is_replaced_after_some_calls(pool):
    processes = [pool.run(process, 1)[0] for _ in range(2 * CALLS + 1)]
    assert max(processes.count(pid) for pid in processes) == CALLS


def test_results_come_in_the_order_of_ranks(pool):
    assert pool.run(hello, 3, "x") == [(i, ["x"] * 3, 1) for i in range(3)]
    assert pool.run(hello, 2, "y") == [(i, ["y"] * 2, 1) for i in range(2)], "a call has a store of its own"


def test_an_error_comes_with_its_traceback(pool):
    with pytest.raises(WorkerError, match=r"(?s)rank 0 of the pool.*in stumble.*ValueError: rank 0 stumbled"):
        pool.run(stumble, 1)


def test_a_worker_that_dies_is_named_and_replaced(pool):
    with pytest.raises(WorkerError, match="rank 1 of the pool died with exit code 3"):
        pool.run(vanish, 2)
    assert pool.run(hello, 2, "z")[1] == (1, ["z", "z"], 1)


def test_a_call_that_takes_too_long_is_ended(pool):
    with pytest.raises(WorkerError, match=r"gave no result within 0\.5 s"):
        pool.run(waits, 1, timeout_s=0.5)


def waits(member):
    import threading

    threading.Event().wait()
