"""Measure what the rows of ``paceline.sync.rows`` cost in quality, and write docs/reference/syncs.md.

python tools/sync_table.py                 run what has not been measured yet, then write the page
python tools/sync_table.py --most-s 280    the same, but begin no run that would end later; the next call goes on
python tools/sync_table.py --deltas        only what is sent in 8 and 4 bits against the same in 32, over more seeds
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
from paceline.recipes.train import parameter_servers, places
from paceline.registry import SYNCS
from paceline.sync.auto import Auto
from paceline.sync.base import Load, step_s
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
FEDERATED, LOCAL_STEPS = "federated 10", 10
ROUNDS: dict[str, Any] = {
    "sync": {"name": "federated", "clients_per_round": REPLICAS, "local_steps": LOCAL_STEPS},
    "data": {**SETTING["data"], "clients": {"by": "dirichlet", "count": REPLICAS, "alpha": 100}},
    "batch": {**SETTING["batch"], "sequences": SEQUENCES},
    "schedule": {**SETTING["schedule"], "warmup_steps": SETTING["schedule"]["warmup_steps"] // LOCAL_STEPS},
    "train": {"steps": STEPS // LOCAL_STEPS},
}
"""As many clients as replicas, in rounds of as many tokens as that number of steps."""
DELTA_SEEDS, DELTA_RATE = (0, 1, 2, 3, 4), 1.0e-3
DELTA_SETTING = {**SETTING, "optimizer": {**SETTING["optimizer"], "lr": DELTA_RATE}}
DELTAS = {
    "diloco 100": ("diloco 100 int8", "diloco 100 int4"),
    "streaming 100": ("streaming 100 int8", "streaming 100 int4"),
}
"""What is sent as it is, and what is sent in fewer bits. At the table's rate runs that differ in a last bit end some
hundredths of a nat apart, by chance, which would hide what is looked for."""
ALONE, ALONE_STEPS = "one replica alone", 40
ALONE_PLACE = Coordinates.of(0, replicas=1, ranks=1, local_rank=0, local_ranks=REPLICAS)
"""It has as many threads as it would have among others."""

HEAD = f"""\
# Syncs, measured

Written by `make sync-table`. {REPLICAS} replicas learn from the Python documentation: a Llama of {{parameters}}
parameters, {STEPS} steps of {SEQUENCES * REPLICAS} sequences of {SETTING["batch"]["sequence_tokens"]} tokens in all,
AdamW at a rate that rises for 50 steps and then falls to zero, fp32. Every row starts from the same weights and sees
the same tokens, but for `{FEDERATED}`; nothing was tuned for any of them. [Which to take](../guides/choosing-a-sync.md)

- `loss`: held-out, in nats, mean over the seeds.
- `more than all_reduce`: the difference with its 95 % interval, by Student's t over pairs of the same seed.
- `worth`: in what share of the steps all-reduce gets to the same loss, by its own runs of a quarter, half and all of
  the steps. 50 %: each step teaches half as much.
- `KiB`: payload that each replica sends a step, by the closed formula, and as counted in the run. What servers send
  back, as much to each replica, is not in it.
- A number at the end of a name is the period; `int8` and others are [reducers](reducers.md), and `streaming` has two
  fragments and a delay of ten steps. All options stand in `src/paceline/sync/rows.py`.
- `{FEDERATED}` is FedAvg with {REPLICAS} clients, all of which take part in every round of {LOCAL_STEPS} steps. Each
  draws from its own quarter of the documents, so that it sees other tokens; the rate changes from round to round, and
  clients begin each round without moments.
- In `async_local_sgd`, and in `parameter_server` with `stale 1` and `async`, replicas run at their own pace: another
  machine gives other gradients in another order. Here they were about equally quick, which is the mildest case.

"""
TIMES = """\

## On a link

Milliseconds of a step: what one replica takes alone ({compute_ms:.1f} ms on one core, the median of {steps} steps) and
what its exchanges take on the link by bytes and delays, where no steps hide it. Behind the stroke the same divided by
the worth: milliseconds for what all-reduce learns in one step, which is what `sync: auto` makes least of. Its choice is
bold.
`benchmarks/wan.py` measures such times on an emulated link ([how near they come](../log.md)).

"""
DELTAS_HEAD = f"""
## Fewer bits for what replicas moved by

Held-out loss with 8 or 4 bits minus that with 32, in nats, over pairs of the same seed: mean, and its 95 % interval by
Student's t. The rate is {DELTA_RATE:g} here, and all else as above: at {SETTING["optimizer"]["lr"]:g} chance is larger
than what is looked for. `python tools/sync_table.py --deltas` measures these rows alone, until each has
{len(DELTA_SEEDS)} seeds.

"""
TAIL = """\

## What this does not say

- One small model at the start of its training, which is where replicas that learn alone lose most: in the DiLoCo paper
  they lose nothing over tens of thousands of steps. With more replicas or a longer period they lose more.
- Options were not tuned: not the rate, nor the outer rate and momentum. The rate suits all-reduce; `diloco 100` gets
  further at a sixth of it ([log](../log.md)).
- Two runs that differ in a last bit end some hundredths apart: rows that are nearer than their intervals are equal.
- Times leave out what processes wait for each other, and of what a strategy computes itself all but what reducers take
  on one core (`benchmarks/reducers.py`). That of `partial` is of the most that it can send.
- The time of bytes and that of delays are added up. Where several large sums are under way together they overlap in
  part, and it is less.
"""


def main() -> None:
    """Measure what is missing, and write or compare the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-s", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--deltas", action="store_true", help="measure these rows only, and print what comes of it")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--check", action="store_true", help="compare the page only")
    asked = parser.parse_args()
    known = read()
    if not (asked.page or asked.check):
        measure(known, most_s=asked.most_s, deltas=asked.deltas)
    if asked.deltas:
        print("\n".join(deltas(known["deltas"])))
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
        return {"setting": SETTING, "delta_rate": DELTA_RATE, "machine": "", "syncs": {}, "runs": {}, "deltas": {}}
    asked = dict(_runs())
    known["deltas"] = known.get("deltas", {}) if known.get("delta_rate") == DELTA_RATE else {}
    known["delta_rate"] = DELTA_RATE
    same = {name for name, sync in known["syncs"].items() if sync == asked.get(name)}
    return {
        **known,
        **{
            key: {name: value for name, value in known[key].items() if name in same}
            for key in ("syncs", "runs", "deltas")
        },
    }


def _runs() -> Iterator[tuple[str, Any]]:
    """Every run, and its sync: the rows, all-reduce with fewer steps, and a replica alone, which is only timed."""
    yield ALONE, "all_reduce"
    yield from ((name, "all_reduce") for name in YARDSTICKS)
    yield from ((name, row) for name, row in ROWS.items() if name not in YARDSTICKS)
    yield FEDERATED, ROUNDS


def measure(known: dict[str, Any], *, most_s: float, deltas: bool = False) -> None:
    """Every run that is not known, seed by seed, each written down when it is done."""
    begin, longest_s = time.perf_counter(), 0.0
    every = [
        ("runs", SETTING, name, seed) for seed in SEEDS for name, _ in _runs() if name != ALONE or seed == SEEDS[0]
    ]
    if deltas:
        every = []
    every += [
        ("deltas", DELTA_SETTING, name, seed)
        for plain, coded in DELTAS.items()
        for seed in DELTA_SEEDS
        for name in (plain, *coded)
    ]
    missing = [run for run in every if str(run[3]) not in known[run[0]].get(run[2], {})]
    syncs = dict(_runs())
    for kind, setting, name, seed in missing:
        if time.perf_counter() - begin + longest_s > most_s:
            print(f"{len(missing)} run(s) were missing; the same command goes on")
            return
        start = time.perf_counter()
        result = train(name, syncs[name], seed, setting)
        seconds = time.perf_counter() - start
        longest_s = max(longest_s, seconds)
        print(f"{name:<36} seed {seed}  loss {result['loss']:.4f}  {seconds:.0f} s", flush=True)
        known["machine"] = processor_name()
        known["syncs"][name] = syncs[name]
        known[kind].setdefault(name, {})[str(seed)] = {**result, "seconds": round(seconds, 1)}
        PATH.write_text(json.dumps(known, indent=1) + "\n")


def train(name: str, sync: Any, seed: int, setting: Mapping[str, Any]) -> dict[str, Any]:
    """One run; what the leader tells of it."""
    steps = ALONE_STEPS if name == ALONE else round(STEPS * YARDSTICKS.get(name, 1.0))
    own: dict[str, Any] = {"sync": sync, "train": {"steps": steps}}
    if name == ALONE:
        own |= {"replicas": 1, "batch": {**SETTING["batch"], "sequences": SEQUENCES}}
    elif name == FEDERATED:
        own = dict(sync)
    with tempfile.TemporaryDirectory(prefix="paceline-syncs-") as folder:
        config = Config.parse({**setting, **own, "seed": seed, "train": {**own["train"], "output": folder}})
        prepare_in_child(config, Path(folder) / "prepare.log", say=print, debug=False)
        ranks = places(config, 1) if name != ALONE else [ALONE_PLACE]
        servers = parameter_servers(config, Path(folder))
        local = LocalRun(_Rank(config), ranks, port=0, logs=Path(folder) / "logs", servers=servers)
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
                steps = LOCAL_STEPS if self._config.in_rounds else 1
                result = {
                    "loss": loop.evaluation.loss,
                    "step_ms": round(1e3 * statistics.median(step_s[10:]) / steps, 3),
                    "sent_bytes": (sent[-1] - before) / len(sent) / steps,
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
    names = [name for name in (*YARDSTICKS, *ROWS, FEDERATED) if name in runs]
    lines += [_quality(name, shapes, known) for name in dict.fromkeys(names)]
    lines.append(TIMES.format(compute_ms=compute_ms, steps=ALONE_STEPS - 10).rstrip() + "\n")
    lines += _times(shapes, compute_ms, runs)
    fewer = any(len(runs.get(name, {})) < len(SEEDS) for name, _ in _runs() if name != ALONE)
    left = f"\nRows with fewer than {len(SEEDS)} seeds are not finished: `make sync-table` goes on.\n" if fewer else ""
    compared = deltas(known.get("deltas", {}))
    fewer_bits = DELTAS_HEAD + "\n".join(compared) + "\n" if compared else ""
    return "\n".join(lines) + "\n" + left + fewer_bits + f"\nTaken on {known['machine']}, 2 cores.\n" + TAIL


def deltas(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What fewer bits change, over the seeds that both have."""
    lines = ["| sync | against | seeds | difference | 95 % interval |", "| --- | --- | --- | --- | --- |"]
    for plain, coded in DELTAS.items():
        for name in coded:
            own, beside = runs.get(name, {}), runs.get(plain, {})
            pairs = [own[seed]["loss"] - beside[seed]["loss"] for seed in sorted(own.keys() & beside.keys())]
            if len(pairs) > 1:
                found = spread(pairs)
                low, high = found.mean - found.half_width, found.mean + found.half_width
                lines.append(f"| `{name}` | `{plain}` | {len(pairs)} | {found.mean:+.4f} | {low:+.4f} to {high:+.4f} |")
    return lines if len(lines) > 2 else []


def _quality(name: str, shapes: Mapping[str, Sequence[int]], known: Mapping[str, Any]) -> str:
    runs: Mapping[str, Mapping[str, Any]] = known["runs"]
    own, baseline = runs[name], runs[BASELINE]
    pairs = sorted(own.keys() & baseline.keys())
    losses = [own[seed]["loss"] for seed in pairs or own]
    more = [own[seed]["loss"] - baseline[seed]["loss"] for seed in pairs]
    if name == BASELINE:
        difference = "0"
    elif len(more) > 1:
        found = spread(more)
        difference = f"{found.mean:+.4f} ± {found.half_width:.4f}"
    else:
        difference = f"{more[0]:+.4f}" if more else "-"
    share = worth(name, runs)
    options, load = _load(name, shapes, compute_ms=0.0)
    formula = options.wire_bytes(shapes, REPLICAS, load.steps) / load.steps / (LOCAL_STEPS if name == FEDERATED else 1)
    most = "at most " if options.sends_less else ""
    counted = statistics.fmean(run["sent_bytes"] for run in own.values())
    cells = [
        f"`{name}`" if name in ROWS else name,
        str(len(pairs or own)),
        f"{statistics.fmean(losses):.4f}",
        difference,
        f"{share:.0%}" if share is not None else "-",
        f"{most}{formula / 1024:,.1f}",
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
    for name in (*ROWS, FEDERATED):
        share = worth(name, runs)
        if share is None:
            continue
        options, load = _load(name, shapes, compute_ms)
        cells = [f"`{name}`", f"{share:.0%}"]
        for link in LINKS:
            step_ms = 1e3 * step_s(options, Network.parse(link), load) * load.steps / _steps(name)
            text = f"{step_ms:,.1f} / {step_ms / share:,.1f}"
            cells.append(f"**{text}**" if chosen[link] == name else text)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _steps(name: str) -> int:
    """Of a run; of rounds the local ones of a client."""
    return round(STEPS * YARDSTICKS.get(name, 1.0))


def _load(name: str, shapes: Mapping[str, Sequence[int]], compute_ms: float) -> tuple[Any, Load]:
    """A row's options, and what a run of it is on a link: a step of rounds is a round."""
    steps, each = _steps(name), 1
    if name == FEDERATED:
        steps, each = STEPS // LOCAL_STEPS, LOCAL_STEPS
    sync = {**dict(_runs()), FEDERATED: ROUNDS["sync"]}[name]
    load = Load(shapes=shapes, members=REPLICAS, steps=steps, value_bytes=4, compute_s=each * compute_ms / 1e3)
    return choose(SYNCS, sync), load


def _auto(link: str, shapes: Mapping[str, Sequence[int]], compute_ms: float, runs: Mapping[str, Any]) -> str:
    auto = Auto(link=link, compute_ms=compute_ms)
    _, load = _load(BASELINE, shapes, compute_ms)
    return auto.candidates(load, lambda _: True, runs)[0].name


def _shapes() -> dict[str, tuple[int, ...]]:
    source = resolve_model(Config.parse({**SETTING, "sync": "all_reduce"}))
    assert source is not None
    return {info.name: info.shape for info in describe(source.meta()) if info.trainable}


if __name__ == "__main__":
    main()
