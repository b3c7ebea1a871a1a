"""The rate of each step: what the schedule says at its place in the run, times the scale of its batch."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from paceline.config import Config, strategy_name
from paceline.optim.schedule import Measured, MeasuringSchedule, RateSchedule
from paceline.plan.batch import Batches
from paceline.train.change import Changes
from paceline.train.replica import ModuleReplica


class Rate:
    """A schedule at work on one rank; all ranks of all replicas that take a step together have the same rate.

    ``sequences_seen`` below are those before the step, over all ranks.
    """

    def __init__(
        self, config: Config, batches: Batches, *, replica: ModuleReplica | None = None, names: Sequence[str] = ()
    ) -> None:
        """``replica`` and the ``names`` of all it trains are for schedules that measure its changes."""
        assert isinstance(config.schedule, RateSchedule)
        options, optimizer = config.schedule, config.optimizer
        self._options = options
        self._steps, self._batches = config.train.steps, batches
        self._every = config.evaluate.every
        peak: float = optimizer.lr * options.scaled(batches.full.sequences)  # type: ignore[attr-defined]
        self._measured: Measured | None = options.build(peak) if isinstance(options, MeasuringSchedule) else None
        self._changes = Changes(replica, names) if options.measures == "change" and replica is not None else None

    def factor(self, step: int, sequences_seen: int) -> float:
        """What ``optimizer.lr`` is multiplied by in step ``step``."""
        schedule = self._measured or self._options
        scale = self._options.scaled(self._batches.at(step).sequences)
        return scale * schedule.factor(*self._place(step, sequences_seen))

    def ends_cycle(self, step: int, sequences_seen: int) -> bool:
        """Whether the step after ``step`` is in another cycle of the schedule."""
        here, steps = self._place(step, sequences_seen)
        there, _ = self._place(step + 1, sequences_seen + self._batches.at(step).sequences)
        return self._options.cycle(here, steps) != self._options.cycle(there, steps)

    def measuring(self) -> AbstractContextManager[None]:
        """Around a step: what it changes is what the next one follows."""
        return nullcontext() if self._changes is None else self._follow(self._changes)

    def evaluated(self, step: int, loss: float) -> None:
        """Take the held-out loss after a step; one that is measured besides those of ``evaluate.every`` is not taken,
        so that stopping, or asking from outside, changes nothing."""
        if self._options.measures == "held_out" and self._measured and step % self._every == 0:
            self._measured.observe(loss)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing but a name for a schedule that does not measure."""
        return {"name": strategy_name(self._options), **({"state": self._measured.state()} if self._measured else {})}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; another schedule than this one's, or none, leaves it at its start."""
        if self._measured and state and state["name"] == strategy_name(self._options):
            self._measured.restore(state["state"])

    def _place(self, step: int, sequences_seen: int) -> tuple[float, float]:
        """Where ``step`` ends, and the run: in the unit of the schedule."""
        if self._options.unit == "steps":
            return step, self._steps
        full, batches = self._batches.full.sequences, self._batches
        done = sequences_seen + batches.at(step).sequences
        left = batches.sequences(step + 1, max(step, self._steps))
        return done / full, (done + left) / full

    @contextmanager
    def _follow(self, changes: Changes) -> Iterator[None]:
        assert self._measured is not None
        with changes.measured():
            yield
        self._measured.observe(changes.largest)
