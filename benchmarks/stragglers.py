"""Replicas of unequal speed: how much of what all could do together is left of it, with each sync.

    python benchmarks/stragglers.py [--steps 100] [--quick-s 0.2] [--slow-s 0.8] [--replicas 4] [--at-times] [--json]
                                    [--sync async_local_sgd --sync '{name: parameter_server, mode: async}' ...]

Every replica is a process of its own, as ``paceline train`` starts it, with parameter servers beside them where a sync
wants them. All train a tiny Llama, and a step's forward and backward pass takes as long as it is told to: a wait fills
up ``--quick-s``, or on the last replica ``--slow-s``. So two cores are enough for any number of replicas. With
``--at-times`` no replica is slow for ever, but each is in one step of eight, drawn from a seed.

    ideal        local steps a second of all replicas, if none ever waited: the sum of 1 / mean time of a step
    all at work  local steps a second while all have something to do, in the ideal: from the first step of the last
                 replica to begin, to the last step of the first that is done (of what it has, before the run's end)
    whole run    the same to the end of the run, where all have met. Where a replica has a share of each step, the slow
                 one has as many steps as the others, and these wait for it in the end; where it takes what is next, not
    steps        local steps of each replica
    left out     with backups: gradients that came too late. The steps that they took count for nothing
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, join
from paceline.config import Config
from paceline.launch.local import LocalRun
from paceline.plan.layout import Grid
from paceline.recipes.prepare import prepare_in_child
from paceline.recipes.train import parameter_servers, places
from paceline.sync.base import Serving
from paceline.train.assemble import assemble
from paceline.train.trainer import Loop
from paceline.workers.process import Line

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SYNCS: tuple[Any, ...] = (
    {"name": "async_local_sgd", "every": 8, "least": 1},
    {"name": "async_local_sgd", "every": 4, "dynamic_steps": False},
    {"name": "parameter_server", "mode": "async"},
    {"name": "parameter_server", "mode": "stale", "staleness": 4},
    {"name": "parameter_server", "mode": "sync", "backups": 1},
    {"name": "gossip", "every": 8},
    {"name": "diloco", "every": 8},
    "all_reduce",
)
ONE_IN = 8
"""Steps, of which one is slow with ``--at-times``."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all syncs of one call have in common."""

    steps: int
    replicas: int
    quick_s: float
    slow_s: float
    at_times: bool

    def seconds(self, replica: int, count: int) -> float:
        """How long a replica's local step number ``count`` takes."""
        if self.at_times:
            return self.slow_s if random.Random(f"{replica} {count}").random() < 1 / ONE_IN else self.quick_s
        return self.slow_s if replica == self.replicas - 1 else self.quick_s

    @property
    def ideal(self) -> float:
        """Local steps a second."""
        if self.at_times:
            return self.replicas / (self.quick_s + (self.slow_s - self.quick_s) / ONE_IN)
        return (self.replicas - 1) / self.quick_s + 1 / self.slow_s


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a sync."""

    sync: str
    at_work: float
    """Of the ideal."""
    whole: float
    seconds: float
    steps: list[int]
    words: str | None


class Slow:
    """A schedule that takes its time."""

    def __init__(self, schedule: Any, given: Conditions, replica: int) -> None:
        self._schedule, self._given, self._replica = schedule, given, replica
        self.ends: list[tuple[float, float]] = []
        """Of each step: when it began, and when it was done."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)

    def run(self, *arguments: Any, **options: Any) -> Any:
        """See ``Schedule``."""
        start = time.monotonic()
        told = self._schedule.run(*arguments, **options)
        time.sleep(max(0.0, start + self._given.seconds(self._replica, len(self.ends)) - time.monotonic()))
        self.ends.append((start, time.monotonic()))
        return told


@dataclass(frozen=True)
class Rank:
    """What each process runs."""

    config: Config
    given: Conditions

    def __call__(self, coordinates: Coordinates, rendezvous: Rendezvous, line: Line) -> None:
        """Train, and tell when each step was done."""
        torch.set_num_threads(1)
        run = self.config
        with join(coordinates, claim(coordinates), rendezvous, Grid.of(run.layout), run.group_sizes) as world:
            parts = assemble(run, world, saves=False, say=lambda _: None)
            slow: Any = Slow(parts.built.schedule, self.given, coordinates.replica)
            with Loop(replace(parts, built=replace(parts.built, schedule=slow))) as loop:
                for _ in loop.steps():
                    pass
                end = time.monotonic()
            words = parts.sync.words() if isinstance(parts.sync, Serving) else None
            line.send("result", ends=slow.ends, end=end, words=words)


def config(sync: Any, given: Conditions, output: str) -> Config:
    """What is trained."""
    return Config.parse(
        {
            "model": {"config": MODEL},
            "data": {"source": "python-docs", "vocabulary": 512},
            "batch": {"sequences": given.replicas, "sequence_tokens": 32},
            "optimizer": {"name": "adamw", "lr": 1.0e-3},
            "precision": "fp32",
            "replicas": given.replicas,
            "sync": sync,
            "evaluate": {"sequences": 1},
            "train": {"steps": given.steps, "output": output},
            "track": {"display": "none", "tensorboard": False},
        }
    )


def measure(sync: Any, given: Conditions, folder: Path) -> Result:
    """Run one sync."""
    run = config(sync, given, str(folder))
    local = LocalRun(
        Rank(run, given), places(run, 1), port=0, logs=folder / "logs", servers=parameter_servers(run, folder)
    )
    told: dict[int, Mapping[str, Any]] = {}
    try:
        for rank, message in local.messages():
            told[rank] = message
    finally:
        local.kill()
    return judged(name_of(sync), given, [told[rank] for rank in range(given.replicas)])


def judged(name: str, given: Conditions, told: Sequence[Mapping[str, Any]]) -> Result:
    """From what each replica told: ``ends`` are begin and end of its steps, ``end`` that of the run."""
    ends = [own["ends"] for own in told]
    begin = max(own[0][0] for own in ends)
    first = min(own[-1][1] for own in ends)
    last = max(own["end"] for own in told)
    late = re.search(r"left out: ([\d,]+)", told[0]["words"] or "")
    left_out = int(late[1].replace(",", "")) if late else 0
    done = sum(begin < end <= first for own in ends for _, end in own) - left_out
    whole = sum(map(len, ends)) - left_out
    start = min(own[0][0] for own in ends)
    return Result(
        sync=name,
        at_work=done / (first - begin) / given.ideal,
        whole=whole / (last - start) / given.ideal,
        seconds=last - start,
        steps=[len(own) for own in ends],
        words=told[0]["words"],
    )


def name_of(sync: Any) -> str:
    """How a row is called."""
    if isinstance(sync, str):
        return sync
    return " ".join([sync["name"], *(f"{key}={value}" for key, value in sync.items() if key != "name")])


def line_of(result: Result | None = None) -> str:
    """A row of the table, or its head."""
    cells: Sequence[str] = ("sync", "all at work", "whole run", "s", "steps")
    if result is not None:
        steps = " ".join(map(str, result.steps))
        cells = (result.sync, f"{result.at_work:.1%}", f"{result.whole:.1%}", f"{result.seconds:.1f}", steps)
    return f"{cells[0]:<48}{cells[1]:>12}{cells[2]:>11}{cells[3]:>8}  {cells[4]}"


def main() -> int:
    """A line for each sync."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", action="append", help="as in a config; by default some of each kind")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--quick-s", type=float, default=0.2)
    parser.add_argument("--slow-s", type=float, default=0.8)
    parser.add_argument("--at-times", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    given = Conditions(
        steps=options.steps,
        replicas=options.replicas,
        quick_s=options.quick_s,
        slow_s=options.slow_s,
        at_times=options.at_times,
    )
    syncs = [yaml.safe_load(text) for text in options.sync] if options.sync else SYNCS
    if not options.json:
        how = "each, in one step of eight," if given.at_times else "one"
        times = f"{given.quick_s:g} s a step, {how} {given.slow_s:g} s"
        print(f"{given.replicas} replicas, {times}: ideal {given.ideal:.2f} steps/s")
        print(line_of())
    with tempfile.TemporaryDirectory() as folder:
        prepare_in_child(config(syncs[0], given, folder), Path(folder) / "prepare.log", say=lambda _: None, debug=False)
        for number, sync in enumerate(syncs):
            result = measure(sync, given, Path(folder) / str(number))
            print(json.dumps(asdict(result)) if options.json else line_of(result), flush=True)
            if result.words and not options.json:
                print(f"    {result.words}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
