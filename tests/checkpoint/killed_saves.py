"""Saves checkpoints in forked children that are killed, and checks after each death what is left. Run as a script.

killed_saves.py FOLDER N    once before each file operation of two saves, then N times at a random moment
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paceline.checkpoint import Checkpointer, LocalExchange, load, newest, steps, tensor_state

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir"}


def saves(folder: Path, n: int, n_elements: int, report: int, die_at: int = 0) -> None:
    """Save the next ``n`` steps, keep the newest, and report each step that is complete."""
    writer = Checkpointer(folder, rank=0, ranks=1, exchange=LocalExchange(), layout={}, keep=1)
    start = (newest(folder) or 0) + 1
    die_before(die_at)
    for step in range(start, start + n):
        writer.save(step, {"w": tensor_state(torch.full((n_elements,), float(step)))}, {"step": step})
        writer.wait()
        os.write(report, bytes([step % 256]))


def die_before(operation: int) -> None:
    """SIGKILL this process just before the given operation on files, counted from 1; 0 for never."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS or event == "fsync":
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    real = os.fsync

    def fsync(descriptor: int) -> None:
        hook("fsync", ())
        real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def in_child(work: Callable[[int], None], kill_after: tuple[int, float] | None = None) -> tuple[int, bytes]:
    """Run ``work`` in a fork; its wait status and what it reported before its end.

    ``kill_after`` is a number of saves and a share of the time the last of them took: then it gets a SIGKILL.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(writer)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    report = b""
    if kill_after:
        saved, share = kill_after
        while len(report) < saved:
            started = time.perf_counter()
            report += os.read(reader, 1)
        time.sleep(share * (time.perf_counter() - started))
        os.kill(child, signal.SIGKILL)
    while more := os.read(reader, 1 << 16):
        report += more
    os.close(reader)
    return os.waitpid(child, 0)[1], report


def check(folder: Path, reported: bytes) -> None:
    """Every visible step is whole, and the newest is not older than the last one reported as complete."""
    for step in steps(folder):
        with load(folder, step) as checkpoint:
            checkpoint.verify()
            assert checkpoint.values == {"step": step}
            assert checkpoint.tensor("w").eq(step).all()
    if reported:
        last = newest(folder)
        assert last is not None, reported
        assert last % 256 in {reported[-1], (reported[-1] + 1) % 256}, (last, reported)


def leftovers(folder: Path) -> int:
    n = sum(path.name.startswith(".") for path in folder.iterdir())
    assert n <= 2, list(folder.iterdir())  # those of one death: every start removes what it finds
    return n


def each_operation(folder: Path) -> dict[str, int]:
    kills = interrupted = 0
    while True:
        status, reported = in_child(lambda report, die_at=kills + 1: saves(folder, 2, 256, report, die_at))
        check(folder, reported)
        if status == 0:
            assert leftovers(folder) == 0
            return {"kills": kills, "interrupted": interrupted}
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        kills += 1
        interrupted += leftovers(folder) > 0


def any_moment(folder: Path, n: int) -> dict[str, int]:
    rng = random.Random(0)
    interrupted = 0
    for _ in range(n):
        when = (rng.randint(1, 3), rng.uniform(0, 1))
        status, reported = in_child(lambda report: saves(folder, 1000, 1 << 18, report), when)
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        check(folder, reported)
        interrupted += leftovers(folder) > 0
    return {"kills": n, "interrupted": interrupted}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(json.dumps([each_operation(target / "each-operation"), any_moment(target / "any-moment", int(sys.argv[2]))]))
