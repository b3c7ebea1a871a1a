"""Scalars and samples of text for TensorBoard, by the ``tensorboard`` package alone.

Every event is written when it is told, so a kill loses nothing. A run that continues from a checkpoint opens a new
file that starts with the mark by which TensorBoard forgets the points after that checkpoint: no point stands twice.
"""

import time
from pathlib import Path
from typing import Any

from paceline.track.base import Record

TAGS = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "tokens_seen": "train/tokens_seen",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "step_s": "speed/step_s",
    "data_wait_s": "speed/data_wait_s",
    "memory_bytes": "memory/bytes",
}
HELD_OUT_TAGS = {"loss": "held_out/loss", "bits_per_byte": "held_out/bits_per_byte"}


class TensorBoard:
    """One event file in ``folder``; ``start_step`` is the step of the checkpoint the run continues from, 0 for none."""

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event_pb2, self._summary_pb2, self._text_pb = event_pb2, summary_pb2, text_pb
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads files in the order of their names; the name must hold "tfevents".
        file = open(folder / f"events.out.tfevents.{now:017.6f}.paceline", "xb")  # noqa: SIM115 - closed by close()
        self._writer: Any = RecordWriter(file)
        self._write(event_pb2.Event(wall_time=now, file_version="brain.Event:2"))
        self._forget_after(start_step, now)

    def step(self, metrics: Record) -> None:
        """Write the scalars of one step."""
        self._scalars(metrics, TAGS)

    def evaluation(self, evaluation: Record) -> None:
        """Write the held-out scalars and each sample as text."""
        self._scalars(evaluation, HELD_OUT_TAGS)
        for place, sample in enumerate(evaluation.get("samples", ())):
            # Four blanks before a line: Markdown keeps the block as it is.
            lines = "".join(_reading_order(sample)).splitlines()
            text = "\n".join("    " + line for line in lines)
            self._summary(evaluation, self._text_pb(f"samples/{place}", text))

    def event(self, event: Record) -> None:
        """Events are not shown; the points that a rollback undoes are forgotten."""
        if event["kind"] == "rollback":
            self._forget_after(event["to"], event["time"])

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _forget_after(self, step: int, now: float) -> None:
        """Leave the mark by which TensorBoard forgets the points after ``step``."""
        started = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
        self._write(self._event_pb2.Event(wall_time=now, step=step + 1, session_log=started))

    def _scalars(self, record: Record, tags: dict[str, str]) -> None:
        found = [(tag, record[key]) for key, tag in tags.items() if record.get(key) is not None]
        value = self._summary_pb2.Summary.Value
        self._summary(record, self._summary_pb2.Summary(value=[value(tag=tag, simple_value=x) for tag, x in found]))

    def _summary(self, record: Record, summary: Any) -> None:
        self._write(self._event_pb2.Event(wall_time=record["time"], step=record["step"], summary=summary))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _reading_order(sample: Record) -> tuple[str, str]:
    """A model that writes backward has put its text before the prompt."""
    pieces = (sample["prompt"], sample["text"])
    return pieces[::-1] if sample.get("backward") else pieces
