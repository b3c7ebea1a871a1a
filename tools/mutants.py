"""Break the code on purpose, one line at a time, and see whether ``paceline verify`` notices; ``make mutants``.

    python tools/mutants.py [NAME ...] [--at-once 3]

Every mutant is a mistake of a kind that training systems have made: training goes on, and learns something else. It is
made in a copy of the package, on which ``paceline verify`` is then run with its default settings: first under the
layouts that should notice, all of which are among the default ones, and if these do not, under all of them. A mutant is
caught if verify fails, or refuses what the matrix of layouts says is proven. Replicas that learn alone are judged by
replicas of one process, which make the same mistake; for those the tests that should notice are run in its place.
The survivors are named, and the exit status is 1 if they are more than one in twenty.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from layout_matrix import FAMILIES, said
from mutations import MUTATIONS, Mutation
from paceline.config import override

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "mutants.md"
RUN = [sys.executable, "-W", "ignore", "-c", "from paceline.cli import main; main()"]
TIMEOUT_S = 900
SURVIVORS = 0.05
"""The share of mutants that may survive."""

INTRODUCTION = """# Mistakes that verify catches

Written by `make mutants`. Each is made on purpose in a copy of the package, in one line or a few; then
[`paceline verify`](../guides/layouts.md#verify) runs on a small model. `layout` is the first that was not equal.
"""
TESTS = """## Of replicas that learn alone

Verify judges such replicas by replicas of one process each, which make these mistakes as well. It is the tests that
have to notice, which compare with the definitions.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutation: Mutation
    caught_by: str
    """The layout; empty for a survivor."""
    how: str
    seconds: float


def try_one(mutation: Mutation) -> Outcome:
    """Make the mutant, and verify it."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        package = folder / "paceline"
        shutil.copytree(ROOT / "src" / "paceline", package, ignore=shutil.ignore_patterns("__pycache__"))
        path = package / mutation.path
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: {mutation.path} has its line {text.count(mutation.old)} times, not once"
            )
        path.write_text(text.replace(mutation.old, mutation.new))
        if mutation.tests:
            return Outcome(mutation, *tested(folder, mutation.tests), time.monotonic() - began_s)
        config = folder / "config.yaml"
        tree = {**FAMILIES[mutation.family].config().tree(), "optimizer": yaml.safe_load(mutation.optimizer)}
        tree = override(tree, mutation.overrides)
        config.write_text(yaml.safe_dump(tree))
        for layouts in (mutation.layouts, None):
            layout, how = verified(config, folder, mutation.family, layouts)
            if layout:
                break
    return Outcome(mutation, layout, how, time.monotonic() - began_s)


def verified(config: Path, path: Path, family: str, layouts: str | None) -> tuple[str, str]:
    """The first layout that is wrong, or refused though the page says it is proven, and how; else two empty texts."""
    words = ["verify", str(config), "--json", *([] if layouts is None else ["--layouts", layouts])]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    try:
        ended = subprocess.run(
            [*RUN, *words], env=environment, cwd=path, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return layouts or "all", "no end"
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return layouts or "all", (ended.stderr.strip().splitlines() or ["no word"])[-1]
    values = json.loads(lines[-1])
    if "rows" not in values:
        return layouts or "all", str(values)
    proven = {layout for (name, layout), word in said().items() if name == family and word == "yes"}
    for row in values["rows"]:
        if row["verdict"] not in ("equal", "refused"):
            return row["layout"], row["reason"]
        if row["verdict"] == "refused" and row["layout"] in proven:
            return row["layout"], f"refused: {row['reason']}"
    return "", ""


def tested(path: Path, tests: Sequence[str]) -> tuple[str, str]:
    """The first test that fails, and how; else two empty texts."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", *(f"tests/{name}" for name in tests)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    try:
        ended = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return tests[0], "no end"
    failed = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if ended.returncode != 0 and not failed:
        raise SystemExit(f"{' '.join(words)}: {ended.stdout}{ended.stderr}")
    if not failed:
        return "", ""
    name, _, how = failed[0].partition(" ")[2].partition(" - ")
    return name.removeprefix("tests/").replace("::", ", "), how


def page(outcomes: Sequence[Outcome]) -> str:
    """What was caught and how."""
    caught = sum(bool(outcome.caught_by) for outcome in outcomes)
    lines = [INTRODUCTION, f"{caught} of {len(outcomes)} are caught.", ""]
    lines += [
        "| what is wrong | in | model, optimizer, options | layout | verify says |",
        "| --- | --- | --- | --- | --- |",
    ]
    for outcome in (outcome for outcome in outcomes if not outcome.mutation.tests):
        mutation = outcome.mutation
        found = f"`{outcome.caught_by}`" if outcome.caught_by else "**none**"
        asked = ", ".join((mutation.family, mutation.optimizer, *mutation.overrides))
        how = outcome.how.partition(";")[0].replace("|", "\\|") or "survives"
        lines.append(f"| {mutation.name} | `{mutation.path}` | {asked} | {found} | {how} |")
    lines += ["", TESTS, "| what is wrong | in | the test that notices |", "| --- | --- | --- |"]
    for outcome in (outcome for outcome in outcomes if outcome.mutation.tests):
        mutation = outcome.mutation
        found = f"`{outcome.caught_by}`" if outcome.caught_by else "**none**"
        lines.append(f"| {mutation.name} | `{mutation.path}` | {found} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Try them all, tell of each, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="a part of the names of some; default all")
    parser.add_argument("--at-once", type=int, default=3, help="how many are tried side by side; default 3")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.name or any(name in m.name for name in given.name)]
    outcomes = []
    with ThreadPoolExecutor(given.at_once) as pool:
        for outcome in pool.map(try_one, chosen):
            outcomes.append(outcome)
            said = f"{outcome.caught_by}: {outcome.how[:110]}" if outcome.caught_by else "SURVIVES"
            print(f"{outcome.seconds:5.0f} s  {outcome.mutation.name}\n         {said}", flush=True)
    survivors = [outcome.mutation.name for outcome in outcomes if not outcome.caught_by]
    print(f"\n{len(outcomes) - len(survivors)} of {len(outcomes)} caught; survivors: {'; '.join(survivors) or 'none'}")
    if not given.name:
        PAGE.write_text(page(outcomes))
    if len(survivors) > SURVIVORS * len(outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
