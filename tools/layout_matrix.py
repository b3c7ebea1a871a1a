"""Prove layouts on many families and write ``docs/reference/layouts.md``; ``make verify-all`` runs it, for long.

    python tools/layout_matrix.py [--family NAME ...] [--check]

A cell is a layout times a family: the family's tiny model trained under the layout and in one process, in fp64, and
compared as ``paceline verify`` does. ``--check`` writes nothing and fails if a cell is not what the page says.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from paceline.config import Config
from paceline.models.tiny import TINY
from paceline.verify.cases import MIXTURE, SINGLE, TOGETHER, Case, parse
from paceline.verify.run import Row, Trial
from paceline.workers.pool import Pool

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "layouts.md"
RANKS = 8
OBJECTIVES = {"causal": "next_token", "masked": "masked", "seq2seq": "seq2seq"}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "qwen3": {"num_hidden_layers": 4},
    "mistral": {"num_hidden_layers": 4},
    "gemma2": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "gpt_neox": {"num_hidden_layers": 4},
    "olmo": {"num_hidden_layers": 4},
    "phi3": {"num_hidden_layers": 4},
    "mixtral": {"num_hidden_layers": 4},
    "qwen3_moe": {"num_hidden_layers": 4},
    "bert": {"num_hidden_layers": 4},
    "albert": {"num_hidden_layers": 4},
    "t5": {"num_layers": 2},
}
"""Four blocks each, so that schedules of two stages a rank have a block a stage; all but T5's (two and two)."""
MARKS = {"equal": "yes", "refused": "refused"}

INTRODUCTION = """# Which layouts are proven, on which families

Written by `make verify-all`. A cell says `yes` where a small model of the family, trained under the layout for 20 steps
of plain SGD in fp64, held the same loss, gradients and parameters on every rank as one process did, within 1e-10; the
batch, the vocabulary and the lengths of the rows divide by no number of ranks. `refused` comes with the number of a
reason below. [What the comparison is](../guides/layouts.md#verify).
"""


def config(family: str) -> Config:
    """The family's tiny model with a vocabulary that nothing divides."""
    head, settings = TINY[family]
    return Config.parse(
        {
            "model": {"config": {**settings, **FAMILIES[family], "vocab_size": 131}},
            "data": {"source": "unused"},
            "objective": OBJECTIVES[head],
            "batch": {"sequences": 8, "sequence_tokens": 24},
            "train": {"steps": 1},
        }
    )


def cases(family: str) -> list[Case]:
    """Mixtures get those with experts, Llama all pairs as well."""
    is_mixture = any("experts" in key for key in TINY[family][1])
    several = [*parse("; ".join((*SINGLE, *TOGETHER, *(MIXTURE if is_mixture else ())))), *pairs(family)]
    return [case for case in {case.name: case for case in several}.values() if case.ranks <= RANKS]


def pairs(family: str) -> list[Case]:
    """Every two together."""
    return parse("pairs") if family == "llama" else []


def prove(families: list[str]) -> Iterator[tuple[str, Row]]:
    """Every cell, telling of it."""
    with Pool(RANKS) as pool:
        for family in families:
            with Trial(config(family), pool) as trial:
                for case in cases(family):
                    row = trial.judge(case)
                    print(f"{family:<10}{row.text(60)}", flush=True)
                    yield family, row


def page(rows: list[tuple[str, Row]], families: list[str]) -> str:
    """The page: first what all families were tried under, then the pairs on Llama."""
    reasons = list(dict.fromkeys(row.reason for _, row in rows if row.verdict == "refused"))
    cells = {(family, row.layout): row for family, row in rows}
    counts = {verdict: sum(row.verdict == verdict for _, row in rows) for verdict in ("equal", "refused")}
    common = [case.name for case in parse("; ".join((*SINGLE, *TOGETHER, *MIXTURE))) if case.ranks <= RANKS]
    lines = [INTRODUCTION, f"{counts['equal']} cells are proven, {counts['refused']} refused, none is wrong.", ""]
    lines += [f"| layout | {' | '.join(families)} |", "| --- |" + " --- |" * len(families)]
    for name in common:
        lines.append(f"| `{name}` | {' | '.join(mark(cells.get((family, name)), reasons) for family in families)} |")
    paired = [row for family, row in rows if family == "llama" and row.layout not in common]
    lines += ["", "## Every two together, on Llama", "", "| layouts | | layouts | |", "| --- | --- | --- | --- |"]
    for first, second in zip(paired[::2], [*paired[1::2], None], strict=False):
        right = f"`{second.layout}` | {mark(second, reasons)}" if second else " | "
        lines.append(f"| `{first.layout}` | {mark(first, reasons)} | {right} |")
    lines += ["", "## Why refused", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, start=1)), ""]
    return "\n".join(lines)


def mark(row: Row | None, reasons: list[str]) -> str:
    """What a cell says; nothing of what only mixtures of experts are tried under."""
    if row is None:
        return ""
    return (
        f"refused {reasons.index(row.reason) + 1}" if row.verdict == "refused" else MARKS.get(row.verdict, row.verdict)
    )


def differences(rows: list[tuple[str, Row]]) -> list[str]:
    """Cells that are not as the page says, on the families' table."""
    header, *table = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    said = {
        (family, line[0].strip("`")): cell for line in table for family, cell in zip(header[1:], line[1:], strict=False)
    }
    return [
        f"{family} {row.layout}: the page says {said.get((family, row.layout))}, it is {row.verdict}: {row.reason}"
        for family, row in rows
        if not said.get((family, row.layout), "").startswith(MARKS.get(row.verdict, row.verdict))
    ]


def main() -> None:
    """Prove, then write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default all")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    families = given.family or list(FAMILIES)
    rows = list(prove(families))
    wrong = [f"{family} {row.text()}" for family, row in rows if not row.is_good]
    if given.check:
        wrong += differences(
            [(family, row) for family, row in rows if row.layout in {c.name for c in cases("mixtral")}]
        )
    elif not wrong and not given.family:
        PAGE.write_text(page(rows, families))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
