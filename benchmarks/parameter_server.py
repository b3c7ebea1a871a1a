"""How long a worker takes to push a gradient to a parameter server and pull what comes of it.

    python benchmarks/parameter_server.py --megabytes 40 --shards 2

One worker, servers in processes of their own on this machine, plain SGD. A plain copy and addition of the same bytes
stands beside it. The median of several rounds.
"""

import argparse
import os
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import torch

from paceline.sync.server.ask import Caller
from paceline.sync.server.channel import Channel
from paceline.sync.server.coordinator import Rules
from paceline.sync.server.keep import address, keep_processes, listen
from paceline.sync.server.place import Places
from paceline.sync.server.serve import Durability
from paceline.sync.server.store import Delay


def rounds(megabytes: float, shards: int, folder: Path | None, count: int, *, shared: bool) -> list[float]:
    """Milliseconds of each round."""
    sockets = listen(shards)
    pid = os.fork()
    if pid == 0:
        keep_processes(sockets, Durability(folder=folder))
    try:
        return _rounds(megabytes, [address(listening) for listening in sockets], count, shared=shared)
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        for listening in sockets:
            listening.close()


def _rounds(megabytes: float, addresses: list[tuple[str, int]], count: int, *, shared: bool) -> list[float]:
    rows = int(megabytes * 1e6 / 4 / 8 / 1000)
    tensors = {f"w{i}": torch.randn(rows, 1000) for i in range(8)}
    gradients = {name: torch.randn(rows, 1000) for name in tensors}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rules = Rules(workers=1, shards=len(addresses), mode="async")
    caller = Caller(addresses, timeout_s=60)
    channel = Channel(
        caller,
        Places(shapes, rules.shards),
        dict.fromkeys(shapes),
        dtype=torch.float32,
        worker=0,
        rank=0,
        rules=rules,
        shared=shared,
    )
    channel.set_up(1, optimizer={"name": "sgd", "lr": 0.1}, delay=Delay())
    channel.fill(None, tensors)
    channel.ready({})
    client = channel.join(1)
    granted = caller.run(client.turn(0))
    channel.pull(granted, tensors)
    taken = []
    for clock in range(count):
        start = time.perf_counter()
        channel.stage(clock + 1, gradients)
        caller.run(client.commit(clock + 1, clock=clock, targets=1.0, rate=1.0))
        granted = caller.run(client.turn(clock + 1))
        channel.pull(granted, tensors)
        taken.append(1e3 * (time.perf_counter() - start))
    caller.close()
    return taken


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        for name, log, shared in (
            ("shared memory", None, True),
            ("shared memory, with a log", folder, True),
            ("TCP", None, False),
        ):
            taken = rounds(options.megabytes, options.shards, log, options.rounds, shared=shared)[3:]
            print(f"{name:28} {statistics.median(taken):7.1f} ms   best {min(taken):.1f} ms", flush=True)
    finally:
        shutil.rmtree(folder)
    one, other = torch.randn(int(options.megabytes * 250_000)), torch.randn(int(options.megabytes * 250_000))
    plain = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        other.add_(one.clone())
        plain.append(1e3 * (time.perf_counter() - start))
    print(f"{'a plain copy and addition':28} {statistics.median(plain):7.1f} ms   best {min(plain):.1f} ms")


if __name__ == "__main__":
    main()
