"""Measure what the rows of ``paceline.sync.rows`` cost in quality, and write docs/reference/syncs.md.

python tools/sync_table.py                 run what has not been measured yet, then write the page
python tools/sync_table.py --most-s 280    the same, but begin no run that would end later; the next call goes on
python tools/sync_table.py --page          write the page from what is measured
python tools/sync_table.py --check         fail if the page is not what would be written

Every run is the product's own loop on this machine, 4 replicas as 4 processes, from the same weights of its seed on the
same batches. Results stand in src/paceline/sync/measured.json, from which ``sync: auto`` chooses; a row whose options
have changed, and all of them where the setting has, are measured anew.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.comm.device import claim, processor_name
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, join
from paceline.config import Config, choose
from paceline.launch.local import LocalRun
from paceline.models.describe import describe
from paceline.plan.layout import Grid
from paceline.plan.network import Network
from paceline.recipes.prepare import prepare_in_child
from paceline.recipes.seeds import spread
from paceline.recipes.train import places
from paceline.registry import SYNCS
from paceline.sync.auto import Auto, Load
from paceline.sync.base import delays
from paceline.sync.measured import BASELINE, PATH, YARDSTICKS, worth
from paceline.sync.rows import ROWS
from paceline.train.assemble import assemble, resolve_model
from paceline.train.trainer import Loop
from paceline.workers.process import Line

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, GUIDE = DOCS / "reference" / "syncs.md", DOCS / "guides" / "choosing-a-sync.md"
BEGIN, END = "<!-- measured -->\n\n", "\n<!-- /measured -->\n"
REPLICAS, STEPS, SEEDS = 4, 800, (0, 1, 2)
SEQUENCES = 2
"""Of a replica and step."""
SETTING: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    },
    "data": {"source": "python-docs"},
    "batch": {"sequences": SEQUENCES * REPLICAS, "sequence_tokens": 64},
    "optimizer": {"name": "adamw", "lr": 6.0e-3},
    "schedule": {"name": "linear", "warmup_steps": 50, "final": 0.0},
    "precision": "fp32",
    "evaluate": {"sequences": 512},
    "replicas": REPLICAS,
    "train": {"steps": STEPS},
    "track": {"display": "none", "tensorboard": False},
}
LINKS = ("1gbit/0.5ms", "100mbit/25ms", "20mbit/50ms")
ALONE, ALONE_STEPS = "one replica alone", 40
ALONE_PLACE = Coordinates.of(0, replicas=1, ranks=1, local_rank=0, local_ranks=REPLICAS)
"""It has as many threads as it would have among others."""

HEAD = f"""\
# Syncs, measured

Written by `make sync-table`. {REPLICAS} replicas learn from the Python documentation: a Llama of {{parameters}}
parameters, {STEPS} steps of {SEQUENCES * REPLICAS} sequences of {SETTING["batch"]["sequence_tokens"]} tokens in all,
AdamW at a rate that rises for 50 steps and then falls to zero, fp32. Every row starts from the same weights and sees
the same tokens; nothing was tuned for any of them. [Which to take](../guides/choosing-a-sync.md)

- `loss`: held-out, in nats, mean over the seeds.
- `more than all_reduce`: the difference with its 95 % interval, by Student's t over pairs of the same seed.
- `worth`: in what share of the steps all-reduce gets to the same loss, by its own runs of a quarter, half and all of
  the steps. 50 %: each step teaches half as much.
- `KiB`: payload that each replica sends a step, by the closed formula, and as counted in the run.

"""
TIMES = """\

## On a link

Milliseconds of a step: what one replica takes alone ({compute_ms:.1f} ms on one core, the median of {steps} steps) and
what its exchanges take on the link by bytes and delays. Behind the stroke the same divided by the worth: milliseconds
for what all-reduce learns in one step, which is what `sync: auto` makes least of. Its choice is bold.
`benchmarks/wan.py` measures such times on an emulated link.

"""
TAIL = """\

## What this does not say

- One small model at the start of its training, which is where replicas that learn alone lose most: in the DiLoCo paper
  they lose nothing over tens of thousands of steps. With more replicas or a longer period they lose more.
- Options were not tuned: not the rate, nor the outer rate and momentum.
- Times leave out what a strategy computes itself, and what processes wait for each other.
"""


def main() -> None:
    """Measure what is missing, and write or compare the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-s", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--check", action="store_true", help="compare the page only")
    asked = parser.parse_args()
    known = read()
    if not (asked.page or asked.check):
        measure(known, most_s=asked.most_s)
    pages = {PAGE: render(known), GUIDE: guide(known, GUIDE.read_text())}
    for path, page in pages.items():
        if not asked.check:
            path.write_text(page)
        elif not path.exists() or path.read_text() != page:
            sys.exit(f"{path} is not what {PATH.name} says: run `python tools/sync_table.py --page` and commit it")


def read() -> dict[str, Any]:
    """What is known and still holds."""
    known: dict[str, Any] = json.loads(PATH.read_text())
    if known.get("setting") != SETTING:
        return {"setting": SETTING, "machine": "", "syncs": {}, "runs": {}}
    asked = dict(_runs())
    same = [name for name in known["runs"] if known["syncs"][name] == asked.get(name)]
    return {**known, **{key: {name: known[key][name] for name in same} for key in ("syncs", "runs")}}


def _runs() -> Iterator[tuple[str, Any]]:
    """Every run, and its sync: the rows, all-reduce with fewer steps, and a replica alone, which is only timed."""
    yield ALONE, "all_reduce"
    yield from ((name, "all_reduce") for name in YARDSTICKS)
    yield from ((name, row) for name, row in ROWS.items() if name not in YARDSTICKS)


def measure(known: dict[str, Any], *, most_s: float) -> None:
    """Every run that is not known, seed by seed, each written down when it is done."""
    begin, longest_s = time.perf_counter(), 0.0
    missing = [
        (name, sync, seed)
        for seed in SEEDS
        for name, sync in _runs()
        if str(seed) not in known["runs"].get(name, {}) and not (name == ALONE and seed != SEEDS[0])
    ]
    for name, sync, seed in missing:
        if time.perf_counter() - begin + longest_s > most_s:
            print(f"{len(missing)} run(s) were missing; the same command goes on")
            return
        start = time.perf_counter()
        result = train(name, sync, seed)
        seconds = time.perf_counter() - start
        longest_s = max(longest_s, seconds)
        print(f"{name:<36} seed {seed}  loss {result['loss']:.4f}  {seconds:.0f} s", flush=True)
        known["machine"] = processor_name()
        known["syncs"][name] = sync
        known["runs"].setdefault(name, {})[str(seed)] = {**result, "seconds": round(seconds, 1)}
        PATH.write_text(json.dumps(known, indent=1) + "\n")


def train(name: str, sync: Any, seed: int) -> dict[str, Any]:
    """One run; what the leader tells of it."""
    steps = ALONE_STEPS if name == ALONE else round(STEPS * YARDSTICKS.get(name, 1.0))
    alone = {"replicas": 1, "batch": {**SETTING["batch"], "sequences": SEQUENCES}} if name == ALONE else {}
    with tempfile.TemporaryDirectory(prefix="paceline-syncs-") as folder:
        train = {"steps": steps, "output": folder}
        config = Config.parse({**SETTING, **alone, "sync": sync, "seed": seed, "train": train})
        prepare_in_child(config, Path(folder) / "prepare.log", say=print, debug=False)
        ranks = places(config, 1) if name != ALONE else [ALONE_PLACE]
        local = LocalRun(_Rank(config), ranks, port=0, logs=Path(folder) / "logs")
        try:
            (result,) = [message["result"] for _, message in local.messages() if message["kind"] == "result"]
        finally:
            local.kill()
    return dict(result)


class _Rank:
    """One rank of a run."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, coordinates: Coordinates, rendezvous: Rendezvous, line: Line) -> None:
        config = self._config
        with join(coordinates, claim(coordinates), rendezvous, Grid.of(config.layout), config.group_sizes) as world:
            parts = assemble(config, world, saves=False, say=lambda _: None)
            sent: list[int] = []
            with Loop(parts, hooks=(lambda _: sent.append(sum(link.sent_bytes for link in world.links)),)) as loop:
                before = sum(link.sent_bytes for link in world.links)
                step_s = [event.step_s for event in loop.steps()]
            if coordinates.is_leader:
                assert loop.evaluation is not None
                result = {
                    "loss": loop.evaluation.loss,
                    "step_ms": round(1e3 * statistics.median(step_s[10:]), 3),
                    "sent_bytes": (sent[-1] - before) / len(sent),
                }
                line.send("result", result=result)


def render(known: Mapping[str, Any]) -> str:
    """The whole page."""
    shapes, runs = _shapes(), known["runs"]
    if ALONE not in runs or worth(BASELINE, runs) is None:
        return "# Syncs, measured\n\nNothing is measured yet: `make sync-table`.\n"
    compute_ms = next(iter(runs[ALONE].values()))["step_ms"]
    parameters = f"{sum(math.prod(shape) for shape in shapes.values()) / 1e6:.2f} M"
    lines = [HEAD.format(parameters=parameters)]
    lines.append("| sync | seeds | loss | more than all_reduce | worth | KiB a step | as counted |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    names = [name for name in (*YARDSTICKS, *ROWS) if name in runs]
    lines += [_quality(name, shapes, known) for name in dict.fromkeys(names)]
    lines.append(TIMES.format(compute_ms=compute_ms, steps=ALONE_STEPS - 10).rstrip() + "\n")
    lines += _times(shapes, compute_ms, runs)
    fewer = any(len(runs.get(name, {})) < len(SEEDS) for name, _ in _runs() if name != ALONE)
    left = f"\nRows with fewer than {len(SEEDS)} seeds are not finished: `make sync-table` goes on.\n" if fewer else ""
    return "\n".join(lines) + "\n" + left + f"\nTaken on {known['machine']}, 2 cores.\n" + TAIL


def _quality(name: str, shapes: Mapping[str, Sequence[int]], known: Mapping[str, Any]) -> str:
    runs: Mapping[str, Mapping[str, Any]] = known["runs"]
    own, baseline = runs[name], runs[BASELINE]
    pairs = sorted(own.keys() & baseline.keys())
    losses = [own[seed]["loss"] for seed in own]
    more = [own[seed]["loss"] - baseline[seed]["loss"] for seed in pairs]
    if name == BASELINE:
        difference = "0"
    elif len(more) > 1:
        found = spread(more)
        difference = f"{found.mean:+.4f} ± {found.half_width:.4f}"
    else:
        difference = f"{more[0]:+.4f}" if more else "-"
    share = worth(name, runs)
    steps = round(STEPS * YARDSTICKS.get(name, 1.0))
    formula = choose(SYNCS, known["syncs"][name]).wire_bytes(shapes, REPLICAS, steps) / steps  # type: ignore[attr-defined]
    counted = statistics.fmean(run["sent_bytes"] for run in own.values())
    cells = [
        f"`{name}`" if name in ROWS else name,
        str(len(own)),
        f"{statistics.fmean(losses):.4f}",
        difference,
        f"{share:.0%}" if share is not None else "-",
        f"{formula / 1024:,.1f}",
        f"{counted / 1024:,.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def guide(known: Mapping[str, Any], text: str) -> str:
    """The guide with the second table of the page in its place."""
    runs = known["runs"]
    before, _, rest = text.partition(BEGIN)
    table: list[str] = []
    if ALONE in runs and worth(BASELINE, runs) is not None:
        table = _times(_shapes(), next(iter(runs[ALONE].values()))["step_ms"], runs)
    return f"{before}{BEGIN}{''.join(line + chr(10) for line in table)}{END}{rest.partition(END)[2]}"


def _times(shapes: Mapping[str, Sequence[int]], compute_ms: float, runs: Mapping[str, Any]) -> list[str]:
    """The second table."""
    lines = ["| sync | worth | " + " | ".join(LINKS) + " |", "| --- | --- |" + " --- |" * len(LINKS)]
    chosen = {link: _auto(link, shapes, compute_ms, runs) for link in LINKS}
    for name, row in ROWS.items():
        share, options = worth(name, runs), choose(SYNCS, row)
        waits = delays(options, REPLICAS, STEPS)
        if share is None:
            continue
        cells = [f"`{name}`", f"{share:.0%}"]
        for link in LINKS:
            if waits is None:
                cells.append("-")
                continue
            sent = options.wire_bytes(shapes, REPLICAS, STEPS)  # type: ignore[attr-defined]
            step_ms = compute_ms + 1e3 * Network.parse(link).seconds(sent, waits) / STEPS
            text = f"{step_ms:,.1f} / {step_ms / share:,.1f}"
            cells.append(f"**{text}**" if chosen[link] == name else text)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _auto(link: str, shapes: Mapping[str, Sequence[int]], compute_ms: float, runs: Mapping[str, Any]) -> str:
    auto = Auto(link=link, compute_ms=compute_ms)
    load = Load(shapes=shapes, members=REPLICAS, steps=STEPS, value_bytes=4, compute_s=compute_ms / 1e3)
    return auto.candidates(load, lambda _: True, runs)[0].name


def _shapes() -> dict[str, tuple[int, ...]]:
    source = resolve_model(Config.parse({**SETTING, "sync": "all_reduce"}))
    assert source is not None
    return {info.name: info.shape for info in describe(source.meta()) if info.trainable}


if __name__ == "__main__":
    main()
