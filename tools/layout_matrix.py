"""Prove layouts on many families and write ``docs/reference/layouts.md``; ``make verify-all`` runs it, for long.

    python tools/layout_matrix.py [--family NAME ...] [--check]

A cell is a layout times a family: the family's tiny model trained under the layout and in one process, in fp64, and
compared as ``paceline verify`` does. ``--check`` writes nothing and fails if a cell is not what the page says.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paceline.config import Config
from paceline.models.tiny import DROPOUTS, TINY
from paceline.verify.cases import MIXTURE, SINGLE, TOGETHER, Case, parse
from paceline.verify.run import PRELOAD, Row, Trial
from paceline.workers.pool import Pool

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "layouts.md"
RANKS = 8
STEPS = 8
OBJECTIVES = {"causal": "next_token", "masked": "masked", "seq2seq": "seq2seq"}


@dataclass(frozen=True)
class Family:
    """A model of ``models.tiny``, with what is changed of it, and whether documents of a row are isolated."""

    name: str
    settings: dict[str, object]
    isolated: bool = False
    drops_out: bool = False

    def config(self) -> Config:
        """With a vocabulary that nothing divides."""
        head, settings = TINY[self.name]
        dropouts = dict.fromkeys(DROPOUTS[self.name], DROPOUT) if self.drops_out else {}
        return Config.parse(
            {
                "model": {"config": {**settings, **self.settings, **dropouts, "vocab_size": 131}},
                "data": {"source": "unused", "isolate_documents": self.isolated},
                "objective": OBJECTIVES[head],
                "batch": {"sequences": 8, "sequence_tokens": 24},
                "train": {"steps": 1},
            }
        )


FIVE: dict[str, object] = {"num_hidden_layers": 5}
FAMILIES = {
    "llama": Family("llama", {**FIVE, "tie_word_embeddings": True}),
    "llama, untied": Family("llama", {**FIVE, "tie_word_embeddings": False}, isolated=True),
    "qwen3": Family("qwen3", FIVE, isolated=True),
    "mistral": Family("mistral", FIVE),
    "gemma2": Family("gemma2", FIVE),
    "gpt2": Family("gpt2", {"n_layer": 5}, drops_out=True),
    "gpt_neox": Family("gpt_neox", FIVE, drops_out=True),
    "olmo": Family("olmo", FIVE),
    "phi3": Family("phi3", FIVE, isolated=True),
    "mixtral": Family("mixtral", FIVE),
    "qwen3_moe": Family("qwen3_moe", {**FIVE, "output_router_logits": True, "router_aux_loss_coef": 0.5}),
    "bert": Family("bert", FIVE, drops_out=True),
    "albert": Family("albert", FIVE, drops_out=True),
    "t5": Family("t5", {"num_layers": 2}, drops_out=True),
}
"""Five blocks each, which no number of stages divides; T5 has two and two."""
DROPOUT = 0.1
SEVERAL = (
    "shard=4,zero=3",
    "tensor=4",
    "pipeline=4,schedule=1f1b",
    "replicas=2,tensor=2,sequence=true,recompute=full",
    "shard=2,tensor=2,pipeline=2,zero=2,schedule=1f1b",
)
"""Of ``TOGETHER``, what families other than Llama are tried under."""
MARKS = {"equal": "yes", "refused": "refused"}

INTRODUCTION = """# Which layouts are proven, on which families

Written by `make verify-all`. A cell says `yes` where a small model of the family, trained under the layout for eight
steps of SGD in fp64, held the same losses, gradients and parameters on every rank as one process did, within 1e-10 at
first and 1e-8 in the end, and saved and continued the same run half-way. The batch, the vocabulary, the blocks and the
lengths of the rows divide by no number of ranks; two key/value heads meet up to four tensor ranks; some rows, and so
some micro-batches, have no target. GPT-2,
GPT-NeoX, BERT, ALBERT and T5 drop out a tenth wherever they can; in `llama, untied`, `qwen3` and `phi3`
rows hold isolated documents, which cross the borders of context ranks; `qwen3_moe` learns with its balance loss.
`refused` comes with the number of a reason below; what has no word was not tried.
[What the comparison is](../guides/layouts.md#verify).
"""


def cases(family: str) -> list[Case]:
    """Llama gets all, and all pairs; other families some of what goes together, mixtures also what has experts."""
    is_mixture = any("experts" in key for key in TINY[FAMILIES[family].name][1])
    together = TOGETHER if family == "llama" else SEVERAL
    several = [*parse("; ".join((*SINGLE, *together, *(MIXTURE if is_mixture else ())))), *pairs(family)]
    return [case for case in {case.name: case for case in several}.values() if case.ranks <= RANKS]


def pairs(family: str) -> list[Case]:
    """Every two together."""
    return parse("pairs") if family == "llama" else []


def prove(families: list[str]) -> Iterator[tuple[str, Row]]:
    """Every cell, telling of it."""
    with Pool(RANKS, PRELOAD) as pool:
        for family in families:
            with Trial(FAMILIES[family].config(), pool, steps=STEPS) as trial:
                for case in cases(family):
                    row = trial.judge(case)
                    print(f"{family:<15}{row.text(60)}", flush=True)
                    yield family, row


def page(rows: list[tuple[str, Row]], families: list[str]) -> str:
    """The page: first what all families were tried under, then the pairs on Llama."""
    reasons = list(dict.fromkeys(row.reason for _, row in rows if row.verdict == "refused"))
    cells = {(family, row.layout): row for family, row in rows}
    counts = {verdict: sum(row.verdict == verdict for _, row in rows) for verdict in ("equal", "refused")}
    wrong = len(rows) - sum(counts.values())
    common = [case.name for case in parse("; ".join((*SINGLE, *TOGETHER, *MIXTURE))) if case.ranks <= RANKS]
    lines = [
        INTRODUCTION,
        f"{counts['equal']} cells are proven, {counts['refused']} refused, {wrong or 'none'} wrong.",
        "",
    ]
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


def said() -> dict[tuple[str, str], str]:
    """What the page says: by family and layout ``yes``, or ``refused`` and a number."""
    families: list[str] = []
    cells: dict[tuple[str, str], str] = {}
    for line in PAGE.read_text().splitlines():
        first, *others = [cell.strip() for cell in line.split("|")[1:-1]] or [""]
        if first == "layout":
            families = others
        elif first.startswith("`") and len(others) == len(families):
            cells |= {(family, first.strip("`")): cell for family, cell in zip(families, others, strict=True) if cell}
        elif first.startswith("`"):
            pairs = [first, *others]
            cells |= {
                ("llama", name.strip("`")): cell for name, cell in zip(pairs[::2], pairs[1::2], strict=True) if name
            }
    return cells


def differs(row: Row, said: str | None) -> bool:
    """Whether a cell is not what the page says of it."""
    return said is None or said.partition(" ")[0] != MARKS.get(row.verdict)


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
        cells = said()
        wrong += [
            f"{family} {row.layout}: the page says {cells.get((family, row.layout))}, it is {row.verdict}: {row.reason}"
            for family, row in rows
            if differs(row, cells.get((family, row.layout)))
        ]
    elif not given.family:
        PAGE.write_text(page(rows, families))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
