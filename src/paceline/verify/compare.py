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

from paceline.checkpoint import Checkpoint, load
from paceline.verify.routing import compare_routes

ROUNDINGS = 24
"""Of what goes through a block, there and back, in 16 bits."""
ROUNDED_BY = {"bf16": 2.0**-8, "bf16_pure": 2.0**-8, "fp16": 2.0**-11}
"""The most that a number of 16 bits may be rounded by, relatively: half of its last place."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most that may differ, relatively."""

    loss: float
    gradient: float
    parameter: float
    loss_at_end: float
    saved: float
    """Of what is saved after half of the steps: the optimizer's states among it, which are sums of late gradients."""
    floor: float = 1e-5
    """A gradient is judged by its own norm, or by this share of the global norm if that is more: some are zero in
    truth."""


def bounds_of(precision: str, blocks: int) -> Bounds:
    """What another order of sums may come to.

    It moves fp64 by 1e-16 a term and fp32 by 1e-7, and a run of many steps lets that grow. In 16 bits every result is
    rounded; roundings add up like the steps of a random walk, over the depth of the model, and two runs differ by twice
    that. What fp16 rounds below its normal range, by 2^-25 of a scaled gradient at most, is within the bound of fp32.
    Where weights are rounded by chance, a value near to where the chance turns may fall to the other side, which is one
    last place, in few of the values.
    """
    if precision == "fp64":
        return Bounds(loss=1e-10, gradient=1e-10, parameter=1e-10, loss_at_end=1e-8, saved=1e-8)
    if precision == "fp32":
        return Bounds(loss=1e-6, gradient=1e-5, parameter=1e-5, loss_at_end=1e-4, saved=1e-4)
    rounded_by = ROUNDED_BY[precision]
    walk = 2 * rounded_by * math.sqrt(ROUNDINGS * (blocks + 1))  # what stands around the blocks rounds as one more
    return Bounds(loss=rounded_by, gradient=walk, parameter=walk, loss_at_end=walk, saved=walk, floor=1e-2)


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
    wrong = compare_routes(reference_run["routes"], runs)
    boxes = Boxes(folder).by_tensor()
    replica_of = [run["replica"] for run in runs]
    replicas = sorted(set(replica_of))
    totals: dict[str, float] = defaultdict(float)  # of all gradients of a step
    for (what, _), tensor in reference.items():
        totals[what] += float(tensor.double().square().sum())
    worst: dict[str, Worst] = {}
    for key in sorted(reference.keys() | boxes.keys()):
        what, name = key
        if key not in reference:
            wrong.append(f"{what} of {name} is there, but one process has none")
            continue
        full = reference[key].double()
        is_gradient = what.startswith("gradient")
        floor = bounds.floor * math.sqrt(totals[what]) if is_gradient else 0.0
        error, missing = _error(full, boxes.get(key, []), replica_of, replicas, floor)
        if missing:
            wrong.append(f"{what} of {name}: {missing} of {full.numel() * len(replicas)} values are on no rank")
        kind = "gradient" if is_gradient else what if what == "parameter after 1" else "later"  # roundings grow
        if kind not in worst or not error <= worst[kind].error:
            worst[kind] = Worst(name=name, error=error)
    first, *_, last = steps = _series("losses", reference_run, runs)
    at = max(range(len(steps)), key=lambda step: steps[step])
    checks = [
        ("the first loss", first, bounds.loss),
        ("the gradient norm", _series("norms", reference_run, runs)[0], bounds.gradient),
        (f"the gradient of {worst['gradient'].name}", worst["gradient"].error, bounds.gradient),
        (f"the parameter {worst['parameter after 1'].name}", worst["parameter after 1"].error, bounds.parameter),
        (f"the parameter {worst['later'].name} after more updates", worst["later"].error, bounds.loss_at_end),
        (f"the loss of step {at + 1}", steps[at], bounds.loss_at_end),
        ("the held-out loss", max(_series("evaluations", reference_run, runs)), bounds.loss_at_end),
    ]
    wrong += [
        f"{what} differs by {error:.1e}, {bound:.0e} is allowed" for what, error, bound in checks if not error <= bound
    ]
    return Difference(
        loss=first,
        gradient=worst["gradient"],
        parameter=worst["parameter after 1"],
        loss_at_end=last,
        wrong=tuple(wrong),
    )


def _error(
    full: Tensor,
    boxes: Sequence[tuple[int, list[int], Tensor]],
    replica_of: Sequence[int],
    replicas: Sequence[int],
    floor: float,
) -> tuple[float, int]:
    """The greatest relative error over replicas, and how many values are on none of a replica's ranks."""
    scale = max(float(full.norm()), floor) or 1.0
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


def compare_saved(reference: Path, folder: Path, step: int, bounds: Bounds) -> list[str]:
    """What a layout saved after ``step`` against what one process saved: sentences, none if all tensors are equal."""
    with load(reference, step) as own, load(folder, step) as other:
        if own.names != other.names:
            return [f"saved tensors are {sorted(set(own.names) ^ set(other.names))[:3]} more or fewer"]
        known = {key for key, value in own.values.items() if key != "config" and other.values.get(key) != value}
        wrong = [f"{key} was saved as {other.values.get(key)!r}, expected {own.values[key]!r}" for key in sorted(known)]
        for name, error in _saved_errors(own, other, bounds.floor).items():
            if not error <= bounds.saved:
                wrong.append(f"{name} was saved with a difference of {error:.1e}, {bounds.saved:.0e} is allowed")
    return wrong


def saved_distance(reference: Path, folder: Path, step: int, floor: float) -> float:
    """The greatest relative error of any tensor that was saved after ``step``."""
    with load(reference, step) as own, load(folder, step) as other:
        return max(_saved_errors(own, other, floor).values())


def _saved_errors(own: Checkpoint, other: Checkpoint, floor: float) -> dict[str, float]:
    """Of each tensor, relative to its norm, or to a share of that of all of its kind if that is more."""
    norms = {name: float(own.tensor(name).double().norm()) for name in own.names}
    errors = {}
    for name in own.names:
        section = name.partition("/")[0]
        total = math.sqrt(sum(norm**2 for other_name, norm in norms.items() if other_name.startswith(section)))
        scale = max(norms[name], floor * total) or 1.0
        errors[name] = float((other.tensor(name).double() - own.tensor(name).double()).norm()) / scale
    return errors


def gradient_distance(reference: Mapping[tuple[str, str], Tensor], other: Mapping[tuple[str, str], Tensor]) -> float:
    """Between the gradients of two runs of one process, all tensors together, relative to the first."""
    squares = [
        (float((other[key].double() - full.double()).square().sum()), float(full.double().square().sum()))
        for key, full in reference.items()
        if key[0] == "gradient"
    ]
    return math.sqrt(sum(difference for difference, _ in squares) / sum(own for _, own in squares))


def _series(key: str, reference: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each entry the greatest relative difference of any rank."""
    return [max(_relative(run[key][i], true) for run in runs) for i, true in enumerate(reference[key])]


def _relative(value: float, true: float) -> float:
    return abs(value - true) / max(abs(true), 1e-30) if math.isfinite(value) else math.inf
