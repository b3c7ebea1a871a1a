"""Parameters as they stand in language models, and gradients for them: what the tests of optimizers share."""

import torch
from torch import nn

from paceline.optim.base import Estimating, Searching
from paceline.parallel.full import FullTensors

TARGETS = 7
"""Of the batch, where an estimate of curvature is made."""

SHAPES = {
    "model.embed_tokens.weight": (20, 6),
    "model.layers.0.up.weight": (4, 8),
    "model.layers.0.down.weight": (8, 4),
    "model.layers.0.wide.weight": (16, 300),  # of 4,096 values and more, in two blocks a row
    "model.layers.1.experts": (3, 4, 8),
    "model.layers.1.norm.weight": (8,),
    "model.layers.1.up.bias": (5,),
}


def parameters(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}


def gradients(step, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def rate(step):
    """A factor that changes from step to step."""
    return 1.0 - 0.05 * step


class Bowl:
    """A loss of a step, without a batch: c (w - t)^2 / 2 + w^4 / 40, summed, for optimizers that ask for it."""

    def __init__(self, held, step):
        self._held = held
        self._centres = gradients(step)
        self._curvatures = {name: 0.5 + g.abs() for name, g in gradients(1000).items()}
        self.loss = self.gradient()

    def gradient(self):
        loss = 0.0
        for name, p in self._held.items():
            w, c, t = p.detach(), self._curvatures[name].to(p.dtype), self._centres[name].to(p.dtype)
            loss += float((c * (w - t) ** 2 / 2 + w**4 / 40).sum())
            p.grad = c * (w - t) + w**3 / 10
        return loss

    def product(self, vectors):
        curvatures = [self._curvatures[name].to(p.dtype) + 0.3 * p.detach() ** 2 for name, p in self._held.items()]
        return [c * v for c, v in zip(curvatures, vectors, strict=True)]


def build(options, held):
    return options.build(held, FullTensors.alone(held))


def run(options, steps, held=None, optimizer=None, begin=0, without=()):
    """Steps with these gradients; ``without``: pairs of a step and a name that has no gradient in it."""
    held = parameters() if held is None else held
    before = rate(begin - 1) if optimizer else 1.0
    optimizer = optimizer or build(options, held)
    peaks = [group["lr"] / before for group in optimizer.param_groups]
    for step in range(begin, begin + steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(step)
        dtype = next(iter(held.values())).dtype
        if isinstance(optimizer, Searching):
            optimizer.search(Bowl(held, step))
            continue
        if isinstance(optimizer, Estimating) and optimizer.estimates_at(step + 1):
            give(held, gradients(500 + step, dtype), step, without)
            optimizer.estimate(TARGETS)
        give(held, gradients(step, dtype), step, without)
        optimizer.step()
        optimizer.zero_grad()
    return held, optimizer


def give(held, made, step, without):
    for name, parameter in held.items():
        parameter.grad = None if (step, name) in without else made[name]
