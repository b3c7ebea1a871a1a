"""What a reducer computes in a sum, without the link: nanoseconds for each value, on one core.

    python benchmarks/reducers.py [--members 4] [--tries 5]

One member of a link that sends nothing: what would come from others is its own. Matrices of 256 x 1,024, a million
values in all. The class of each reducer has the number (``ns_per_value``), of which ``sync: auto`` makes use.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from paceline.comm.link import LocalLink
from paceline.comm.replica import Shard
from paceline.config import choose
from paceline.registry import REDUCERS
from paceline.sync.base import SyncContext


class Alone(LocalLink):
    """A link whose other members are this one once more."""

    def __init__(self, members: int) -> None:
        self.size = members

    def all_gather(self, into: torch.Tensor, tensor: torch.Tensor) -> Any:
        """All have the same."""
        into.view(self.size, -1).copy_(tensor.reshape(1, -1))
        return self.all_reduce(tensor)

    def all_to_all(self, into: torch.Tensor, tensor: torch.Tensor, **_: Any) -> Any:
        """Others send what this one sends them."""
        into.copy_(tensor)
        return self.all_reduce(tensor)


def ns_per_value(name: str, members: int, tries: int) -> float:
    """Median of some sums, after one that is not counted."""
    generator = torch.Generator().manual_seed(0)
    values = {f"w{i}": torch.randn(256, 1024, generator=generator) for i in range(4)}
    reducer = choose(REDUCERS, name).build(SyncContext(link=Alone(members), steps=1))  # type: ignore[attr-defined]
    reducer.start([Shard(key, torch.nn.Parameter(value.clone())) for key, value in values.items()])
    took = []
    for step in range(1 + tries):
        start = time.perf_counter()
        reducer.weighted_sum(values, 0.5, step)
        reducer.settle()
        took.append(time.perf_counter() - start)
    return 1e9 * statistics.median(took[1:]) / sum(value.numel() for value in values.values())


def main() -> None:
    """Print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--tries", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in REDUCERS:
        print(f"{name:<12}{ns_per_value(name, asked.members, asked.tries):8.1f} ns", flush=True)


if __name__ == "__main__":
    main()
