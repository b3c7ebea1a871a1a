"""Write docs/guides/choosing.md and its pictures, from runs on the demo's text.

python tools/choosing.py            make the runs that are missing, then write the page and docs/guides/choosing/*
python tools/choosing.py --page     write them from the runs there are; fail if one is missing
python tools/choosing.py --check    fail if the page and the pictures are not what the runs give

A run is kept in docs/guides/choosing/runs.json with its settings, and made again when those change; about a minute
each on one core. What is measured are losses, so other work beside it does no harm.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from optimizer_table import MATRIX, bytes_per_value
from paceline.config import override
from paceline.recipes.demo import CONFIG as DEMO
from paceline.registry import OPTIMIZERS
from paceline.track.axes import Quantity
from paceline.track.charts import Chart, Line, draw
from paceline.track.folder import read_run
from paceline.track.report import style
from paceline.track.words import rate

ROOT = Path(__file__).resolve().parent.parent / "docs" / "guides"
PAGE, FOLDER = ROOT / "choosing.md", ROOT / "choosing"
RUNS = FOLDER / "runs.json"
TEXT = Path(__file__).with_suffix(".md")
"""The page, with names in {{ }} where tables go."""
STEPS = 200
STYLES: tuple[Any, ...] = ("main", "second", "third", "fourth", "fifth")
MOST_RATES = 7

BASE: dict[str, Any] = {
    **{key: DEMO[key] for key in ("model", "data")},
    "batch": {"sequences": 8, "sequence_tokens": 128},
    "optimizer": {"name": "adamw", "lr": 5.0e-3},
    "schedule": {"name": "cosine", "warmup_steps": 20},
    "train": {"steps": STEPS},
    "evaluate": {"every": STEPS // 10, "sequences": 128},
}

GUESSES: dict[str, tuple[float, list[str]]] = {
    "adabelief": (5e-3, []),
    "adafactor": (1.5e-2, []),
    "adagrad": (1.5e-2, []),
    "adamw": (5e-3, []),
    "adamw_8bit": (5e-3, []),
    "ftrl": (1.5e-2, []),
    "lamb": (1.5e-2, []),
    "lion": (5e-4, []),
    "muon": (1.5e-2, []),
    "schedule_free_adamw": (5e-3, ["schedule={name: constant, warmup_steps: 20}"]),
    "sgd": (0.5, ["optimizer.momentum=0.9"]),
    "shampoo": (5e-3, ["optimizer.max_side=512"]),
    "soap": (5e-3, ["optimizer.max_side=512"]),
    "sophia": (5e-4, []),
}
"""Where the search for a rate begins, and other settings; not those that want a batch that hardly changes."""

SCHEDULES: dict[str, str] = {
    "constant": "{name: constant, warmup_steps: 20}",
    "linear": "{name: linear, warmup_steps: 20, final: 0.0}",
    "cosine": "{name: cosine, warmup_steps: 20}",
    "cosine_restarts": "{name: cosine_restarts, warmup_steps: 20}",
    "exponential": "{name: exponential, warmup_steps: 20}",
    "inverse_sqrt": "{name: inverse_sqrt, warmup_steps: 20}",
    "one_cycle": "{name: one_cycle}",
    "plateau": "{name: plateau, warmup_steps: 20}",
    "wsd": "{name: wsd, warmup_steps: 20}",
    "dynamic": "{name: dynamic, warmup_steps: 20}",
    "dynamic, told its scale": "{name: dynamic, warmup_steps: 20, floor: 1.0, gain: 0.06}",
}
AVERAGES: dict[str, list[str]] = {
    "constant rate": ["schedule={name: constant, warmup_steps: 20}"],
    "constant rate, `average: ema`": [
        "schedule={name: constant, warmup_steps: 20}",
        "average={name: ema, decay: 0.98}",
    ],
    "cosine": [],
    "cosine, `average: ema`": ["average={name: ema, decay: 0.98}"],
}
SHOWN = ("adamw", "muon", "adafactor", "lion", "sgd")
DRAWN = ("constant", "linear", "cosine", "wsd", "one_cycle")
DYNAMIC = "dynamic, told its scale"
WORST = 0.8
"""Bits above the best, beyond which a rate is not drawn."""
SEEDS = 4
PRECISIONS = ("fp32", "bf16", "bf16_pure")
BATCHES = (2, 4, 8, 16, 32)


class Runs:
    """What was measured, by the settings that a run has beside ``BASE``."""

    def __init__(self, path: Path, *, may_run: bool) -> None:
        self._path, self._may_run = path, may_run
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._wanted: set[str] = set()

    def __call__(self, *settings: str) -> Mapping[str, Any]:
        """The run with these settings: ``held_out`` and ``rates`` as lists of (step, value), ``bits``."""
        key = json.dumps([BASE, *settings])
        name = " ".join(settings) or "base"
        self._wanted.add(name)
        found = self._known.get(name)
        if found is None or found["settings"] != key:
            if not self._may_run:
                sys.exit(f"{self._path} has no run of {name}: run tools/choosing.py and commit what it writes")
            self._known[name] = {"settings": key, **train(settings)}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._known))
            print(f"{self._known[name]['bits']} bits per byte  {name}", flush=True)
        known: Mapping[str, Any] = self._known[name]
        return known

    def keep_wanted(self) -> None:
        """Forget runs that nothing asks for any more."""
        self._path.write_text(json.dumps({name: self._known[name] for name in sorted(self._wanted)}, indent=0) + "\n")


def train(settings: Sequence[str]) -> dict[str, Any]:
    """Make a run in a process of its own; without ``bits`` if its loss was no number in the end."""
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder, "config.yaml"), Path(folder, "run")
        config.write_text(yaml.safe_dump(override(BASE, [*settings, f"train.output={output}"])))
        command = [sys.executable, "-m", "paceline", "train", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if "loss is" not in done.stderr and "gradient norm" not in done.stderr:
                sys.exit(f"{' '.join(settings)} failed:\n{done.stderr[-2000:]}")
            return {"bits": None, "held_out": [], "rates": []}
        run = read_run(output)
        return {
            "bits": run.held_out("bits_per_byte")[-1][1],
            "held_out": [[step, round(value, 5)] for step, value in run.held_out("bits_per_byte") if value],
            "rates": [[step, float(f"{value:.4g}")] for step, value in run.points(run.column("lr")) if value][9::10],
        }


def best_rate(runs: Runs, name: str) -> tuple[float, dict[float, float]]:
    """Try rates, each three times the last, until the best has a worse one on both sides: (best, bits of all)."""
    guess, _ = GUESSES[name]
    tried: dict[float, float] = {}
    places = {-1, 0, 1}
    while True:
        for place in sorted(places - {round(math.log(r / guess, 3)) for r in tried}):
            r = float(f"{guess * 3.0**place:.2g}")
            bits = runs(*settings_of(name, r))["bits"]
            tried[r] = math.inf if bits is None else bits
        best = min(tried, key=tried.__getitem__)
        at = round(math.log(best / guess, 3))
        if min(places) < at < max(places) or len(places) >= MOST_RATES:
            return best, dict(sorted(tried.items()))
        places.add(at - 1 if at == min(places) else at + 1)


def settings_of(name: str, r: float) -> list[str]:
    """Of a run with an optimizer."""
    return [f"optimizer.name={name}", f"optimizer.lr={r:g}", *GUESSES[name][1]]


def main() -> None:
    """Write the page and the pictures, or compare them."""
    check = "--check" in sys.argv[1:]
    runs = Runs(RUNS, may_run=not check and "--page" not in sys.argv[1:])
    wanted = render(runs)
    if check:
        there = {PAGE, *FOLDER.glob("*.svg")}
        if there != wanted.keys() or any(path.read_text(encoding="utf-8") != text for path, text in wanted.items()):
            sys.exit(f"{PAGE} or its pictures are not what the runs say: run tools/choosing.py and commit them")
        return
    runs.keep_wanted()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")


def render(runs: Runs) -> dict[Path, str]:
    """The page and its pictures, by path."""
    searched = {name: best_rate(runs, name) for name in GUESSES}
    schedules = {name: runs(f"schedule={text}") for name, text in SCHEDULES.items()}
    averages = {name: runs(*settings) for name, settings in AVERAGES.items()}
    precisions = {name: runs(f"precision={name}") for name in PRECISIONS}
    batches = {
        n: runs(f"batch.sequences={n}", f"train.steps={STEPS * 8 // n}", "schedule.warmup_steps=null") for n in BATCHES
    }
    seeds = [runs(f"seed={seed}")["bits"] for seed in range(SEEDS)]
    tables = {
        "spread": f"{max(seeds) - min(seeds):.3f}",
        "optimizers": optimizer_table(searched),
        "schedules": table(("schedule", "bits per byte"), bits_of(schedules)),
        "averages": table(("weights that are measured", "bits per byte"), bits_of(averages)),
        "precisions": table(("precision", "bits per byte"), bits_of(precisions)),
        "batches": table(
            ("sequences of a step", "steps", "bits per byte"),
            [(str(n), str(STEPS * 8 // n), f"{run['bits']:.3f}") for n, run in batches.items()],
        ),
    }
    page = TEXT.read_text(encoding="utf-8")
    for name, text in tables.items():
        page = page.replace(f"{{{{ {name} }}}}", text)
    best = {name: runs(*settings_of(name, searched[name][0])) for name in SHOWN}
    cosine, dynamic = schedules["cosine"], schedules[DYNAMIC]
    return {
        PAGE: page,
        FOLDER / "rates.svg": rates_picture({name: searched[name][1] for name in SHOWN}),
        FOLDER / "optimizers.svg": curves("Held-out text", best, "held_out"),
        FOLDER / "schedules.svg": curves("Held-out text", {name: schedules[name] for name in DRAWN}, "held_out"),
        FOLDER / "dynamic-rate.svg": curves(
            "Rate, as a share of the peak", {"cosine": cosine, "dynamic": dynamic}, "rates"
        ),
        FOLDER / "dynamic.svg": curves("Held-out text", {"cosine": cosine, "dynamic": dynamic}, "held_out"),
    }


def optimizer_table(searched: Mapping[str, tuple[float, Mapping[float, float]]]) -> str:
    """Best first: the best rate tried, what it gave, what the next rates on both sides gave, and the state."""
    rows = []
    for name, (best, tried) in sorted(searched.items(), key=lambda item: item[1][1][item[1][0]]):
        around = [r for r in tried if r != best and 1 / 4 < r / best < 4]
        beside = ", ".join(
            f"{tried[r]:.3f} at {rate(r)}" if tried[r] < math.inf else f"none at {rate(r)}" for r in around
        )
        state = bytes_per_value(OPTIMIZERS.load(name)(), *MATRIX)
        rows.append((f"`{name}`", rate(best), f"{tried[best]:.3f}", beside, f"{state:.3g}"))
    return table(("optimizer", "best rate", "bits per byte", "beside it", "bytes of state"), rows)


def bits_of(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A row for each run, in the order given."""
    return [(name if "`" in name or " " in name else f"`{name}`", f"{run['bits']:.3f}") for name, run in found.items()]


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rates_picture(tried: Mapping[str, Mapping[float, float]]) -> str:
    """Bits over the rate; what went far off is left out."""
    least = min(min(found.values()) for found in tried.values())
    lines = [
        Line(name, [(r, bits) for r, bits in found.items() if bits < least + WORST], look)
        for look, (name, found) in zip(STYLES, tried.items(), strict=False)
    ]
    rates = [r for line in lines for r, _ in line.points]
    along = Quantity("learning rate", min(rates), max(rates), log=True)
    return picture(Chart("Held-out text after the run", "bits per byte", lines, is_named=True), along)


def curves(title: str, runs: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """Some runs over their steps, without the first part of a fall."""
    scale = BASE["optimizer"]["lr"] if what == "rates" else 1.0
    lines = [
        Line(name, [(step, value / scale) for step, value in run[what] if what == "rates" or step >= STEPS // 5], look)
        for look, (name, run) in zip(STYLES, runs.items(), strict=False)
    ]
    unit = "" if what == "rates" else "bits per byte"
    along = Quantity("step", 0 if what == "rates" else STEPS // 5, STEPS)
    return picture(Chart(title, unit, lines, is_named=True, from_zero=what == "rates"), along)


def picture(chart: Chart, along: Quantity) -> str:
    """A file."""
    return draw(chart, along, 620, 260, style("charts.css")) + "\n"


if __name__ == "__main__":
    main()
