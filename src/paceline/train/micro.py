"""``batch.micro: auto``: how many rows fit into memory at once, found before the first step.

Passes are tried on rows as long as rows can be: two micro-batches forward and backward, the second of which adds to the
first's gradients. No update is made, gradients are cleared, buffers are put back, and random numbers come from streams
of their own: so a run goes on as if nothing had been tried. All ranks and replicas take the smallest answer.

A device says when it runs out, and goes on. A process that runs out of main memory is killed; and of ranks that send
each other tensors in a pass, one that runs out leaves the others waiting. There two small passes are measured, and the
rest follows by a straight line.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from paceline.comm.world import World
from paceline.data.rows import Row, Rows
from paceline.errors import PlanError
from paceline.objectives.base import Objective
from paceline.plan.batch import micro_sizes
from paceline.train.build import Built
from paceline.train.memory import available_bytes, give_back, peak_bytes, reset_peak, used_bytes

PASSES = 3
"""Of each size that is measured."""
MARGIN = 0.2
"""Of the memory that is free, what a measured pass leaves: for the allocator's gaps, and for whoever comes later."""

Pass = Callable[[int], None]
"""A forward and a backward pass of so many rows at once."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried on one rank."""

    built: Built
    world: World
    objective: Objective
    rows: Rows
    row_tokens: int
    """Of the longest row there can be."""
    seed: int
    to_come_bytes: int
    """What this rank will hold from the first step on, and does not yet."""

    def run(self, count: int) -> None:
        """Two micro-batches of ``count`` rows, forward and backward."""
        built, model = self.built, self.built.model
        long = [longest(self.rows.row(i % len(self.rows), i), self.row_tokens) for i in range(2 * count)]
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            batches = [
                built.split(self.objective.batch(rows, seed=self.seed, step=0)) for rows in (long[:count], long[count:])
            ]
            built.schedule.run(batches, step=0, scale=1.0, expect=built.replica.expect)
            built.replica.end_backward()
        finally:
            built.replica.expect(False)
            built.replica.clear_gradients()
            for parameter in model.parameters():
                parameter.grad = None
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(before[name])


def choose_micro(trial: Trial, share: int) -> int:
    """The most rows of a rank's ``share`` that fit at once on every rank of every replica; all call it together.

    ``PlanError`` on all of them if one of them has no room for one row.
    """
    device = trial.world.device.torch_device
    if device.type == "cuda" and trial.world.coordinates.ranks == 1:
        with_states = torch.empty(trial.to_come_bytes, dtype=torch.uint8, device=device)
        own = by_trying(share, trial.run)
        del with_states
        torch.cuda.empty_cache()
    else:
        room = _room(trial, device)
        smallest(trial.world, 0)  # before any of them takes what another one counts as free
        own = by_measuring(share, lambda count: growth(trial.run, count, device), room)
        give_back()
    chosen = smallest(trial.world, own)
    if chosen == 0:
        raise PlanError(
            "batch.micro=auto: a rank runs out of memory with a single sequence. Use a shorter batch.sequence_tokens, "
            "layout.recompute=full, or a layout that cuts the model"
        )
    return chosen


def by_trying(share: int, run: Pass) -> int:
    """The first size at which the device does not run out; 0 if it does with a single row."""
    for count in micro_sizes(share):
        try:
            run(count)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        else:
            return count
    return 0


def by_measuring(share: int, grown: Callable[[int], int], room: int) -> int:
    """The largest size whose growth, by that at one row and at two, is at most ``room`` bytes; a single row at least.

    A first pass warms up: what is made once and stays is no part of what rows take. The allocator fits blocks now more
    tightly, now less; so each is the median of some passes.
    """
    if share == 1:
        return 1
    grown(1)
    one, two = (median(grown(count) for _ in range(PASSES)) for count in (1, 2))
    each = two - one if two > one else two / 2
    return next(count for count in micro_sizes(share) if count == 1 or one + (count - 1) * each <= room)


def growth(run: Pass, count: int, device: torch.device) -> int:
    """By how many bytes the memory of this process grows, at its highest, in a pass."""
    if device.type != "cuda":
        give_back()
    reset_peak(device)
    before = used_bytes(device)
    run(count)
    return max(0, peak_bytes(device) - before)


def longest(row: Row, most: int) -> Row:
    """The row, repeated or cut to ``most`` tokens, on both sides where it has two."""
    target = None if row.target is None else np.resize(row.target, most)
    starts = row.starts[row.starts < most]
    return replace(row, tokens=np.resize(row.tokens, most), starts=starts, target=target, weight=1.0)


def smallest(world: World, own: int) -> int:
    """The least of what all ranks of all replicas say; none goes on before all have spoken."""
    device = world.device.torch_device
    inside = -world.mesh.world.maximum(torch.tensor(-own, dtype=torch.int64, device=device))
    said = torch.zeros(world.link.size, dtype=torch.int64, device=device)
    said[world.link.index] = inside
    world.link.all_reduce(said).wait()
    return int(said.min().item())


def _room(trial: Trial, device: torch.device) -> int:
    """Bytes by which this rank may grow in a pass."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + kept) * (1 - MARGIN)) - trial.to_come_bytes
    give_back()
    return int(available_bytes() * (1 - MARGIN)) // trial.world.coordinates.local_ranks - trial.to_come_bytes
