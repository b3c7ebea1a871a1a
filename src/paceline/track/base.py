"""What is told about a run while it trains, and to whom.

One sink is the source of truth (``JsonLines``); everything else is for looking at and may fail without harm. Records
are plain values as they stand in the run's files:

    metrics      {"step": 1, "loss": 5.1, "lr": 3e-4, "gradient_norm": 1.2, "tokens": 4096, "tokens_seen": 4096, ...}
    evaluation   {"step": 100, "loss": 2.1, "bits_per_byte": 1.6, "targets": 32000,
                  "samples": [{"prompt": "The", "text": " end"}]}
    event        {"step": 100, "kind": "checkpoint", "message": "..."}
                 {"step": 120, "kind": "rollback", "message": "...", "to": 100}: the steps after 100 are undone

``Trackers`` adds ``time`` (seconds since 1970) where it is missing.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

Record = Mapping[str, Any]

EVENT_KINDS = (
    "start",
    "resume",
    "micro",
    "checkpoint",
    "evaluate",
    "skip",
    "perturb",
    "rollback",
    "stop",
    "sync",
    "privacy",
    "export",
    "warning",
    "error",
    "done",
)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a display shows about a run besides its records."""

    name: str
    model: str
    parameters: int
    steps: int
    start_step: int = 0
    """The step of the checkpoint the run continues from; 0 for a new run."""
    replicas: int = 1
    ranks: int = 1
    """Ranks of one replica."""
    precision: str = "fp32"
    sync: str = "all_reduce"
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    machine: str = ""
    """Processors and memory, in words."""
    mfu_formula: str = ""
    """How ``mfu`` was computed, a sentence: ``MFU = ...``, with the peak it divides by."""


class Tracker(Protocol):
    """A place where records go."""

    def step(self, metrics: Record) -> None:
        """Take the metrics of one step."""

    def evaluation(self, evaluation: Record) -> None:
        """Take one measurement on the held-out part."""

    def event(self, event: Record) -> None:
        """Take something that happened once: a checkpoint, a warning, the end."""

    def close(self) -> None:
        """Let go of files and screen; nothing follows."""


class Trackers:
    """Tells every sink. A sink that fails is dropped with one warning; the source of truth may not fail.

    Events may come from any thread (a checkpoint is written in the background); calls are taken one at a time. A number
    that is not finite becomes None, since JSON has no word for it, and a warning says when that begins.
    """

    def __init__(self, source: Tracker, sinks: Iterable[Tracker] = (), *, now: Callable[[], float] = time.time) -> None:
        self._source = source
        self._sinks = list(sinks)
        self._now = now
        self._lock = threading.RLock()
        self._odd: dict[str, set[str]] = {"": set(), "held-out ": set()}
        self._step = 0

    def step(self, metrics: Record) -> None:
        """Tell the metrics of one step; ``TrainError`` if they cannot be kept."""
        with self._lock:
            self._step = metrics["step"]
            record = self._finite(metrics, "")
            self._tell(lambda sink: sink.step(record))

    def evaluation(self, evaluation: Record) -> None:
        """Tell one measurement on the held-out part; ``TrainError`` if it cannot be kept."""
        with self._lock:
            record = self._finite(evaluation, "held-out ")
            self._tell(lambda sink: sink.evaluation(record))

    def event(self, kind: str, message: str, *, step: int | None = None, to: int | None = None) -> None:
        """Tell something that happened, at the newest step unless ``step`` says otherwise; ``to`` of a rollback."""
        assert kind in EVENT_KINDS, kind
        with self._lock:
            at = self._step if step is None else step
            record = {"time": self._now(), "step": at, "kind": kind, "message": message}
            if to is not None:
                record["to"] = to
            self._tell(lambda sink: sink.event(record))

    def close(self) -> None:
        """Close every sink, the source of truth last; ``TrainError`` if that one fails."""
        with self._lock:
            for sink in tuple(self._sinks):
                self._try(sink, lambda sink: sink.close())
            self._sinks.clear()
            self._source.close()

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        call(self._source)
        for sink in tuple(self._sinks):
            self._try(sink, call)

    def _try(self, sink: Tracker, call: Callable[[Tracker], None]) -> None:
        if sink not in self._sinks:  # dropped while the others were told of another one's failure
            return
        try:
            call(sink)
        except Exception as error:  # whatever a sink does wrong, training goes on
            self._sinks.remove(sink)
            with suppress(Exception):
                sink.close()
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self.event("warning", f"{type(sink).__name__} failed and is switched off: {what}")

    def _finite(self, record: Record, prefix: str) -> Record:
        """The record with ``time`` and without numbers that are not finite."""
        odd: dict[str, float] = {}
        clean = {"time": self._now()} | {key: _finite(value, key, odd) for key, value in record.items()}
        for path in sorted(odd.keys() - self._odd[prefix]):
            self.event("warning", f"{prefix}{path} is {odd[path]}, written as null", step=record["step"])
        self._odd[prefix] = set(odd)
        return clean


def _finite(value: Any, path: str, odd: dict[str, float]) -> Any:
    """The value with None for every number that is not finite, which goes to ``odd`` under its path."""
    if isinstance(value, float) and not math.isfinite(value):
        odd[path] = value
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{path}.{key}", odd) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}.{place}", odd) for place, item in enumerate(value)]
    return value
