"""What the rows of ``sync/rows.py`` cost in quality: ``measured.json``, which ``make sync-table`` writes.

loss    held-out, after so many steps of one small model, by row and seed
worth   the share of these steps in which all-reduce, with the same schedule drawn together, gets to the same loss:
        between its own losses after a quarter, a half and all of the steps it is interpolated in log(steps)
"""

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("measured.json")
BASELINE = "all_reduce"
YARDSTICKS = {"all_reduce, a quarter of the steps": 0.25, "all_reduce, half of the steps": 0.5, BASELINE: 1.0}
"""Runs of all-reduce with the worth that they have by definition."""


@functools.cache
def read() -> Mapping[str, Mapping[str, Any]]:
    """By row and seed (as text) what a run came to; rows that have not been measured are not in it."""
    runs: Mapping[str, Mapping[str, Any]] = json.loads(PATH.read_text())["runs"]
    return runs


def worth(name: str, runs: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Of a row, over the seeds that it and all yardsticks have; None if there is none."""
    every = [runs.get(row, {}) for row in (name, *YARDSTICKS)]
    seeds = sorted(set.intersection(*(set(row) for row in every)))
    if not seeds:
        return None
    loss, *known = [statistics.fmean(row[seed]["loss"] for seed in seeds) for row in every]
    return interpolate(loss, known, list(YARDSTICKS.values()))


def interpolate(loss: float, losses: Sequence[float], shares: Sequence[float]) -> float:
    """The share at which a line through (log share, loss) has this loss; the outer pieces go on to both sides.

    Never above 1: what is better than all-reduce by chance is as good.
    """
    pieces = list(zip(zip(losses, shares, strict=True), zip(losses[1:], shares[1:], strict=True), strict=False))
    (first, low), (second, high) = next((p for p in pieces if loss >= p[1][0]), pieces[-1])
    place = (first - loss) / (first - second)
    return min(1.0, math.exp(math.log(low) + place * math.log(high / low)))
