"""How long a worker takes to push a gradient to a parameter server and pull what comes of it.

    python benchmarks/parameter_server.py --megabytes 40 --shards 2

One worker, servers in processes of their own on this machine, plain SGD. A plain copy and addition of the same bytes
stands beside it, and a table of as many bytes of which a step touches some rows, with AdamW. The median of several
rounds.
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
from paceline.sync.server.keep import address, keep_processes, listen
from paceline.sync.server.place import Places
from paceline.sync.server.rules import Rules
from paceline.sync.server.serve import Durability
from paceline.sync.server.store import Delay


def rounds(
    megabytes: float, shards: int, folder: Path | None, count: int, *, shared: bool, touched: int = 0
) -> list[float]:
    """Milliseconds of each round."""
    sockets = listen(shards)
    pid = os.fork()
    if pid == 0:
        keep_processes(sockets, Durability(folder=folder))
    try:
        addresses = [address(listening) for listening in sockets]
        if touched:
            return _table_rounds(megabytes, addresses, count, touched, shared=shared)
        return _rounds(megabytes, addresses, count, shared=shared)
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


def _table_rounds(
    megabytes: float, addresses: list[tuple[str, int]], count: int, touched: int, *, shared: bool
) -> list[float]:
    """Of one table, of which each step touches so many rows, drawn anew: the rare ones are behind by many steps."""
    table = {"table": torch.randn(int(megabytes * 1e6 / 4 / 1000), 1000)}
    rules, caller = Rules(workers=1, shards=len(addresses), mode="async"), Caller(addresses, timeout_s=60)
    places = Places({"table": tuple(table["table"].shape)}, rules.shards, tables=frozenset(table))
    channel = Channel(
        caller, places, {"table": None}, dtype=torch.float32, worker=0, rank=0, rules=rules, shared=shared
    )
    channel.set_up(1, optimizer={"name": "adamw", "lr": 0.001}, delay=Delay())
    channel.fill(None, table)
    channel.ready({})
    client = channel.join(1)
    granted = caller.run(client.turn(0))
    gradient, taken = torch.zeros_like(table["table"]), []
    for clock in range(count):
        ids = torch.randperm(len(gradient))[:touched].sort().values
        gradient.zero_()
        gradient[ids] = torch.randn(touched, 1000)
        start = time.perf_counter()
        channel.pull(granted, table, rows={"table": ids})
        channel.stage(clock + 1, {"table": gradient}, {"table": ids})
        caller.run(client.commit(clock + 1, clock=clock, targets=1.0, rate=1.0))
        granted = caller.run(client.turn(clock + 1))
        taken.append(1e3 * (time.perf_counter() - start))
    caller.close()
    return taken


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--touched", type=int, default=500, help="rows, of the table's 1,000 values each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        for name, log, shared, touched in (
            ("shared memory", None, True, 0),
            ("shared memory, with a log", folder, True, 0),
            ("TCP", None, False, 0),
            ("rows, shared memory", None, True, options.touched),
            ("rows, TCP", None, False, options.touched),
        ):
            count = options.rounds * (4 if touched else 1)  # enough for all rows to catch up
            taken = rounds(options.megabytes, options.shards, log, count, shared=shared, touched=touched)[3:]
            middle, mean = statistics.median(taken), statistics.fmean(taken)
            print(f"{name:28} {middle:7.1f} ms   mean {mean:.1f} ms   best {min(taken):.1f} ms", flush=True)
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
