"""A run folder, read whole for a report. Only what a started run always has must be there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paceline.errors import PacelineError
from paceline.track.axes import Mark, Steps
from paceline.track.base import RunInfo
from paceline.track.curves import Point, Values
from paceline.track.jsonl import EVENTS, METRICS, RUN, read_evaluations, read_events, read_metrics


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What the files of a run say; a file that is not there leaves its part empty."""

    path: Path
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config_text: str
    config: Mapping[str, Any]
    info: RunInfo | None
    summary: Mapping[str, Any]

    def column(self, key: str) -> list[float | None]:
        """One number of every step, None where it is not known."""
        return [_number(record.get(key)) for record in self.metrics]

    def points(self, values: Values) -> list[Point]:
        """The values over the steps of ``metrics``."""
        return [(record["step"], value) for record, value in zip(self.metrics, values, strict=True)]

    def held_out(self, key: str) -> list[Point]:
        """One number of every evaluation that has it, over steps."""
        found = ((record["step"], _number(record.get(key))) for record in self.evaluations)
        return [(step, value) for step, value in found if value is not None]

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds, in order."""
        return [event for event in self.events if event.get("kind") in kinds]

    def setting(self, *keys: str) -> Any:
        """A value of the config, None where it is not set."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def session_starts(self) -> list[int]:
        """Places in ``metrics`` of the first step of each session."""
        resumed = [event["step"] for event in self.of_kind("resume")]
        places = [place for place, record in enumerate(self.metrics) if record["step"] - 1 in resumed]
        return sorted({0, *places})

    def steps(self) -> Steps:
        """The horizontal axis of the charts: from the first to the last step there is."""
        known = [record["step"] for record in (*self.metrics, *self.evaluations)]
        tokens = [(record["step"], record["tokens_seen"]) for record in self.metrics if "tokens_seen" in record]
        marks = [
            Mark(event["step"], event["kind"], str(event.get("message", "")))
            for event in self.of_kind("resume", "checkpoint", "warning")
            if min(known) <= event["step"] <= max(known)
        ]
        return Steps(min(known), max(known), tokens, marks)


def read_run(path: Path) -> RunFolder:
    """Read a run folder; ``PacelineError`` if it is none or a file in it is damaged."""
    if not any((path / name).is_file() for name in (METRICS, EVENTS, "config.yaml")):
        what = "holds no metrics.jsonl, events.jsonl or config.yaml" if path.is_dir() else "is not a folder"
        raise PacelineError(f"{path} {what}; expected the folder of a run, as in train.output")
    config_text = _text(path / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise PacelineError(f"{path / 'config.yaml'} is not valid YAML: {error}".partition("\n")[0]) from None
    summary = _json(path / "summary.json")
    return RunFolder(
        path=path,
        metrics=read_metrics(path),
        evaluations=read_evaluations(path),
        events=read_events(path),
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        info=_info(path / RUN),
        summary=summary if isinstance(summary, dict) else {},
    )


def _info(path: Path) -> RunInfo | None:
    values = _json(path)
    if values is None:
        return None
    try:
        return RunInfo(**values)
    except TypeError as error:
        raise PacelineError(f"{path} does not say what a run is: {error}; it is written when training starts") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise PacelineError(f"{path} cannot be read: {error}") from None


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise PacelineError(f"{path} is not valid JSON: {error}") from None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
