"""``paceline verify``: the user's model in one process and under each layout, compared value by value."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from paceline.checkpoint.folder import step_name
from paceline.config import Config, LayoutConfig, LossScaleConfig, Options, strategy_name
from paceline.errors import ConfigError, PlanError, WorkerError
from paceline.plan.precision import PRECISIONS
from paceline.plan.run import plan_run
from paceline.train.settle import settle
from paceline.verify.cases import SEQUENCES, Case, parse
from paceline.verify.compare import (
    Boxes,
    Difference,
    Reference,
    bounds_of,
    compare,
    compare_saved,
    gradient_distance,
    saved_distance,
)
from paceline.verify.probe import Half, probe
from paceline.verify.routing import NEAR_TIE
from paceline.verify.subject import Subject
from paceline.workers.pool import Pool

LOSS_SCALE = LossScaleConfig(initial=64.0, growth_steps=3)
"""It grows six times in a run, and stays where nothing overflows: what does is for tests of its own."""
PRELOAD = (probe.__module__,)
STEPS = 20
SHUFFLED = 3
"""Rows of the first step whose tokens are put in disorder, to see whether a bound would notice."""
HEADER = (
    f"{'loss':>9}{'gradient':>10}{'parameter':>11}{'last loss':>11}{'KiB sent':>10}{'MiB':>6}{'tokens/s':>10}"
    "  verdict  gradient that differs most"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one layout."""

    layout: str
    optimizer: str = "sgd"
    """What made the updates."""
    verdict: str
    """``equal``, ``DIFFERS``, ``by chance`` (other random numbers are drawn), ``by batch`` (micro-batches of its
    size differ in one process too), ``refused`` or ``failed``."""
    reason: str = ""
    difference: Difference | None = None
    sent_bytes: float = 0.0
    """Of the rank that sends most, a step."""
    memory_bytes: int = 0
    tokens_per_s: float = 0.0

    def text(self, width: int = 0) -> str:
        """A line of the table, whose first column has ``width``."""
        if self.difference is None:
            return f"{self.name:<{width}}  {self.verdict}: {self.reason}"
        d = self.difference
        numbers = (
            f"{d.loss:>9.0e}{d.gradient.error:>10.0e}{d.parameter.error:>11.0e}{d.loss_at_end:>11.0e}"
            f"{self.sent_bytes / 1024:>10,.1f}{self.memory_bytes / 2**20:>6,.0f}{self.tokens_per_s:>10,.0f}"
        )
        return f"{self.name:<{width}}{numbers}  {self.verdict:<7}  {d.gradient.name}" + (
            f": {self.reason}" if self.reason else ""
        )

    @property
    def name(self) -> str:
        """What the first column says."""
        return named(self.layout, self.optimizer)

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
    named: bool
    """The layouts were asked for one by one, or are the config's own: then one that is refused is not proven."""

    @property
    def is_good(self) -> bool:
        """Whether no row differs or failed, or was refused though it was asked for by name."""
        return all(row.verdict == "equal" if self.named else row.is_good for row in self.rows)

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "equal": self.is_good}

    def text(self) -> str:
        """For a person."""
        layouts = {row.layout: [other for other in self.rows if other.layout == row.layout] for row in self.rows}
        refused = sum(any(row.verdict == "refused" for row in rows) for rows in layouts.values())
        bad = sum(not all(row.is_good for row in rows) for rows in layouts.values())
        others = sorted({row.optimizer for row in self.rows} - {"sgd"})
        updates = f" and of {', '.join(others)}" if others else ""
        return (
            f"\n{len(layouts) - refused - bad} layout(s) equal to one process, {refused} refused, {bad} wrong: "
            f"{self.model}, {self.dtype}, {STEPS} steps of SGD{updates}, every gradient and parameter of every rank"
        )


def named(layout: str, optimizer: str) -> str:
    """A layout and, if it is not that of all proofs, an optimizer."""
    return layout if optimizer == "sgd" else f"{layout} with {optimizer}"


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

    Gradients are compared in a run of SGD, which hides nothing. A config's optimizer that updates each value by itself
    cannot see how a tensor was cut. One that looks further is judged in a second run of each case, by its updates on
    equal gradients: such methods divide by the gradient's own size, and make steps of its roundings.
    """
    if dtype not in PRECISIONS:
        raise ConfigError(f"dtype={dtype!r}: expected one of {', '.join(PRECISIONS)}")
    config = settle(config, say=say)
    own = Case(layout=config.layout, replicas=config.all_replicas, compiled=config.train.compile)
    if layouts is None and own == Case(layout=LayoutConfig()):
        layouts = "all"
    cases = [own] if layouts is None else parse(layouts)
    sweep = layouts in {"all", "pairs"}
    if sweep:
        cases = [case for case in cases if case.ranks <= ranks]
    if large := [case.name for case in cases if case.ranks > ranks]:
        raise ConfigError(f"layouts: {large[0]} has more than {ranks} ranks; say --ranks for more")
    if not cases:
        raise ConfigError(f"layouts={layouts!r} names no layout")
    own_optimizer: Any = config.optimizer
    optimizers = [None] if own_optimizer.sees == "values" else [None, config.optimizer]
    rows = []
    with Pool(max(1, *(case.ranks for case in cases)), PRELOAD) as pool:
        for optimizer in optimizers:
            with Trial(config, pool, dtype=dtype, full=full, optimizer=optimizer) as trial:
                if layouts == "all" and not trial.is_mixture:
                    cases = [case for case in cases if case.layout.expert == 1]
                width = max(len(named(case.name, trial.optimizer)) for case in cases)
                say(f"{'layout':<{width}}{HEADER}")
                for case in cases:
                    rows.append(trial.judge(case))
                    say(rows[-1].text(width))
    model = f"{trial.subject.source.family}{'' if full else ', made small'}"
    return Table(rows=tuple(rows), dtype=dtype, model=model, named=not sweep)


class Trial:
    """A model that was trained in one process, to judge layouts by.

    Where the sync lets replicas differ, it was trained by as many replicas as a layout has, of one process each. A
    layout trains the first half of the steps and saves; the second half is trained by a new start of it, from what the
    layout before it saved at that step. With an ``optimizer`` in place of SGD that is what is judged: under each layout
    it gets the gradients of one process.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        *,
        dtype: str = "fp64",
        full: bool = False,
        steps: int = STEPS,
        optimizer: Options | None = None,
        replicas: int = 1,
    ) -> None:
        if config.in_rounds:
            raise PlanError(
                "verify compares the steps of all ranks one by one, and each replica of sync=federated takes those of "
                "clients of its own. Verify the layout with sync=all_reduce"
            )
        if any(sync.claims for sync in config.syncs):
            raise PlanError(
                "verify compares the steps of all replicas one by one, and with sync=async_local_sgd each takes what "
                "is next. Verify the layout with sync=diloco"
            )
        self.subject = Subject.of(config, full=full)
        self._config, self._pool, self._dtype, self._full = _in_precision(config, dtype), pool, dtype, full
        self._temporary = tempfile.TemporaryDirectory(prefix="paceline-verify-")
        self._folder = Path(self._temporary.name)
        self._exact: Trial | None = None
        self._others: dict[int, Trial] = {}
        self._steps, self._half, self._replicas = steps, steps // 2, replicas
        self._optimizer = optimizer
        self.optimizer = "sgd" if optimizer is None else strategy_name(optimizer)
        runs = self._run(replicas, [(self._alone("one"), steps)], given="")
        self._own_run = runs[0]
        if "refused" in self._own_run:
            self.__exit__()
            raise PlanError(self._own_run["refused"])
        self._own = [Reference(tensors=t, run=run) for t, run in zip(Boxes(self._boxes).full(), runs, strict=True)]
        self._given = shutil.copytree(self._boxes, self._folder / "given") if self._gives else None
        self._saved = self._own_saved = self._kept(self._folder / "one", self._folder / "own")
        self._bounds = bounds_of(dtype, self._own_run["blocks"])
        if PRECISIONS[dtype].compute_bytes == 2:
            self._bounds = replace(self._bounds, saved=max(self._bounds.saved, 3 * self._drift()))
            self._check_bound()

    @property
    def is_mixture(self) -> bool:
        """Whether the model has experts among which tokens choose."""
        return bool(self._own_run["routes"])

    def judge(self, case: Case) -> Row:
        """Train under a layout, and compare; in fp64 if rounding could change which experts are chosen."""
        if case.replicas != self._replicas and not self._config.is_exact:
            try:
                plan_run(self._of(case, self._folder))
            except PlanError as error:
                return self._row(case, "refused", str(error))
            return self._of_replicas(case.replicas).judge(case)
        if self._dtype == "fp64" or self._own_run["narrowest"] >= NEAR_TIE:
            return self._judge(case)
        if self._exact is None:
            self._exact = self._like_this(dtype="fp64", replicas=self._replicas)
        row = self._exact._judge(case)
        return replace(row, reason="; ".join(filter(None, ("near ties in routing, so judged in fp64", row.reason))))

    def _of_replicas(self, replicas: int) -> "Trial":
        """The same trial by another number of replicas."""
        if replicas not in self._others:
            self._others[replicas] = self._like_this(dtype=self._dtype, replicas=replicas)
        return self._others[replicas]

    def _like_this(self, *, dtype: str, replicas: int) -> "Trial":
        return Trial(
            self._config,
            self._pool,
            dtype=dtype,
            full=self._full,
            steps=self._steps,
            optimizer=self._optimizer,
            replicas=replicas,
        )

    def _judge(self, case: Case) -> Row:
        first, second = self._folder / "first", self._folder / "second"
        for folder in (first, second):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            halves = [
                (self._of(case, first), self._half),
                (self._of(case, second, resumed=True), self._steps),
            ]
            for config, _ in halves:
                plan_run(config)
            shutil.copytree(self._saved, second / "checkpoints")
            runs = self._run(case.ranks, halves, given=str(self._given) if self._given else None)
        except PlanError as error:
            return self._row(case, "refused", str(error))
        except WorkerError as error:
            return self._row(case, "failed", str(error).strip().splitlines()[-1])
        if refusals := [run["refused"] for run in runs if "refused" in run]:
            return self._row(case, "refused", refusals[0])
        difference = compare(self._own, self._boxes, runs, self._bounds)
        wrong = (*difference.wrong, *compare_saved(self._own_saved, first / "checkpoints", self._half, self._bounds))
        if not wrong:
            self._saved = self._kept(first, self._folder / "saved")
        verdict = "DIFFERS" if wrong else "equal"
        if wrong and (by_chance := self._own_run["by_chance"]):
            verdict, wrong = "by chance", (f"{by_chance}, by micro-batch and not by sequence", *wrong)
        elif wrong and (rows := self._micro_batch_that_differs(case)):
            said = (
                f"in one process too, micro-batches of {rows} row(s) differ: what is beside a row changes what it gives"
            )
            verdict, wrong = "by batch", (said, *wrong)
        return replace(
            self._row(case, verdict, "; ".join(wrong[:3])),
            difference=difference,
            sent_bytes=max(run["sent_bytes"] for run in runs),
            memory_bytes=max(run["memory_bytes"] for run in runs),
            tokens_per_s=min(run["tokens_per_s"] for run in runs),
        )

    def _micro_batch_that_differs(self, case: Case) -> int:
        """Rows of the case's micro-batches, if one process with these differs as well; else 0.

        Then it is the family's own forward pass that computes rows otherwise beside others: where it breaks ties by the
        length of the longest, for example.
        """
        if case.layout == LayoutConfig() and case.replicas == self._replicas:
            return 0
        _, batch = plan_run(case.config(self._config, steps=self._steps, output=self._folder / "control"))
        accumulate = -(-SEQUENCES // (self._replicas * batch.micro))
        control = Case(layout=LayoutConfig(), replicas=self._replicas, accumulate=accumulate)
        first = (control.config(self._config, steps=self._steps, output=self._folder / "control"), 1)
        runs = self._run(self._replicas, [first])
        shutil.rmtree(self._folder / "control", ignore_errors=True)
        if "refused" in runs[0]:
            return 0
        distance = gradient_distance(self._own[0].tensors, Boxes(self._boxes).full()[0])
        return 0 if distance <= self._bounds.gradient else batch.micro

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()
        for other in (*self._others.values(), *([self._exact] if self._exact else [])):
            other.__exit__()

    @property
    def _boxes(self) -> Path:
        return self._folder / "boxes"

    @property
    def _gives(self) -> bool:
        """Whether layouts get the gradients of one process; one that looks at the loss makes its own."""
        optimizer: Any = self._optimizer
        return optimizer is not None and optimizer.sees != "loss"

    def _row(self, case: Case, verdict: str, reason: str) -> Row:
        return Row(layout=case.name, optimizer=self.optimizer, verdict=verdict, reason=reason)

    def _of(self, case: Case, output: Path, *, resumed: bool = False) -> Config:
        return case.config(self._config, steps=self._steps, output=output, resumed=resumed, optimizer=self._optimizer)

    def _alone(self, name: str) -> Config:
        return self._of(Case(layout=LayoutConfig(), replicas=self._replicas, accumulate=1), self._folder / name)

    def _drift(self) -> float:
        """What roundings alone come to in saved states, of which no depth tells: one process, its batches in other
        micro-batches, is so far from itself."""
        case = Case(layout=LayoutConfig(), replicas=self._replicas, accumulate=3)
        output = self._folder / "drift"
        self._run(self._replicas, [(self._of(case, output), self._half)], given=str(self._given))
        return saved_distance(self._own_saved, output / "checkpoints", self._half, self._bounds.floor)

    def _check_bound(self) -> None:
        """Raise ``ConfigError`` if the bound would let a batch pass of which every fifth row is in disorder."""
        self._run(self._replicas, [(self._alone("control"), 1)], replace(self.subject, shuffled=SHUFFLED))
        distance = gradient_distance(self._own[0].tensors, Boxes(self._boxes).full()[0])
        if not distance > self._bounds.gradient:
            raise ConfigError(
                f"dtype={self._dtype}: with rows in disorder the gradients differ by {distance:.1e}, and roundings "
                f"alone may come to {self._bounds.gradient:.1e}: {self._dtype} proves nothing on this model. Use fp64"
            )

    def _run(
        self, ranks: int, halves: list[Half], subject: Subject | None = None, *, given: str | None = None
    ) -> list[dict[str, Any]]:
        shutil.rmtree(self._boxes, ignore_errors=True)
        self._boxes.mkdir()
        given = given if self._gives else None
        arguments = (halves, subject or self.subject, self._dtype, str(self._boxes), given)
        return self._pool.run(probe, ranks, *arguments, timeout_s=300.0)

    def _kept(self, run: Path, folder: Path) -> Path:
        """The checkpoint after the first half of a run, by itself."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run / "checkpoints" / step_name(self._half), folder / step_name(self._half))
        return folder


def _in_precision(config: Config, precision: str) -> Config:
    """The config as it is proven in a precision; in fp64 and fp32 sums of gradients are not rounded further."""
    scale = LOSS_SCALE if PRECISIONS[precision].is_scaled else LossScaleConfig()
    reduction = config.reduction if PRECISIONS[precision].compute_bytes == 2 else "fp32"
    changes = {"precision": precision, "loss_scale": scale, "reduction": reduction}
    return config.model_copy(update=changes)
