"""The display of a run: live on a terminal, aligned lines elsewhere, or none."""

import time
from collections.abc import Callable
from typing import Literal, TextIO

from rich.console import Console

from paceline.track.base import Record, RunInfo, Tracker
from paceline.track.live import LiveDisplay
from paceline.track.progress import Progress, event_words, held_out_words, loss_scale_words, ranks_words
from paceline.track.words import clock, count, one_line, percent, quantity

Mode = Literal["auto", "live", "plain", "none"]


def display(mode: Mode, info: RunInfo, stream: TextIO) -> Tracker | None:
    """The display for ``mode`` on ``stream``; ``auto`` is live where ``stream`` is a terminal that can show it."""
    console = Console(file=stream)
    if mode == "auto":
        able = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
        mode = "live" if able else "plain"
    if mode == "live":
        return LiveDisplay(info, console)
    return PlainDisplay(info, stream) if mode == "plain" else None


class PlainDisplay:
    """One line for each of the first three steps, then at most one a second, thinning out to one a minute.

    Evaluations, events and the last step are always printed.
    """

    def __init__(self, info: RunInfo, stream: TextIO, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._progress = Progress(info, monotonic)
        self._stream = stream
        self._monotonic = monotonic
        self._told_at = monotonic()
        self._steps_told = 0
        self._say(
            f"{one_line(info.name)}: {one_line(info.model)}, {count(info.parameters)} parameters, "
            f"{ranks_words(info)}, {info.precision}, {info.sync}"
        )
        if info.mfu_formula:
            self._say(one_line(info.mfu_formula))

    def step(self, metrics: Record) -> None:
        """Print the step if it is time to."""
        self._progress.take_step(metrics)
        waited = self._monotonic() - self._told_at
        pause = min(60.0, max(1.0, self._progress.elapsed_s() / 20))
        if self._steps_told < 3 or waited >= pause or self._progress.step == self._progress.info.steps:
            self._say(self._line())
            self._steps_told += 1
            self._told_at = self._monotonic()

    def evaluation(self, evaluation: Record) -> None:
        """Print the measurement."""
        self._progress.held_out = evaluation
        loss = f", loss {quantity(evaluation.get('loss'))}" if evaluation.get("bits_per_byte") is not None else ""
        targets = f" over {count(evaluation['targets'])} targets" if "targets" in evaluation else ""
        averaged = ", of the averaged weights" if evaluation.get("averaged") else ""
        self._say(f"{self._at(evaluation)}  held-out {held_out_words(evaluation)}{loss}{targets}{averaged}")

    def event(self, event: Record) -> None:
        """Print the event, but for evaluations, which have their own line."""
        if event["kind"] != "evaluate":
            self._say(f"{self._at(event)}  {event_words(event)}")

    def close(self) -> None:
        """Nothing is held."""

    def _at(self, record: Record) -> str:
        steps = self._progress.info.steps
        return f"step {record['step']:>{len(str(steps))}}/{steps}"

    def _line(self) -> str:
        progress, metrics = self._progress, self._progress.metrics
        parts = [self._at(metrics), f"loss {quantity(metrics.get('loss')):>6}"]
        if metrics.get("tokens_per_s") is not None:
            parts.append(f"{metrics['tokens_per_s']:>7,.0f} tokens/s")
        if metrics.get("mfu") is not None:
            parts.append(f"MFU {percent(metrics['mfu']):>5}")
        parts.append(f"{clock(progress.left_s()):>5} left")
        if metrics.get("skipped_steps"):
            parts.append(f"loss scale {loss_scale_words(metrics)}")
        if progress.held_out is not None:
            parts.append(f"held-out {held_out_words(progress.held_out)}")
        return "  ".join(parts)

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
