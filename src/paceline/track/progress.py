"""Where a run stands, put together from its records for a display."""

from collections import deque
from collections.abc import Callable

from paceline.track.base import Record, RunInfo
from paceline.track.curves import History, Smoother, smoothing_steps
from paceline.track.words import one_line, quantity


class Progress:
    """The newest values of a run; ``clock`` counts seconds from anywhere."""

    def __init__(self, info: RunInfo, clock: Callable[[], float]) -> None:
        self.info = info
        self.metrics: Record = {"step": info.start_step}
        self.held_out: Record | None = None
        self.smoothed: float | None = None
        self.losses = History()
        self.events: deque[tuple[float, Record]] = deque(maxlen=3)
        self._smoother = Smoother(smoothing_steps(info.steps))
        self._clock = clock
        self._begun = clock()
        self._first: tuple[int, float] | None = None

    @property
    def step(self) -> int:
        """The newest finished step."""
        step: int = self.metrics["step"]
        return step

    def take_step(self, metrics: Record) -> None:
        """Take the metrics of a step."""
        self.metrics = metrics
        self.smoothed = self._smoother.add(metrics.get("loss"))
        if self.smoothed is not None:
            self.losses.add(self.smoothed)
        if self._first is None:
            self._first = (self.step, self._clock())

    def take_event(self, event: Record) -> None:
        """Take an event."""
        self.events.append((self.elapsed_s(), event))

    def elapsed_s(self) -> float:
        """Seconds since the display began."""
        return self._clock() - self._begun

    def left_s(self) -> float | None:
        """Seconds to the last step at the speed since the first one; None while there is no speed."""
        if self.step >= self.info.steps:
            return 0.0
        if self._first is None or self.step == self._first[0]:
            return None
        step, then = self._first
        return (self._clock() - then) / (self.step - step) * (self.info.steps - self.step)

    def data_wait(self) -> float | None:
        """The share of the step spent waiting for data."""
        wait, whole = self.metrics.get("data_wait_s"), self.metrics.get("step_s")
        return None if wait is None or not whole else wait / whole

    def next_checkpoint(self) -> int:
        """The step after which the next checkpoint is saved."""
        every, steps = self.info.checkpoint_every, self.info.steps
        return min(steps, (self.step // every + 1) * every) if every else steps


def held_out_words(evaluation: Record) -> str:
    """A measurement in words: bits per byte where there are bytes, else the loss."""
    if evaluation.get("bits_per_byte") is not None:
        return f"{quantity(evaluation['bits_per_byte'])} bits/byte"
    return f"loss {quantity(evaluation.get('loss'))}"


def loss_scale_words(metrics: Record) -> str:
    """The loss scale of a step, and how many steps were skipped so far."""
    skipped = metrics["skipped_steps"]
    return f"{metrics['loss_scale']:,.10g}" + (f", {skipped:,} skipped" if skipped else "")


def ranks_words(info: RunInfo) -> str:
    """Replicas and ranks in words: ``2 replicas x 4 ranks``."""
    replicas = f"{info.replicas} replica{'s' * (info.replicas != 1)}"
    return f"{replicas} x {info.ranks} rank{'s' * (info.ranks != 1)}"


def event_words(event: Record) -> str:
    """An event on one line, without control characters."""
    return f"{event['kind']}: {one_line(event['message'])}"
