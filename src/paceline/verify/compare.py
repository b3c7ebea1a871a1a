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
from paceline.verify.routing import compare_routes, joined_routes

ROUNDINGS = 24
"""Of what goes through a block, there and back, in 16 bits."""
ROUNDED_BY = {"bf16": 2.0**-8, "bf16_pure": 2.0**-8, "fp16": 2.0**-11}
"""The most that a number of 16 bits may be rounded by, relatively: half of its last place."""


Tensors = Mapping[tuple[str, str], Tensor]
"""Full tensors by what they are and their name."""


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

    def full(self) -> list[Tensors]:
        """Of a run of replicas of one rank: what each held."""
        return [
            {(what, name): file.get_tensor(key) for key, (what, name, _, _) in places.items()}
            for file, places in zip(self._files, self._places, strict=True)
        ]

    def by_tensor(self) -> dict[tuple[str, str], list[tuple[int, list[int], Tensor]]]:
        """For every tensor the boxes of it: rank, start, values."""
        found = defaultdict(list)
        for rank, (file, places) in enumerate(zip(self._files, self._places, strict=True)):
            for key, (what, name, start, _) in places.items():
                found[what, name].append((rank, start, file.get_tensor(key)))
        return found


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What one replica held and reported when each was one process; all the same where syncs keep replicas equal."""

    tensors: Tensors
    run: Mapping[str, Any]


def compare(
    references: Sequence[Reference], folder: Path, runs: Sequence[Mapping[str, Any]], bounds: Bounds
) -> Difference:
    """Judge a case by every box of every rank, and by the losses and norms each rank reported.

    ``references`` by replica, or one for all.
    """
    wrong = compare_routes(joined_routes([reference.run for reference in references]), runs)
    boxes = Boxes(folder).by_tensor()
    replica_of = [run["replica"] for run in runs]
    worst: dict[str, Worst] = {}
    for replica in sorted(set(replica_of)):
        reference = references[replica % len(references)].tensors
        totals: dict[str, float] = defaultdict(float)  # of all gradients of a step
        for (what, _), tensor in reference.items():
            totals[what] += float(tensor.double().square().sum())
        for key in sorted(reference.keys() | boxes.keys()):
            what, name = key
            own = [(start, box) for rank, start, box in boxes.get(key, []) if replica_of[rank] == replica]
            if key not in reference:
                wrong += [f"{what} of {name} is there, but one process has none"] if own else []
                continue
            full = reference[key].double()
            is_gradient = what.startswith("gradient")
            error, missing = _error(full, own, bounds.floor * math.sqrt(totals[what]) if is_gradient else 0.0)
            if missing:
                wrong.append(f"{what} of {name}: {missing} of {full.numel()} values are on no rank")
            kind = "gradient" if is_gradient else what if what == "parameter after 1" else "later"  # roundings grow
            if kind not in worst or not error <= worst[kind].error:
                worst[kind] = Worst(name=name, error=error)
    pairs = [(references[run["replica"] % len(references)].run, run) for run in runs]
    first, *_, last = losses = _series("losses", pairs)
    at = max(range(len(losses)), key=lambda step: losses[step])
    checks = [
        ("the first loss", first, bounds.loss),
        ("the gradient norm", _series("norms", pairs)[0], bounds.gradient),
        (f"the gradient of {worst['gradient'].name}", worst["gradient"].error, bounds.gradient),
        (f"the parameter {worst['parameter after 1'].name}", worst["parameter after 1"].error, bounds.parameter),
        (f"the parameter {worst['later'].name} after more updates", worst["later"].error, bounds.loss_at_end),
        (f"the loss of step {at + 1}", losses[at], bounds.loss_at_end),
        ("the held-out loss", max(_series("evaluations", pairs)), bounds.loss_at_end),
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


def _error(full: Tensor, boxes: Sequence[tuple[list[int], Tensor]], floor: float) -> tuple[float, int]:
    """The relative error of what a replica's ranks hold, and how many values are on none of them."""
    scale = max(float(full.norm()), floor) or 1.0
    held = torch.zeros(full.shape, dtype=torch.bool)
    squares = 0.0
    for start, box in boxes:
        window = tuple(slice(at, at + size) for at, size in zip(start, box.shape, strict=True))
        held[window] = True
        squares += float((box.double() - full[window]).square().sum())
    return math.sqrt(squares) / scale, int((~held).sum())


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


def gradient_distance(reference: Tensors, other: Tensors) -> float:
    """Between the gradients of two runs of one process, all tensors together, relative to the first."""
    squares = [
        (float((other[key].double() - full.double()).square().sum()), float(full.double().square().sum()))
        for key, full in reference.items()
        if key[0] == "gradient"
    ]
    return math.sqrt(sum(difference for difference, _ in squares) / sum(own for _, own in squares))


def _series(key: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[float]:
    """For each entry the greatest relative difference of any rank from its reference."""
    entries = range(len(pairs[0][0][key]))
    return [max(_relative(run[key][i], reference[key][i]) for reference, run in pairs) for i in entries]


def _relative(value: float, true: float) -> float:
    return abs(value - true) / max(abs(true), 1e-30) if math.isfinite(value) else math.inf
