"""``paceline verify``: the user's model in one process and under each layout, compared value by value."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from paceline.config import Config, LayoutConfig
from paceline.errors import ConfigError, PlanError, WorkerError
from paceline.verify.cases import Case, parse
from paceline.verify.compare import BOUNDS, Boxes, Difference, compare
from paceline.verify.probe import probe
from paceline.verify.subject import Subject
from paceline.workers.pool import Pool

DTYPES = {"fp64": "float64", "fp32": "float32"}
STEPS = 20
HEADER = f"{'loss':>9}{'gradient':>10}{'parameter':>11}{'last loss':>11}{'KiB sent':>10}{'MiB':>6}{'tokens/s':>10}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one layout."""

    layout: str
    verdict: str
    """``equal``, ``DIFFERS``, ``refused`` or ``failed``."""
    reason: str = ""
    difference: Difference | None = None
    sent_bytes: float = 0.0
    """Of the rank that sends most, a step."""
    memory_bytes: int = 0
    tokens_per_s: float = 0.0

    def text(self, width: int = 0) -> str:
        """A line of the table, whose first column has ``width``."""
        if self.difference is None:
            return f"{self.layout:<{width}}  {self.verdict}: {self.reason}"
        d = self.difference
        numbers = (
            f"{d.loss:>9.0e}{d.gradient.error:>10.0e}{d.parameter.error:>11.0e}{d.loss_at_end:>11.0e}"
            f"{self.sent_bytes / 1024:>10,.1f}{self.memory_bytes / 2**20:>6,.0f}{self.tokens_per_s:>10,.0f}"
        )
        return f"{self.layout:<{width}}{numbers}  {self.verdict}{': ' + self.reason if self.reason else ''}"

    @property
    def is_good(self) -> bool:
        """Equal, or refused with a reason."""
        return self.verdict in {"equal", "refused"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows, and what was verified."""

    rows: tuple[Row, ...]
    dtype: str
    model: str

    @property
    def is_good(self) -> bool:
        """Whether no row differs or failed."""
        return all(row.is_good for row in self.rows)

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "equal": self.is_good}

    def text(self) -> str:
        """For a person."""
        proven = sum(row.verdict == "equal" for row in self.rows)
        refused = sum(row.verdict == "refused" for row in self.rows)
        bad = len(self.rows) - proven - refused
        return (
            f"\n{proven} layout(s) equal to one process, {refused} refused, {bad} wrong: {self.model}, {self.dtype}, "
            f"{STEPS} steps of plain SGD, every gradient and parameter of every rank"
        )


def verify(
    config: Config,
    layouts: str | None = None,
    *,
    ranks: int = 8,
    dtype: str = "fp64",
    full: bool = False,
    say: Callable[[str], None] = print,
) -> Table:
    """Run the cases one after the other, telling of each as it ends.

    ``layouts`` as ``cases.parse`` reads them; by default the config's own. Cases of more than ``ranks`` ranks are left
    out of ``all`` and ``pairs``, and refused where they were named.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    cases = [Case(layout=config.layout, replicas=config.replicas)] if layouts is None else parse(layouts)
    if layouts in {"all", "pairs"}:
        cases = [case for case in cases if case.ranks <= ranks]
    if large := [case.name for case in cases if case.ranks > ranks]:
        raise ConfigError(f"layouts: {large[0]} has more than {ranks} ranks; say --ranks for more")
    if not cases:
        raise ConfigError(f"layouts={layouts!r} names no layout")
    rows = []
    with Pool(max(1, *(case.ranks for case in cases))) as pool, Trial(config, pool, dtype=dtype, full=full) as trial:
        width = max(len(case.name) for case in cases)
        say(f"{'layout':<{width}}{HEADER}")
        for case in cases:
            rows.append(trial.judge(case))
            say(rows[-1].text(width))
    model = f"{trial.subject.source.family}{'' if full else ', made small'}"
    return Table(rows=tuple(rows), dtype=dtype, model=model)


class Trial:
    """A model that was trained in one process, to judge layouts by."""

    def __init__(self, config: Config, pool: Pool, *, dtype: str = "fp64", full: bool = False) -> None:
        self.subject = Subject.of(config, full=full)
        self._config, self._pool, self._dtype = config, pool, dtype
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-verify-")
        self._own_run = self._run(Case(layout=LayoutConfig()))[0]
        self._own = Boxes(self._case_folder).full()

    def judge(self, case: Case) -> Row:
        """Train under a layout, and compare."""
        try:
            case.check()
            runs = self._run(case)
        except PlanError as error:
            return Row(layout=case.name, verdict="refused", reason=str(error))
        except WorkerError as error:
            return Row(layout=case.name, verdict="failed", reason=str(error).strip().splitlines()[-1])
        if refusals := [run["refused"] for run in runs if "refused" in run]:
            return Row(layout=case.name, verdict="refused", reason=refusals[0])
        difference = compare(self._own, self._own_run, self._case_folder, runs, BOUNDS[self._dtype])
        return Row(
            layout=case.name,
            verdict="DIFFERS" if difference.wrong else "equal",
            reason="; ".join(difference.wrong[:3]),
            difference=difference,
            sent_bytes=max(run["sent_bytes"] for run in runs),
            memory_bytes=max(run["memory_bytes"] for run in runs),
            tokens_per_s=min(run["tokens_per_s"] for run in runs),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def _case_folder(self) -> Path:
        return Path(self._folder.name) / "case"

    def _run(self, case: Case) -> list[dict[str, Any]]:
        folder = self._case_folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        dtype = DTYPES[self._dtype]
        arguments = (self._config, case, self.subject, dtype, STEPS, str(folder))
        return self._pool.run(probe, case.ranks, *arguments, timeout_s=300.0)
