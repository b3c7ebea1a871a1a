"""The gradient-noise scale, tr(S) / |G|^2 (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

S is the covariance of the gradient of one sequence, G the gradient of all there are. The squared norm of the gradient
of B sequences is expected to be |G|^2 + tr(S) / B; of two batches of unlike size it gives unbiased estimates of both.
Small is the batch of one step, big all the measured ones together, whose gradient is the mean of theirs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.data.loader import Loader
from paceline.errors import NonFiniteError
from paceline.train.again import Again
from paceline.train.trainer import Loop


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Of n gradients g of batches of equal size: what all estimates follow from."""

    sequences: int
    """Of one batch."""
    squares: Sequence[float]
    """|g_i|^2."""
    along: Sequence[float]
    """g_i . g_mean, of which the mean is |g_mean|^2."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """An estimate."""

    scale: float
    """tr(S) / |G|^2, in sequences; not finite where |G|^2 is not told apart from 0."""
    error: float
    """One standard error of it."""
    gradient_square: float
    """|G|^2."""
    trace: float
    """tr(S), of one sequence."""


def estimate(norms: Norms) -> Noise:
    """The estimate, with the standard error of the jackknife: each batch is left out once."""
    count, total = len(norms.squares), sum(norms.along) / len(norms.along)
    gradient_square, trace = _both(norms.sequences, count, sum(norms.squares) / count, total)
    scales = []
    for square, along in zip(norms.squares, norms.along, strict=True):
        rest = count - 1
        without = (count * count * total - 2 * count * along + square) / rest**2  # |n mean - g_i|^2 / (n - 1)^2
        scales.append(_ratio(*_both(norms.sequences, rest, (sum(norms.squares) - square) / rest, without)))
    mean = sum(scales) / count
    error = math.sqrt((count - 1) / count * sum((scale - mean) ** 2 for scale in scales))
    return Noise(
        scale=_ratio(gradient_square, trace),
        error=error if math.isfinite(error) else math.inf,
        gradient_square=gradient_square,
        trace=trace,
    )


def _both(sequences: int, count: int, small_square: float, big_square: float) -> tuple[float, float]:
    """|G|^2 and tr(S), from the squared norms with ``sequences`` and with ``count`` times as many."""
    small, big = sequences, count * sequences
    gradient_square = (big * big_square - small * small_square) / (big - small)
    return gradient_square, (small_square - big_square) / (1 / small - 1 / big)


def _ratio(gradient_square: float, trace: float) -> float:
    return trace / gradient_square if gradient_square > 0 else math.inf


def measure(loop: Loop, batches: int) -> Norms:
    """Of the next so many batches, at the weights as they are: no step is taken. All ranks and replicas call it.

    Each batch is passed over twice, once for the mean and once for what it has in common with it: so of all gradients
    only the mean is kept. ``NonFiniteError`` if a gradient is not finite.
    """
    replica = loop.parts.built.replica
    mean = {shard.name: torch.zeros_like(shard.local, dtype=torch.float64) for shard in replica.shards}
    for index in range(batches):
        for name, gradient in _gradients(loop, index).items():
            mean[name] += gradient.double() / batches
    squares, along = [], []
    for index in range(batches):
        own = torch.zeros(2, dtype=torch.float64)
        for name, gradient in _gradients(loop, index).items():
            if replica.owns(name):
                wide = gradient.double()
                own += torch.stack([wide.square().sum(), (wide * mean[name]).sum()]).cpu()
        square, common = replica.sum_of(own).tolist()
        if not math.isfinite(square):
            raise NonFiniteError(f"the gradient of step {loop.step + 1 + index} is not finite")
        squares.append(square)
        along.append(common)
    replica.clear_gradients()
    return Norms(sequences=loop.parts.batches.full.sequences, squares=squares, along=along)


def _gradients(loop: Loop, index: int) -> dict[str, Tensor]:
    """This rank's part of the gradient of the mean loss of batch ``index`` from here, by parameter."""
    parts, step = loop.parts, loop.step + 1 + index
    assert isinstance(parts.loader, Loader)
    rows = parts.loader.batch(step, loop.sequences_seen + index * parts.batches.full.sequences)
    batches = [parts.built.split(parts.objective.batch(micro, seed=parts.config.seed, step=step)) for micro in rows]
    replica = parts.built.replica
    replica.begin(step)
    Again(replica, parts.sync, parts.built.schedule, batches, step=step).gradient()
    return {shard.name: gradient for shard in replica.shards if (gradient := shard.gradient) is not None}
