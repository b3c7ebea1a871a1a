"""Watching a run: its records as JSON lines, TensorBoard, the terminal, and a report in one HTML file."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from paceline.config import TrackConfig
from paceline.track.base import Record, RunInfo, Tracker, Trackers

__all__ = ["Record", "RunInfo", "Tracker", "Trackers", "open_trackers"]


def open_trackers(
    folder: Path, config: TrackConfig, info: RunInfo, *, stream: TextIO | None = None, extra: Iterable[Tracker] = ()
) -> Trackers:
    """Open the trackers of a run whose files are in ``folder``; the display goes to ``stream`` (standard output).

    Metrics and evaluations after ``info.start_step`` are cut first, so that each step stands once. ``extra`` are told
    too. Raises ``TrainError`` when the folder cannot be written.
    """
    from paceline.track.jsonl import JsonLines, cut, write_info
    from paceline.track.terminal import display

    cut(folder, info.start_step)
    write_info(folder, info)
    source = JsonLines(folder)
    sinks: list[Tracker] = []
    if config.tensorboard:
        from paceline.track.tensorboard import TensorBoard

        sinks.append(TensorBoard(folder / "tensorboard", start_step=info.start_step))
    if shown := display(config.display, info, stream or sys.stdout):
        sinks.append(shown)
    return Trackers(source, [*sinks, *extra])
