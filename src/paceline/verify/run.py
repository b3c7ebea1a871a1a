"""``paceline verify``: the user's model in one process and under each layout, compared value by value."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from paceline.checkpoint.folder import step_name
from paceline.config import Config, LayoutConfig
from paceline.errors import ConfigError, PlanError, WorkerError
from paceline.plan.run import plan_run
from paceline.verify.cases import Case, parse
from paceline.verify.compare import Boxes, Difference, Reference, bounds_of, compare, compare_saved, gradient_distance
from paceline.verify.probe import Half, probe
from paceline.verify.routing import NEAR_TIE
from paceline.verify.subject import Subject
from paceline.workers.pool import Pool

DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}
PRELOAD = (probe.__module__,)
STEPS = 20
SHUFFLED = 3
"""Rows of the first step whose tokens are put in disorder, to see whether a bound would notice."""
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
            f"{STEPS} steps of SGD, every gradient and parameter of every rank"
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

    ``layouts`` as ``cases.parse`` reads them; by default the config's own, or ``all`` for a config of one process.
    Cases of more than ``ranks`` ranks are left out of ``all`` and ``pairs``, and refused where they were named.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    own = Case(layout=config.layout, replicas=config.all_replicas)
    if layouts is None and own == Case(layout=LayoutConfig()):
        layouts = "all"
    cases = [own] if layouts is None else parse(layouts)
    if layouts in {"all", "pairs"}:
        cases = [case for case in cases if case.ranks <= ranks]
    if large := [case.name for case in cases if case.ranks > ranks]:
        raise ConfigError(f"layouts: {large[0]} has more than {ranks} ranks; say --ranks for more")
    if not cases:
        raise ConfigError(f"layouts={layouts!r} names no layout")
    rows = []
    with (
        Pool(max(1, *(case.ranks for case in cases)), PRELOAD) as pool,
        Trial(config, pool, dtype=dtype, full=full) as trial,
    ):
        if layouts == "all" and not trial.is_mixture:
            cases = [case for case in cases if case.layout.expert == 1]
        width = max(len(case.name) for case in cases)
        say(f"{'layout':<{width}}{HEADER}")
        for case in cases:
            rows.append(trial.judge(case))
            say(rows[-1].text(width))
    model = f"{trial.subject.source.family}{'' if full else ', made small'}"
    return Table(rows=tuple(rows), dtype=dtype, model=model)


class Trial:
    """A model that was trained in one process, to judge layouts by.

    Where the sync lets replicas differ, it was trained by as many replicas as a layout has, of one process each. A
    layout trains the first half of the steps and saves; the second half is trained by a new start of it, from what the
    layout before it saved at that step.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        *,
        dtype: str = "fp64",
        full: bool = False,
        steps: int = STEPS,
        replicas: int = 1,
    ) -> None:
        self.subject = Subject.of(config, full=full)
        self._config, self._pool, self._dtype, self._full = config, pool, dtype, full
        self._temporary = tempfile.TemporaryDirectory(prefix="paceline-verify-")
        self._folder = Path(self._temporary.name)
        self._steps, self._half, self._replicas = steps, steps // 2, replicas
        runs = self._run(replicas, [(self._alone("one"), steps)])
        self._own = [Reference(tensors=t, run=run) for t, run in zip(Boxes(self._boxes).full(), runs, strict=True)]
        self._own_run = runs[0]
        self._saved = self._own_saved = self._kept(self._folder / "one", self._folder / "own")
        self._bounds = bounds_of(dtype, self._own_run["blocks"])
        self._exact: Trial | None = None
        self._others: dict[int, Trial] = {}
        if dtype == "bf16":
            self._check_bound()

    @property
    def is_mixture(self) -> bool:
        """Whether the model has experts among which tokens choose."""
        return bool(self._own_run["routes"])

    def judge(self, case: Case) -> Row:
        """Train under a layout, and compare; in fp64 if rounding could change which experts are chosen."""
        if case.replicas != self._replicas and not all(sync.keeps_equal for sync in self._config.syncs):  # type: ignore[attr-defined]
            try:
                plan_run(case.config(self._config, steps=self._steps, output=self._folder))
            except PlanError as error:
                return Row(layout=case.name, verdict="refused", reason=str(error))
            return self._of_replicas(case.replicas).judge(case)
        if self._dtype == "fp64" or self._own_run["narrowest"] >= NEAR_TIE:
            return self._judge(case)
        if self._exact is None:
            self._exact = Trial(self._config, self._pool, full=self._full, steps=self._steps, replicas=self._replicas)
        row = self._exact._judge(case)
        return replace(row, reason="; ".join(filter(None, ("near ties in routing, so judged in fp64", row.reason))))

    def _of_replicas(self, replicas: int) -> "Trial":
        """The same trial by another number of replicas."""
        if replicas not in self._others:
            self._others[replicas] = Trial(
                self._config, self._pool, dtype=self._dtype, full=self._full, steps=self._steps, replicas=replicas
            )
        return self._others[replicas]

    def _judge(self, case: Case) -> Row:
        first, second = self._folder / "first", self._folder / "second"
        for folder in (first, second):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            halves = [
                (case.config(self._config, steps=self._steps, output=first), self._half),
                (case.config(self._config, steps=self._steps, output=second, resumed=True), self._steps),
            ]
            for config, _ in halves:
                plan_run(config)
            shutil.copytree(self._saved, second / "checkpoints")
            runs = self._run(case.ranks, halves)
        except PlanError as error:
            return Row(layout=case.name, verdict="refused", reason=str(error))
        except WorkerError as error:
            return Row(layout=case.name, verdict="failed", reason=str(error).strip().splitlines()[-1])
        if refusals := [run["refused"] for run in runs if "refused" in run]:
            return Row(layout=case.name, verdict="refused", reason=refusals[0])
        difference = compare(self._own, self._boxes, runs, self._bounds)
        wrong = (*difference.wrong, *compare_saved(self._own_saved, first / "checkpoints", self._half, self._bounds))
        if not wrong:
            self._saved = self._kept(first, self._folder / "saved")
        return Row(
            layout=case.name,
            verdict="DIFFERS" if wrong else "equal",
            reason="; ".join(wrong[:3]),
            difference=difference,
            sent_bytes=max(run["sent_bytes"] for run in runs),
            memory_bytes=max(run["memory_bytes"] for run in runs),
            tokens_per_s=min(run["tokens_per_s"] for run in runs),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()
        for other in (*self._others.values(), *([self._exact] if self._exact else [])):
            other.__exit__()

    @property
    def _boxes(self) -> Path:
        return self._folder / "boxes"

    def _alone(self, name: str) -> Config:
        return Case(layout=LayoutConfig(), replicas=self._replicas, accumulate=1).config(
            self._config, steps=self._steps, output=self._folder / name
        )

    def _check_bound(self) -> None:
        """Raise ``ConfigError`` if the bound would let a batch pass of which every fifth row is in disorder."""
        self._run(self._replicas, [(self._alone("control"), 1)], replace(self.subject, shuffled=SHUFFLED))
        distance = gradient_distance(self._own[0].tensors, Boxes(self._boxes).full()[0])
        if not distance > self._bounds.gradient:
            raise ConfigError(
                f"dtype=bf16: with rows in disorder the gradients differ by {distance:.1e}, and roundings alone may "
                f"come to {self._bounds.gradient:.1e}: bf16 proves nothing on this model. Use fp64"
            )

    def _run(self, ranks: int, halves: list[Half], subject: Subject | None = None) -> list[dict[str, Any]]:
        shutil.rmtree(self._boxes, ignore_errors=True)
        self._boxes.mkdir()
        arguments = (halves, subject or self.subject, DTYPES[self._dtype], str(self._boxes))
        return self._pool.run(probe, ranks, *arguments, timeout_s=300.0)

    def _kept(self, run: Path, folder: Path) -> Path:
        """The checkpoint after the first half of a run, by itself."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run / "checkpoints" / step_name(self._half), folder / step_name(self._half))
        return folder
