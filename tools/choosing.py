"""Train small models on the demo's corpus in many ways, and put pictures and numbers into docs/guides/choosing.md.

    python tools/choosing.py [STUDY ...]      run what is not there yet in build/choosing, then draw

Every run is ``paceline train`` with the config below and the changes of its study. Its seed is 0; one run is repeated
with others, which shows how much of a difference is chance.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paceline.track.axes import Quantity
from paceline.track.charts import Chart, Line, draw
from paceline.track.report import style

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "build" / "choosing"
PAGE = ROOT / "docs" / "guides" / "choosing.md"
PICTURES = ROOT / "docs" / "guides" / "choosing"
STEPS, EVERY = 400, 20
CONFIG = {
    "model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 96,
            "intermediate_size": 216,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
    },
    "data": {"source": "python-docs"},
    "optimizer": {"name": "adamw", "lr": 2.0e-3},
    "schedule": {"name": "linear", "warmup_steps": 20, "final": 0.0},
    "batch": {"sequences": 8, "sequence_tokens": 128},
    "train": {"steps": STEPS},
    "evaluate": {"every": EVERY, "sequences": 128},
    "track": {"display": "none", "tensorboard": False},
}
STYLES = ("main", "second", "third", "fourth", "fifth")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Some runs that are compared: by the words beside their curves, what is changed in the config."""

    title: str
    runs: Mapping[str, Sequence[str]]
    over_tokens: bool = False
    """The curves run over the tokens seen, not over the steps."""
    with_rates: bool = False
    """A second picture shows the rates."""


BASE: Sequence[str] = ()
COSINE = ("schedule={name: cosine, warmup_steps: 20, final: 0.0}",)
CONSTANT = ("schedule={name: constant, warmup_steps: 20}",)
DYNAMIC = "name: dynamic, warmup_steps: 20"
SGD = "optimizer={name: sgd, lr: 0.1, momentum: 0.9}"
STUDIES = {
    "optimizer": Study(
        title="Optimizers",
        runs={
            "adamw, 2e-3": BASE,
            "muon, 4e-3": ("optimizer={name: muon, lr: 4.0e-3}",),
            "sgd with momentum, 0.1": (SGD,),
        },
    ),
    "rate": Study(
        title="Rates",
        runs={
            "1e-3": ("optimizer.lr=1.0e-3",),
            "2e-3": BASE,
            "4e-3": ("optimizer.lr=4.0e-3",),
            "8e-3": ("optimizer.lr=8.0e-3",),
            "1.6e-2": ("optimizer.lr=1.6e-2",),
        },
    ),
    "schedule": Study(
        title="Schedules",
        runs={
            "linear": BASE,
            "cosine": COSINE,
            "wsd": ("schedule={name: wsd, warmup_steps: 20, final: 0.0}",),
            "cosine_restarts": ("schedule={name: cosine_restarts, warmup_steps: 20, final: 0.0}",),
            "constant": CONSTANT,
        },
        with_rates=True,
    ),
    "dynamic": Study(
        title="The dynamic rate",
        runs={
            "cosine": COSINE,
            "dynamic": (f"schedule={{{DYNAMIC}}}",),
            "dynamic, gain 0.1": (f"schedule={{{DYNAMIC}, gain: 0.1}}",),
            "sgd, cosine": (*COSINE, SGD),
            "sgd, dynamic": (f"schedule={{{DYNAMIC}}}", SGD),
        },
        with_rates=True,
    ),
    "batch": Study(
        title="Batches of the same text",
        runs={
            "4 sequences": ("batch.sequences=4", "train.steps=800", "optimizer.lr=1.4e-3"),
            "8": BASE,
            "16": ("batch.sequences=16", "train.steps=200", "optimizer.lr=2.8e-3"),
            "32": ("batch.sequences=32", "train.steps=100", "optimizer.lr=4.0e-3"),
            "4, growing to 16": (
                "batch={sequences: 16, sequence_tokens: 128, warmup: {start: 4, steps: 180, by: 4}}",
                "train.steps=290",
                "schedule={name: linear, warmup_steps: 10, final: 0.0, unit: tokens, scale: sqrt, base_sequences: 8}",
            ),
        },
        over_tokens=True,
    ),
    "average": Study(
        title="Averages",
        runs={
            "constant": CONSTANT,
            "its ema, 0.97": (*CONSTANT, "average={name: ema, decay: 0.97}"),
            "its mean from step 200": (*CONSTANT, "average={name: swa, every: 5, start: 200}"),
            "linear": BASE,
            "ema of linear": ("average={name: ema, decay: 0.97}",),
        },
    ),
    "precision": Study(
        title="Precision",
        runs={"bf16, fp32 masters": ("precision=bf16",), "fp32": ("precision=fp32",)},
    ),
    "seeds": Study(title="Seeds", runs={f"seed {seed}": (f"seed={seed}",) if seed else BASE for seed in range(3)}),
}


RANGES = {
    "adamw": ("optimizer={name: adamw}", "--from", "1e-5", "--to", "1"),
    "muon": ("optimizer={name: muon}", "--from", "1e-5", "--to", "1"),
    "sgd with momentum": ("optimizer={name: sgd, momentum: 0.9}", "--from", "1e-4", "--to", "10"),
}
"""Range tests, each of 100 steps."""


@dataclass(frozen=True)
class Run:
    """What a run left."""

    metrics: list[dict[str, float]]
    evaluations: list[dict[str, float]]

    @property
    def bits_per_byte(self) -> float:
        """At the end."""
        return self.evaluations[-1]["bits_per_byte"]


def main() -> None:
    """Run, draw, and fill in the tables."""
    names = sys.argv[1:] or ["range", *STUDIES]
    PICTURES.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    for name in names:
        if name == "range":
            tests = {words: tested(words, changes) for words, changes in RANGES.items()}
            (PICTURES / "range.svg").write_text(range_tests(tests), encoding="utf-8")
            rows = [(words, f"{test['suggested']:.1e}") for words, test in tests.items()]
            page = filled(page, name, "suggested rate", rows)
            continue
        study = STUDIES[name]
        found = {words: trained(changes) for words, changes in study.runs.items()}
        (PICTURES / f"{name}.svg").write_text(held_out(study, found), encoding="utf-8")
        if study.with_rates:
            (PICTURES / f"{name}_rates.svg").write_text(rates(study, found), encoding="utf-8")
        rows = [(words, f"{run.bits_per_byte:.3f}") for words, run in found.items()]
        page = filled(page, name, "held-out bits per byte at the end", rows)
    PAGE.write_text(page, encoding="utf-8")


def trained(changes: Sequence[str]) -> Run:
    """A run with these changes, which is made if it is not there; runs of several studies are made once."""
    words = re.sub(r"[^a-z0-9.]+", "-", " ".join(changes).lower()).strip("-") or "base"
    folder = RUNS / words[:120]
    if not (folder / "export").exists():
        paceline("train", *changes, f"train.output={folder}")
    return Run(_lines(folder / "metrics.jsonl"), _lines(folder / "evaluations.jsonl"))


def tested(name: str, words: Sequence[str]) -> dict[str, Any]:
    """A range test, which is made if it is not there."""
    kept = RUNS / f"range-{name.replace(' ', '-')}.json"
    if not kept.exists():
        *_, document = paceline("lr-range", *words, "--output", str(kept.with_suffix(".html")), "--json").splitlines()
        kept.write_text(document, encoding="utf-8")
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def paceline(command: str, *words: str) -> str:
    """Run a command on the config of this page; what it printed."""
    program = "from paceline.cli import main; main()"
    call = [sys.executable, "-W", "ignore", "-c", program, command, str(RUNS / "config.yaml"), *words]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout.splitlines()[-1][:120], flush=True)
    return done.stdout


def range_tests(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The smoothed losses over the rate, up to where they leave the height they began at."""
    lines = []
    for style_name, (words, test) in zip(STYLES, found.items(), strict=False):
        highest = 1.01 * test["points"][0]["smoothed"]
        points = [(point["rate"], point["smoothed"]) for point in test["points"] if point["smoothed"] < highest]
        lines.append(Line(words, points, style_name))  # type: ignore[arg-type]
    rates = [x for line in lines for x, _ in line.points]
    chart = Chart("Range tests: smoothed loss, nats per token", "", lines, is_named=True)
    return drawn(chart, Quantity("learning rate", min(rates), max(rates), log=True))


def held_out(study: Study, found: Mapping[str, Run]) -> str:
    """The held-out bits per byte of all runs."""
    lines = []
    for style_name, (words, run) in zip(STYLES, found.items(), strict=False):
        tokens = {int(line["step"]): line["tokens_seen"] for line in run.metrics}
        points = [
            (tokens[int(e["step"])] / 1000 if study.over_tokens else e["step"], e["bits_per_byte"])
            for e in run.evaluations
        ]
        lines.append(Line(words, points[1:], style_name))  # type: ignore[arg-type]
    last = max(x for line in lines for x, _ in line.points)
    along = Quantity("thousand tokens" if study.over_tokens else "step", 0, last)
    return drawn(Chart(f"{study.title}: held-out bits per byte", "", lines, is_named=True), along)


def rates(study: Study, found: Mapping[str, Run]) -> str:
    """The rates of all runs, each as a share of its highest."""
    lines = []
    for style_name, (words, run) in zip(STYLES, found.items(), strict=False):
        highest = max(line["lr"] for line in run.metrics)
        points = [(line["step"], line["lr"] / highest) for line in run.metrics]
        lines.append(Line(words, points, style_name))  # type: ignore[arg-type]
    chart = Chart(f"{study.title}: rate over its highest", "", lines, from_zero=True, is_named=True)
    return drawn(chart, Quantity("step", 0, STEPS), height=220)


def drawn(chart: Chart, along: Quantity, height: int = 320) -> str:
    """As an SVG file."""
    return draw(chart, along, 720, height, style("charts.css")) + "\n"


def filled(page: str, name: str, heading: str, rows: Sequence[tuple[str, str]]) -> str:
    """The page with the numbers of a study between its marks."""
    lines = [f"| | {heading} |", "| --- | --- |", *(f"| {words} | {number} |" for words, number in rows)]
    begin, end = f"<!-- numbers: {name} -->", "<!-- end -->"
    before, mark, rest = page.partition(begin)
    if not mark:
        sys.exit(f"{PAGE} has no place for {begin}")
    return "\n".join([before + begin, "", *lines, "", end]) + rest.partition(end)[2]


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
