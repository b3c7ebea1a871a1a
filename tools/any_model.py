"""Try four ways to cut on every family of causal language models that transformers has, and write
``docs/reference/families.md``; ``make any-model`` runs it, for about half an hour.

    python tools/any_model.py [FAMILY ...]

Each family's default config is made small as ``paceline verify`` makes it, trained for a few steps in fp64 in one
process and under each layout, and compared as ``paceline verify`` compares. Families that are named are tried and shown
only.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paceline.config import Config
from paceline.errors import PacelineError
from paceline.verify.cases import parse
from paceline.verify.run import PRELOAD, Trial
from paceline.verify.subject import Subject
from paceline.workers.pool import Pool

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "families.md"
LAYOUTS = ("shard=2", "tensor=2", "pipeline=2", "context=2")
STEPS = 4
EXPLAINED = ("refused", "by chance", "by batch")
"""Verdicts whose reasons the page lists."""
MOST_PARAMETERS = 20_000_000
"""A family that is still larger when it is made small is not tried."""

INTRODUCTION = """# Which families can be cut

Written by `make any-model`, with transformers {version}. Every family of causal language models was made small, trained
in one process and over two ranks in fp64, and compared as [`paceline verify`](../guides/layouts.md#verify) compares:
`yes` where losses, gradients, parameters and checkpoints were equal within 1e-10. `refused` comes with the number of a
reason below; a family that is refused trains in one process, as replicas, and under the layouts that say `yes`. `by
chance`: it trains, but draws random numbers of its own by micro-batch, so that ranks draw others than one process. `by
batch`: it trains, but what it makes of a row depends on the rows beside it in a micro-batch, in one process too.
"""


@dataclass(frozen=True)
class Cell:
    """What became of a family under a layout."""

    verdict: str
    reason: str


def config(family: str) -> Config:
    """A run of the family's default config."""
    return Config.parse(
        {"model": {"config": {"model_type": family}}, "data": {"source": "unused"}, "train": {"steps": STEPS}}
    )


def attempt(family: str, pool: Pool) -> list[Cell] | str:
    """A cell for each layout, or why the family does not train in one process."""
    try:
        small = Subject.of(config(family), full=False).source.meta()
        if (size := sum(parameter.numel() for parameter in small.parameters())) > MOST_PARAMETERS:
            return f"it still has {size / 1e6:.0f} M parameters when its config is made small"
        trial = Trial(config(family), pool, steps=STEPS)
    except PacelineError as error:
        return reason_of(str(error))
    except Exception as error:  # each family raises what it likes
        return reason_of(f"{type(error).__name__}: {error}")
    with trial:
        rows = [trial.judge(case) for case in parse("; ".join(LAYOUTS))]
    return [Cell(row.verdict, row.reason) for row in rows]


def reason_of(text: str) -> str:
    """The last line, of a readable length."""
    line = text.strip().splitlines()[-1]
    return line if len(line) <= 200 else line[:197] + "..."


def tried(families: list[str]) -> Iterator[tuple[str, list[Cell] | str]]:
    """All families, telling of each."""
    with Pool(2, PRELOAD) as pool:
        for family in families:
            result = attempt(family, pool)
            words = [result] if isinstance(result, str) else [f"{cell.verdict:<8}" for cell in result]
            print(f"{family:<28}{' '.join(words)}", flush=True)
            for cell in [] if isinstance(result, str) else result:
                if cell.verdict != "equal":
                    print(f"    {cell.verdict}: {cell.reason}", flush=True)
            yield family, result


def page(results: dict[str, list[Cell] | str]) -> str:
    """The table, and the reasons."""
    cut = {family: cells for family, cells in results.items() if not isinstance(cells, str)}
    reasons = list(dict.fromkeys(cell.reason for cells in cut.values() for cell in cells if cell.verdict in EXPLAINED))
    counts = [Counter(cells[i].verdict for cells in cut.values()) for i in range(len(LAYOUTS))]
    lines = [INTRODUCTION.format(version=transformers.__version__)]
    lines.append(f"{len(cut)} of {len(results)} families train in one process here. Of these are proven:\n")
    for layout, count in zip(LAYOUTS, counts, strict=True):
        lines.append(f"- `{layout}`: {count['equal']} ({100 * count['equal'] / max(1, len(cut)):.0f} %)")
    lines += ["", "| family | " + " | ".join(f"`{layout}`" for layout in LAYOUTS) + " |", "| --- |" + " --- |" * 4]
    for family, cells in sorted(cut.items()):
        shown = [
            "yes"
            if cell.verdict == "equal"
            else f"{cell.verdict} {reasons.index(cell.reason) + 1}"
            if cell.verdict in EXPLAINED
            else cell.verdict
            for cell in cells
        ]
        lines.append(f"| {family} | {' | '.join(shown)} |")
    lines += ["", "## Why not", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, start=1))]
    lines += ["", "## Not tried: what does not train in one process from its small config", ""]
    lines += [f"- {family}: {why}" for family, why in sorted(results.items()) if isinstance(why, str)]
    return "\n".join([*lines, ""])


def main() -> None:
    """Try, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    given = parser.parse_args()
    results = dict(tried(given.family or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    wrong = [
        f"{family} {layout}: {cell.verdict}: {cell.reason}"
        for family, cells in results.items()
        if not isinstance(cells, str)
        for layout, cell in zip(LAYOUTS, cells, strict=True)
        if cell.verdict not in ("equal", *EXPLAINED)
    ]
    if not given.family:
        PAGE.write_text(page(results))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
