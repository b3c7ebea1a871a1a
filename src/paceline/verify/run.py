"""``paceline verify``: the user's model in one process and under each layout, compared value by value."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.config import Config
from paceline.errors import ConfigError, WorkerError
from paceline.verify.cases import Case, parse
from paceline.verify.compare import BOUNDS, Boxes, Difference, compare
from paceline.verify.probe import probe
from paceline.verify.subject import Subject
from paceline.workers.pool import Pool

DTYPES = {"fp64": "float64", "fp32": "float32"}
STEPS = 20


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
    cases = [own_case(config)] if layouts is None else parse(layouts)
    if layouts in {"all", "pairs"}:
        cases = [case for case in cases if case.ranks <= ranks]
    if large := [case.name for case in cases if case.ranks > ranks]:
        raise ConfigError(f"layouts: {large[0]} has more than {ranks} ranks; say --ranks for more")
    subject = Subject.of(config, full=full)
    size = max(case.ranks for case in cases)
    say(_HEADER)
    with tempfile.TemporaryDirectory(prefix="paceline-verify-") as folder, Pool(size) as pool:
        one = Case(layout=config.layout.model_copy(update=_WHOLE))
        reference_run = _run(pool, config, one, subject, dtype, Path(folder))[0]
        if "refused" in reference_run:
            raise ConfigError(f"the model does not train in one process: {reference_run['refused']}")
        reference = Boxes(Path(folder) / "case").full()
        rows = []
        for case in cases:
            rows.append(_judge(pool, config, case, subject, dtype, Path(folder), reference, reference_run))
            say(_line(rows[-1]))
    return Table(rows=tuple(rows), dtype=dtype, model=f"{subject.source.family}{'' if full else ', made small'}")


_WHOLE = {"shard": 1, "tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "recompute": "none", "sequence": False}


def own_case(config: Config) -> Case:
    """The layout and replicas that a config asks for."""
    return Case(layout=config.layout, replicas=config.replicas)


def _run(
    pool: Pool, config: Config, case: Case, subject: Subject, dtype: str, folder: Path
) -> Sequence[dict[str, Any]]:
    own = folder / "case"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    return pool.run(probe, case.ranks, config, case, subject, DTYPES[dtype], STEPS, str(own), timeout_s=300.0)


def _judge(
    pool: Pool,
    config: Config,
    case: Case,
    subject: Subject,
    dtype: str,
    folder: Path,
    reference: Any,
    reference_run: dict[str, Any],
) -> Row:
    try:
        runs = _run(pool, config, case, subject, dtype, folder)
    except WorkerError as error:
        return Row(layout=case.name, verdict="failed", reason=" ".join(str(error).strip().splitlines()[-1:]))
    if refusals := [run["refused"] for run in runs if "refused" in run]:
        return Row(layout=case.name, verdict="refused", reason=refusals[0])
    difference = compare(reference, reference_run, folder / "case", runs, BOUNDS[dtype])
    return Row(
        layout=case.name,
        verdict="DIFFERS" if difference.wrong else "equal",
        reason="; ".join(difference.wrong[:3]),
        difference=difference,
        sent_bytes=max(run["sent_bytes"] for run in runs),
        memory_bytes=max(run["memory_bytes"] for run in runs),
        tokens_per_s=min(run["tokens_per_s"] for run in runs),
    )


_HEADER = f"{'layout':<48}{'loss':>9}{'gradient':>10}{'parameter':>11}{'last loss':>11}{'KiB sent':>10}{'tokens/s':>10}"


def _line(row: Row) -> str:
    if row.difference is None:
        return f"{row.layout:<48}{row.verdict}: {row.reason}"
    d = row.difference
    numbers = (
        f"{d.loss:>9.0e}{d.gradient.error:>10.0e}{d.parameter.error:>11.0e}{d.loss_at_end:>11.0e}"
        f"{row.sent_bytes / 1024:>10,.1f}{row.tokens_per_s:>10,.0f}"
    )
    return f"{row.layout:<48}{numbers}  {row.verdict}{': ' + row.reason if row.reason else ''}"
