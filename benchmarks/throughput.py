"""paceline against its peers on this machine: tokens per second and peak memory.

    python benchmarks/throughput.py [--pairs 7] [--steps 20] [--warmup 5] [--settings NAME,...] [--quick] [--json]
                                    [--models llama-5m,llama-17m] [--sequence-tokens 256,512]

Peers are transformers.Trainer (needs ``pip install paceline[bench]``) and a loop as people write it by hand, each in
several settings; so is paceline. Everything trains the same model from the same weights on the same token file, with
AdamW and clipping. Every measurement is a fresh process (or several), and steps are timed by the same clock, after
warm-up steps in which compilation falls. Every setting runs first, twice. Then the fastest of ours and the fastest of
the peers run in turns, now one first, now the other. What counts is the lower end of the 90 % interval of the ratio of
their speeds (Student's t on the logarithms); the last line of ``--json`` gives it as ``ratio_to_best_peer``.

Every model is trained at every length, 4,096 tokens a step: by default the bench point alone, 17 M parameters at 512
tokens. With several points the last line of ``--json`` is a list.

Run it on a quiet machine: single runs differ by several per cent even there.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contenders
from contenders import SETTINGS, TOKENS, Point

import paceline
from paceline.comm.device import processor_name
from paceline.plan.model import FLOPS_FORMULA

CORES = len(os.sched_getaffinity(0))
TIMEOUT_S = 1800

STUDENT_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
"""The 95 % quantile of Student's t for 1, 2, ... degrees of freedom; more than 15 are taken for 15."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement of one setting."""

    setting: str
    tokens_per_s: float
    peak_bytes: int
    """Above what there was after imports, summed over the setting's processes."""
    loss: float
    """Mean over all steps, warm-up included: shows that the contenders learn alike."""
    load: float
    """Runnable processes on the machine before the start, over the last minute."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio and where it lies with 90 % confidence."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Interval":
        """Of ratios measured independently, at least two."""
        logs = [math.log(ratio) for ratio in ratios]
        middle = statistics.mean(logs)
        quantile = STUDENT_95[min(len(logs) - 1, len(STUDENT_95)) - 1]
        half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(low=math.exp(middle - half), middle=math.exp(middle), high=math.exp(middle + half))


def measure(setting: str, point: Point, *, steps: int, warmup: int) -> Run:
    """Run a setting in processes of its own and read what its ranks wrote."""
    processes = SETTINGS[setting].processes
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        start(processes, [setting, str(warmup + steps), folder, *words(point)])
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    assert len(ranks) == processes, ranks
    ends = ranks[0]["ends"]
    assert len(ends) == warmup + steps, len(ends)
    return Run(
        setting=setting,
        tokens_per_s=steps * TOKENS / (ends[-1] - ends[warmup - 1]),
        peak_bytes=sum(rank["peak_bytes"] for rank in ranks),
        loss=ranks[0]["loss"],
        load=load,
    )


def start(processes: int, arguments: list[str]) -> str:
    """Run ``contenders.py`` to its end on all cores; returns what it printed. ``SystemExit`` with its errors."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, CORES // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command += [contenders.__file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def words(point: Point) -> list[str]:
    """What names a point on the command line of ``contenders.py``."""
    return ["--model", point.model, "--sequence-tokens", str(point.sequence_tokens)]


def probe(point: Point) -> dict[str, float]:
    """Prepare the data; the operations of a token, and the matrix-product peak of all cores together in FLOP/s."""
    values: dict[str, float] = json.loads(start(1, ["probe", *words(point)]).splitlines()[-1])
    return values


def in_turns(ours: str, peer: str, pairs: int, point: Point, *, steps: int, warmup: int) -> Iterator[tuple[Run, Run]]:
    """Pairs of runs, (ours, peer), the second of a pair first in every other one."""
    for i in range(pairs):
        runs = {name: measure(name, point, steps=steps, warmup=warmup) for name in ((ours, peer), (peer, ours))[i % 2]}
        yield runs[ours], runs[peer]


def fastest(runs: Sequence[Run], *, ours: bool) -> str:
    """The setting with the greatest median speed among ours or the peers."""
    names = {run.setting for run in runs if SETTINGS[run.setting].is_ours is ours}
    return max(names, key=lambda name: statistics.median(run.tokens_per_s for run in runs if run.setting == name))


def table(runs: Sequence[Run], flops_per_token: float, peak_flops_per_s: float) -> str:
    """A line for each setting: medians over its runs."""
    lines = [f"{'setting':<22}{'runs':>5}{'tokens/s':>10}{'MFU':>8}{'memory':>11}{'loss':>9}"]
    for name in dict.fromkeys(run.setting for run in runs):
        own = [run for run in runs if run.setting == name]
        speed = statistics.median(run.tokens_per_s for run in own)
        mfu = speed * flops_per_token / peak_flops_per_s
        memory = statistics.median(run.peak_bytes for run in own) / 2**20
        lines.append(f"{name:<22}{len(own):>5}{speed:>10,.0f}{mfu:>8.1%}{memory:>7,.0f} MiB{own[0].loss:>9.4f}")
    return "\n".join(lines)


def compare(names: Sequence[str], point: Point, *, rounds: int, pairs: int, steps: int, warmup: int) -> dict[str, Any]:
    """Run everything, printing as it goes; returns the findings."""
    print(f"{point.model}, {point.sequences} x {point.sequence_tokens} tokens a step")
    first = probe(point)
    runs = []
    for round_ in range(rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            runs.append(measure(name, point, steps=steps, warmup=warmup))
            say(runs[-1])
    ours, peer = fastest(runs, ours=True), fastest(runs, ours=False)
    print(f"\nin turns: {ours} and {peer}, {pairs} pairs", flush=True)
    found = []
    for pair in in_turns(ours, peer, pairs, point, steps=steps, warmup=warmup):
        found.append(pair)
        runs += pair
        for run in pair:
            say(run)
    peak = max(first["peak_flops_per_s"], probe(point)["peak_flops_per_s"])
    speed = Interval.of([mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in found])
    memory = statistics.median(mine.peak_bytes / theirs.peak_bytes for mine, theirs in found)
    print(f"\n{table(runs, first['flops_per_token'], peak)}\n")
    print(f"MFU = ({FLOPS_FORMULA}) x tokens/s / {peak / 1e9:,.0f} GFLOP/s, the bf16 matrix-product peak measured")
    print(
        f"{ours} / {peer}: speed {speed.middle:.3f} (90 % interval {speed.low:.3f} to {speed.high:.3f}), "
        f"memory {memory:.3f}"
    )
    return {
        "ratio_to_best_peer": speed.low,
        "memory_ratio_to_best_peer": memory,
        "ratio_interval": asdict(speed),
        "point": asdict(point),
        "ours": ours,
        "best_peer": peer,
        "pairs": [[mine.tokens_per_s, theirs.tokens_per_s] for mine, theirs in found],
        "steps": steps,
        "warmup": warmup,
        "peak_flops_per_s": peak,
        "flops_per_token": first["flops_per_token"],
        "settings": {name: asdict(SETTINGS[name]) for name in names},
        "runs": [asdict(run) for run in runs],
        "machine": {"processor": processor_name(), "cores": CORES, "versions": versions()},
    }


def say(run: Run) -> None:
    """One line on a run that ended."""
    memory = f"{run.peak_bytes / 2**20:,.0f} MiB"
    print(f"{run.setting:<22}{run.tokens_per_s:>10,.0f} tokens/s{memory:>12}   load before {run.load:.1f}", flush=True)


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    peers = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate") if find_spec(name)}
    return {"python": platform.python_version(), "paceline": paceline.__version__, **peers}


def chosen(text: str | None) -> list[str]:
    """The settings to run; ``SystemExit`` for unknown names, and for peers whose packages are missing."""
    names = text.split(",") if text else list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        raise SystemExit(f"--settings {', '.join(unknown)}: unknown; known: {', '.join(SETTINGS)}")
    if len({SETTINGS[name].is_ours for name in names}) < 2:
        raise SystemExit(f"--settings {text}: needs one of paceline's and one of a peer's")
    if any(SETTINGS[name].program == "trainer" for name in names) and not find_spec("accelerate"):
        raise SystemExit("transformers.Trainer needs accelerate: pip install 'paceline[bench]'")
    return names


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--settings", help=f"comma-separated, default all: {', '.join(SETTINGS)}")
    parser.add_argument("--models", default=Point.model, help="comma-separated presets of paceline")
    parser.add_argument("--sequence-tokens", default=str(Point.sequence_tokens), help="comma-separated lengths")
    parser.add_argument("--quick", action="store_true", help="one round, 2 pairs of 3 steps: to see that it works")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    given = parser.parse_args()
    names = chosen(given.settings)
    effort = {"rounds": 2, "pairs": max(2, given.pairs), "steps": given.steps, "warmup": given.warmup}
    if given.quick:
        effort = {"rounds": 1, "pairs": 2, "steps": 3, "warmup": 2}
    points = [
        Point(model=model, sequence_tokens=int(tokens))
        for model in given.models.split(",")
        for tokens in given.sequence_tokens.split(",")
    ]
    findings = []
    for point in points:
        findings.append(compare(names, point, **effort))
        print(flush=True)
    if len(points) > 1:
        print("\n".join(summary(found) for found in findings))
    if given.json:
        print(json.dumps(findings if len(points) > 1 else findings[0]))


def summary(found: dict[str, Any]) -> str:
    """A line on a point."""
    interval, point = found["ratio_interval"], found["point"]
    return (
        f"{point['model']:<12}{point['sequence_tokens']:>6}  {found['ours']:<22}{found['best_peer']:<22}"
        f"speed {interval['middle']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
        f"  memory {found['memory_ratio_to_best_peer']:.3f}"
    )


if __name__ == "__main__":
    main()
