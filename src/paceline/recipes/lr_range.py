"""``paceline lr-range``: a short run whose rate rises exponentially (Smith 2017, arXiv 1506.01186, section 3.3)."""

import math
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from paceline.comm.device import claim as claim_device
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, join
from paceline.config import CheckpointConfig, Config, EvaluateConfig, strategy_name
from paceline.errors import ConfigError, NonFiniteError, PlanError
from paceline.launch import torchrun
from paceline.launch.local import LocalRun
from paceline.optim.average import NoAverage
from paceline.optim.schedule import RateSchedule
from paceline.plan.layout import Grid
from paceline.plan.run import plan_run
from paceline.recipes.prepare import prepare_in_child
from paceline.recipes.train import places
from paceline.track.axes import Mark, Quantity
from paceline.track.charts import Chart, Line, draw
from paceline.track.curves import Smoother
from paceline.track.markup import element
from paceline.track.report import page, table, write_page
from paceline.track.words import quantity, rate
from paceline.train.assemble import assemble
from paceline.train.policy import StopRequest
from paceline.train.settle import settle
from paceline.train.trainer import Loop
from paceline.workers.process import Line as Wire

Say = Callable[[str], None]

TOO_HIGH = 2.0
"""The test ends when the smoothed loss is so many times its lowest: what follows says nothing more."""
FALLEN = 0.9
RULE = f"half the rate at which the smoothed loss has made {100 * FALLEN:.0f} % of its fall"
"""Beyond it a higher rate gains nothing; the half is for a run that stays there. The lowest point itself says little:
optimizers that normalise the gradient do not diverge, and then it is noise."""
ROWS = 12


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step of the test."""

    rate: float
    loss: float
    smoothed: float


class Rising(RateSchedule):
    """From ``share`` of the peak to the peak in ``count`` steps, by the same factor in every step."""

    share: float
    count: int

    has_cycles: ClassVar[bool] = False

    def factor(self, step: float, steps: float) -> float:
        """See ``RateSchedule.factor``."""
        return math.pow(self.share, 1 - min(1.0, (step - 1) / (self.count - 1)))


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What was seen."""

    name: str
    points: Sequence[Point]

    @property
    def end_of_fall(self) -> float:
        """The first rate at which the smoothed loss has made most of its way to its lowest value."""
        first, lowest = self.points[0].smoothed, min(point.smoothed for point in self.points)
        level = first - FALLEN * (first - lowest)
        return next(point.rate for point in self.points if point.smoothed <= level)

    @property
    def suggested(self) -> float:
        """By ``RULE``."""
        return self.end_of_fall / 2

    @property
    def is_within(self) -> bool:
        """Whether the fall ended well before the test did: else a higher rate may be better still."""
        return 2 * self.end_of_fall <= self.points[-1].rate

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "suggested": self.suggested,
            "end_of_fall": self.end_of_fall,
            "rule": RULE,
            "is_within": self.is_within,
            "points": [{"rate": p.rate, "loss": p.loss, "smoothed": p.smoothed} for p in self.points],
        }

    def words(self) -> str:
        """The suggestion in a sentence."""
        text = f"suggested rate {rate(self.suggested)}: {RULE} ({rate(self.end_of_fall)})"
        return text if self.is_within else f"{text}; it was still falling at the end: go on to a higher rate with --to"

    def html(self) -> str:
        """One self-contained page."""
        marks = [Mark(self.suggested, "chosen", f"suggested: {rate(self.suggested)}")]
        along = Quantity("learning rate", self.points[0].rate, self.points[-1].rate, log=True, marks=marks)
        lines = [
            Line("each step", [(point.rate, point.loss) for point in self.points], "raw"),
            Line("smoothed loss", [(point.rate, point.smoothed) for point in self.points]),
        ]
        rows = [[rate(p.rate), quantity(p.loss), quantity(p.smoothed)] for p in _spread(self.points)]
        return page(
            f"Learning-rate range test of {self.name}",
            element("p", f"{self.words()[0].upper()}{self.words()[1:]}. The dashed line marks it."),
            element("figure", draw(Chart("Loss", "nats per token", lines, is_named=True), along, 776, 320)),
            element("section", element("h2", "Numbers"), table(["learning rate", "loss", "smoothed"], rows, numbers=3)),
        )


def lr_range(
    config: Config,
    output: Path,
    *,
    low: float,
    high: float,
    steps: int,
    debug: bool = False,
    say: Say = print,
) -> RangeTest:
    """Try rates from ``low`` to ``high`` in ``steps`` steps of a config, without checkpoints, and write the picture.

    All else is as the config says, but that the batch does not grow and the weights are neither averaged nor
    perturbed. Raises what training raises before its first step, ``ConfigError`` for a range that is none, and
    ``PlanError`` under torchrun.
    """
    if not 0 < low < high or steps < 10:
        raise ConfigError(f"from {low:g} to {high:g} in {steps} steps: expected 0 < from < to, and 10 steps or more")
    if config.model is None:
        raise ConfigError("model is missing; set model.config, model.preset or model.path")
    if torchrun.started_by_torchrun():
        raise PlanError("lr-range starts its ranks itself: run it without torchrun, on one machine")
    optimizer: Any = config.optimizer
    if optimizer.schedule is not None:
        raise PlanError(
            f"optimizer={strategy_name(config.optimizer)} averages weights by their rate, which a range test changes "
            "from step to step. Try rates with optimizer=adamw"
        )
    config = settle(config)
    if not config.keeps_equal:
        raise PlanError(
            f"{config.learning_alone}: replicas that learn alone have losses of their own, by which they would end "
            "the test at different rates. Use sync=all_reduce"
        )
    if config.in_rounds:
        raise PlanError(
            "sync=federated: a step is a round of many clients, who would all go on at a rate that is too high. Use "
            "sync=all_reduce"
        )
    points: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="paceline-lr-range-") as folder:
        run = _prepared(config, folder, low=low, high=high, steps=steps)
        prepare_in_child(run, Path(folder) / "logs" / "prepare.log", say=say, debug=debug)
        say(f"{'rate':>10}  {'loss':>8}  {'smoothed':>8}")
        for point in _measured(run, folder, steps, debug=debug):
            if len(points) % max(1, steps // ROWS) == 0:
                say(f"{rate(point.rate):>10}  {quantity(point.loss):>8}  {quantity(point.smoothed):>8}")
            points.append(point)
    if len(points) < 2:
        raise PlanError(
            f"the loss was not finite after {len(points)} step(s), at a rate of {low:g}: use a lower --from"
        )
    found = RangeTest(name=config.train.output, points=points)
    write_page(output, found.html())
    return found


def _prepared(config: Config, folder: str, *, low: float, high: float, steps: int) -> Config:
    """The run of a test: one step longer than is made, so that nothing that happens after the last one does."""
    optimizer: Any = config.optimizer
    return config.model_copy(
        update={
            "optimizer": optimizer.model_copy(update={"lr": high}),
            "schedule": Rising(share=low / high, count=steps),
            "batch": config.batch.model_copy(update={"warmup": None}),
            "train": config.train.model_copy(update={"steps": steps + 1, "output": folder}),
            "average": NoAverage(),
            "perturb": None,
            "spikes": None,
            "early_stop": None,
            "checkpoint": CheckpointConfig(),
            "evaluate": EvaluateConfig(),
        }
    )


def _measured(config: Config, folder: str, steps: int, *, debug: bool) -> Iterator[Point]:
    """What the leader tells, while it runs."""
    grid, _ = plan_run(config)
    local = LocalRun(
        _RangeMain(config, steps), places(config, grid.ranks), port=0, logs=Path(folder) / "logs", debug=debug
    )
    try:
        for rank, message in local.messages():
            if rank == 0 and message["kind"] == "point":
                yield Point(**message["point"])
    finally:
        local.kill()


@dataclass(frozen=True)
class _RangeMain:
    """What each local rank runs. A class, so that a spawned process can receive it."""

    config: Config
    steps: int

    def __call__(self, coordinates: Coordinates, rendezvous: Rendezvous, line: Wire) -> None:
        stop_request = StopRequest()
        stop_request.listen(signal.SIGTERM)
        device = claim_device(coordinates)
        smoother, lowest = Smoother(self.steps // 20), math.inf
        with (
            join(coordinates, device, rendezvous, Grid.of(self.config.layout), self.config.group_sizes) as world,
            Loop(assemble(self.config, world, say=lambda _: None), stop_request=stop_request) as loop,
            suppress(NonFiniteError),  # on all ranks alike: the test is over
        ):
            for event in loop.steps():
                if not event.skipped:  # a step in which fp16 overflowed says nothing of the rate
                    smoothed = smoother.add(event.loss)
                    assert smoothed is not None
                    lowest = min(lowest, smoothed)
                    if coordinates.is_leader:
                        line.send("point", point={"rate": event.lr, "loss": event.loss, "smoothed": smoothed})
                    if smoothed > TOO_HIGH * lowest:
                        break
                if event.step == self.steps:
                    break


def _spread(points: Sequence[Point]) -> list[Point]:
    """Some of the points, the first and the last among them."""
    last = len(points) - 1
    return [points[round(i * last / (ROWS - 1))] for i in range(ROWS)] if last >= ROWS else list(points)
