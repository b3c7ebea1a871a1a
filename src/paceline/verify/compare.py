"""What ranks held under a layout, against what one process held."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FLOOR = 1e-5
"""A gradient is judged by its own norm, or by this share of the global norm if that is more: some are zero in truth."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most that may differ, relatively."""

    loss: float
    gradient: float
    parameter: float
    loss_at_end: float


BOUNDS = {
    "fp64": Bounds(loss=1e-10, gradient=1e-10, parameter=1e-10, loss_at_end=1e-8),
    "fp32": Bounds(loss=1e-6, gradient=1e-5, parameter=1e-5, loss_at_end=1e-4),
}
"""Another order of sums moves fp64 by 1e-16 a term and fp32 by 1e-7; a run of many steps lets that grow."""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The tensor that differs most, and by how much."""

    name: str
    error: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a layout's run differs from that of one process."""

    loss: float
    gradient: Worst
    parameter: Worst
    loss_at_end: float
    wrong: tuple[str, ...]
    """Sentences; empty for equal."""


class Boxes:
    """What all ranks of a run wrote down."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("rank-*.safetensors"))
        self._files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self._places = [json.loads(file.metadata()["places"]) for file in self._files]

    def full(self) -> dict[tuple[str, str], Tensor]:
        """Of a run of one rank: every tensor by what it is and its name."""
        (file,), (places,) = self._files, self._places
        return {(what, name): file.get_tensor(key) for key, (what, name, _, _) in places.items()}

    def by_tensor(self) -> dict[tuple[str, str], list[tuple[int, list[int], Tensor]]]:
        """For every tensor the boxes of it: rank, start, values."""
        found = defaultdict(list)
        for rank, (file, places) in enumerate(zip(self._files, self._places, strict=True)):
            for key, (what, name, start, _) in places.items():
                found[what, name].append((rank, start, file.get_tensor(key)))
        return found


def compare(
    reference: Mapping[tuple[str, str], Tensor],
    reference_run: Mapping[str, Any],
    folder: Path,
    runs: Sequence[Mapping[str, Any]],
    bounds: Bounds,
) -> Difference:
    """Judge a case by every box of every rank, and by the losses and norms each rank reported."""
    wrong: list[str] = []
    boxes = Boxes(folder).by_tensor()
    replica_of = [run["replica"] for run in runs]
    replicas = sorted(set(replica_of))
    total = math.sqrt(sum(float(t.double().square().sum()) for (what, _), t in reference.items() if what == "gradient"))
    worst: dict[str, Worst] = {}
    for key in sorted(reference.keys() | boxes.keys()):
        what, name = key
        if key not in reference:
            wrong.append(f"{what} of {name} is there, but one process has none")
            continue
        full = reference[key].double()
        error, missing = _error(full, boxes.get(key, []), replica_of, replicas, total if what == "gradient" else 0.0)
        if missing:
            wrong.append(f"{what} of {name}: {missing} of {full.numel() * len(replicas)} values are on no rank")
        kind = what.partition(" ")[0]
        if kind not in worst or not error <= worst[kind].error:
            worst[kind] = Worst(name=name, error=error)
    first, last = (_losses(reference_run, runs, at) for at in (0, -1))
    norm = max(_relative(run["norms"][0], reference_run["norms"][0]) for run in runs)
    checks = [
        ("the first loss", first, bounds.loss),
        ("the gradient norm", norm, bounds.gradient),
        (f"the gradient of {worst['gradient'].name}", worst["gradient"].error, bounds.gradient),
        (f"the parameter {worst['parameter'].name}", worst["parameter"].error, bounds.parameter),
        ("the last loss", last, bounds.loss_at_end),
    ]
    wrong += [
        f"{what} differs by {error:.1e}, {bound:.0e} is allowed" for what, error, bound in checks if not error <= bound
    ]
    return Difference(
        loss=first,
        gradient=worst["gradient"],
        parameter=worst["parameter"],
        loss_at_end=last,
        wrong=tuple(wrong),
    )


def _error(
    full: Tensor,
    boxes: Sequence[tuple[int, list[int], Tensor]],
    replica_of: Sequence[int],
    replicas: Sequence[int],
    total: float,
) -> tuple[float, int]:
    """The greatest relative error over replicas, and how many values are on none of a replica's ranks."""
    scale = max(float(full.norm()), FLOOR * total) or 1.0
    worst, missing = 0.0, 0
    for replica in replicas:
        held = torch.zeros(full.shape, dtype=torch.bool)
        squares = 0.0
        for rank, start, box in boxes:
            if replica_of[rank] == replica:
                window = tuple(slice(at, at + size) for at, size in zip(start, box.shape, strict=True))
                held[window] = True
                squares += float((box.double() - full[window]).square().sum())
        missing += int((~held).sum())
        error = math.sqrt(squares) / scale
        worst = error if not error <= worst else worst  # keeps what is not a number
    return worst, missing


def _losses(reference: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], at: int) -> float:
    return max(_relative(run["losses"][at], reference["losses"][at]) for run in runs)


def _relative(value: float, true: float) -> float:
    return abs(value - true) / max(abs(true), 1e-30) if math.isfinite(value) else math.inf
