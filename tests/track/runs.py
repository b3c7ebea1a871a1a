"""Records as a run writes them, and a sink that remembers them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def metrics_of(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.5 + 6 * math.exp(-step / 40),
        "lr": 1e-3 * min(1, step / 10),
        "gradient_norm": 0.8 + 2 / step,
        "tokens": 4096,
        "tokens_seen": 4096 * step,
        "sequences_seen": 8 * step,
        "tokens_per_s": 21_000.0,
        "mfu": 0.31,
        "step_s": 0.195,
        "data_wait_s": 0.001,
        "memory_bytes": 432_000_000,
        "time": 1_790_000_000.0 + 0.2 * step,
    }


class Memory:
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.closed = 0

    def step(self, metrics: Mapping[str, Any]) -> None:
        self.told.append(("step", dict(metrics)))

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self.told.append(("evaluation", dict(evaluation)))

    def event(self, event: Mapping[str, Any]) -> None:
        self.told.append(("event", dict(event)))

    def close(self) -> None:
        self.closed += 1

    def of(self, method: str) -> list[dict[str, Any]]:
        return [record for name, record in self.told if name == method]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
