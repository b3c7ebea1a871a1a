"""Write docs/reference/schedules.md and its pictures, from the schedules and averages themselves.

python tools/schedules_reference.py            write the page and docs/reference/schedules/*.svg
python tools/schedules_reference.py --check    fail if they are not what would be written
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from config_reference import summary, table
from paceline import registry
from paceline.config import Options
from paceline.optim.schedule import RateSchedule
from paceline.optim.warmup import Warmup
from paceline.track.axes import Quantity
from paceline.track.charts import Chart, Line, draw
from paceline.track.report import style

ROOT = Path(__file__).resolve().parent.parent / "docs" / "reference"
PAGE, PICTURES = ROOT / "schedules.md", ROOT / "schedules"
STEPS = 200
PEAK = 0.05

HEAD = """\
# Schedules and averages

How the learning rate moves over a run (`schedule`), and what may be kept of the weights beside those that are
trained (`average`). This page is generated from the code, the curves by the schedules themselves: edit those, then
run `make docs`.

The rate of a step is `optimizer.lr`, the peak, times a **factor** in (0, 1], times the scale of its batch. In the
formulas s = 1, 2, ... is the step, n the steps of the run, w those of the warm-up, and t = (s - w) / (n - w) the
share of the rest that is done. In the first w steps the factor is s / w, but for `one_cycle` and `cyclic`, which
rise by themselves.

Steps are those of the whole run, over all ranks of all replicas, so a schedule does not depend on how the work is
shared, and a run that goes on from a checkpoint goes on in its schedule, bit for bit. Two schedules measure
something (`plateau` the held-out loss, `dynamic` how the weights move); what they remember is in the checkpoint.

## Options of all schedules
"""
UNITS = """\
While the [batch grows](config.md#batchwarmup) a step is not always the same amount of text. With `unit: steps` (the
default) a schedule counts steps all the same. With `unit: tokens` it counts what they really had, in steps of the
full batch: a step of a quarter of the batch moves it on by a quarter, and s and n above are such numbers. All
sequences of a run are equally long, so this is the number of tokens up to a factor. Without growth there is no
difference.

`scale` is for a rate that was found with another batch: with `base_sequences: 32` and a step of 128 sequences,
`linear` multiplies it by 4 and `sqrt` by 2. It goes by the sequences of the step over all ranks, so it follows the
world size where the batch does, and it follows a batch that grows. A scaled rate wants its warm-up; `--dry-run`
shows the rates.

## Schedules
"""
AVERAGES = """\
## Averages

An average is one more fp32 copy of what is trained, cut as the parameters are. Updates are element by element, so
it is the same under every layout. Evaluations, samples and the export are of the average once there is one
(`evaluate: false`, `export: false` leave them with the trained weights); training goes on with the weights
themselves, bit for bit as without it. It is in the checkpoint: a run that begins to keep one begins at the step it
goes on from. Buffers are those of the trained weights; a model with running statistics (BatchNorm) is refused.
Below, m weights have been taken before.
"""


def stalling(step: int) -> float:
    """A held-out loss that falls in three stages, and lies still between them."""
    return 2 + 3 * math.exp(-step / 8) + sum(0.5 / (1 + math.exp((step - at) / 2)) for at in (95, 150))


def calming(step: int) -> float:
    """Movements of the weights that calm down, with two shocks."""
    return 0.1 * math.exp(-step / 30) + 0.08 * (step in {120, 121})


OBSERVED: dict[str, tuple[dict[str, Any], Callable[[int], float], str]] = {
    "plateau": ({}, stalling, "Drawn for a held-out loss that falls in three stages, evaluated every 5 steps."),
    "dynamic": ({}, calming, "Drawn for changes that calm down, with a shock at step 120."),
}
"""Of schedules that measure: options, what they are told, and words for that."""


def main() -> None:
    """Write the page and the pictures, or compare them."""
    wanted = {PAGE: render(), **{PICTURES / f"{name}.svg": picture(name) for name in registry.SCHEDULES}}
    if "--check" not in sys.argv[1:]:
        PICTURES.mkdir(parents=True, exist_ok=True)
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        return
    there = {PAGE, *PICTURES.glob("*")}
    if there != wanted.keys() or any(path.read_text(encoding="utf-8") != text for path, text in wanted.items()):
        sys.exit(f"{PAGE} or its pictures are not what the schedules say: run `make docs` and commit them")


def render() -> str:
    """The whole page."""
    common = [*RateSchedule.model_fields, *Warmup.model_fields]
    parts = [HEAD, table(Warmup, dict.fromkeys(common)), UNITS]
    parts += [section(name, registry.SCHEDULES, set(common)) for name in registry.SCHEDULES]
    parts.append(AVERAGES)
    parts += [section(name, registry.AVERAGES, set()) for name in registry.AVERAGES if name != "none"]
    return "\n".join(parts)


def section(name: str, known: registry.Table, common: set[str]) -> str:
    """Source, summary, curve, formula and own options."""
    cls: type[Options] = known.load(name)
    source = (inspect.getdoc(importlib.import_module(cls.__module__)) or "").partition("\n\n")[0].replace("\n", " ")
    _, *rest = (inspect.getdoc(cls) or "").split("\n\n")
    lines = [f"### `{name}`", *([source.replace("``", "`")] if "(" in source else []), summary(cls)]
    if known is registry.SCHEDULES:
        lines.append(f"![The factor of {name} over {STEPS} steps](schedules/{name}.svg)")
        lines += [OBSERVED[name][2]] if name in OBSERVED else []
    lines += [paragraph(text) for text in rest]
    own = [field for field in cls.model_fields if field not in common or differs(cls, field)]
    if own:
        lines.append(table(cls, own).rstrip())
    return "\n\n".join(lines) + "\n"


def differs(cls: type[Options], field: str) -> bool:
    """Whether a class has another default for an option that all schedules have."""
    owner = Warmup.model_fields.get(field)
    return owner is not None and owner.default != cls.model_fields[field].default


def paragraph(text: str) -> str:
    """A formula as it stands, anything else as text."""
    is_formula = text.partition(" ")[2].startswith("=")
    return "```text\n" + text.replace("``", "") + "\n```" if is_formula else text.replace("\n", " ").replace("``", "`")


def picture(name: str) -> str:
    """The curve of a schedule with its default options, as an SVG file."""
    points = list(zip(range(1, STEPS + 1), factors(name), strict=True))
    chart = Chart(f"{name}: factor", "", [Line(name, points)], from_zero=True)
    return draw(chart, Quantity("step", 1, STEPS), 372, 170, style("charts.css")) + "\n"


def factors(name: str) -> Iterable[float]:
    """Of steps 1 to ``STEPS``."""
    options, told, _ = OBSERVED.get(name, ({}, lambda step: 0.0, ""))
    schedule = registry.SCHEDULES.load(name)(**options)
    at_work = schedule.build(PEAK) if schedule.measures else schedule
    for step in range(1, STEPS + 1):
        yield at_work.factor(step, STEPS)
        if schedule.measures == "change" or (schedule.measures == "held_out" and step % 5 == 0):
            at_work.observe(told(step))


if __name__ == "__main__":
    main()
