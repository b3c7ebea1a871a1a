"""What one process computes that plays the parts of all replicas one after the other: the definitions, in fp64.

Written from the papers, with torch for gradients only: no part of the product but the model, the rows and their loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parity import objective, rows, tiny_llama

Weights = dict[str, Tensor]
Outer = Callable[[Weights, Weights, float], Weights]
"""From the weights agreed on before, the mean of now, and the rate, to the next."""


@dataclass
class Part:
    """One replica as it is between exchanges."""

    weights: Weights
    momentum: Weights
    targets: int = 0
    losses: list[float] = field(default_factory=list)


class Oracle:
    """Some replicas, each with its rows of every batch, and momentum SGD (torch's definition) as inner optimizer."""

    def __init__(self, replicas: int, *, sequences: int = 7, lr: float = 0.3, momentum: float = 0.0) -> None:
        self._model, self._objective = tiny_llama(), objective()
        self._sequences, self._lr, self._mu = sequences, lr, momentum
        start = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        self.parts = [Part(dict(start), {}) for _ in range(replicas)]

    def gradient(self, part: int, step: int) -> tuple[Weights, float, int]:
        """Of the summed loss of a replica's rows, with the loss and the number of targets."""
        own = rows(step, self._sequences)[part :: len(self.parts)]
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self.parts[part].weights[name])
        self._model.zero_grad()
        batch = self._objective.batch(own, seed=0, step=step)
        loss = self._objective.loss(self._model, batch)
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}
        return gradient, loss.item(), batch.count

    def move(self, part: int, gradient: Weights, *, lr: float) -> None:
        """One step of the inner optimizer."""
        own = self.parts[part]
        for name, g in gradient.items():
            buffer = own.momentum.get(name)
            own.momentum[name] = g.clone() if buffer is None else self._mu * buffer + g
            own.weights[name] = own.weights[name] - lr * own.momentum[name]

    def local_step(self, step: int, lr: float) -> None:
        """Each replica by itself."""
        for i, part in enumerate(self.parts):
            gradient, loss, targets = self.gradient(i, step)
            self.move(i, {name: g / targets for name, g in gradient.items()}, lr=lr)
            part.targets += targets
            part.losses.append(loss / targets)

    def shared_step(self, step: int, lr: float) -> None:
        """All with the gradient of the whole batch."""
        told = [self.gradient(i, step) for i in range(len(self.parts))]
        targets = sum(count for _, _, count in told)
        whole = {name: sum(g[name] for g, _, _ in told) / targets for name in told[0][0]}
        for i, part in enumerate(self.parts):
            self.move(i, whole, lr=lr)
            part.losses.append(sum(loss for _, loss, _ in told) / targets)

    def mean(self) -> Weights:
        """Of the replicas' weights, by targets."""
        total = sum(part.targets for part in self.parts)
        first = self.parts[0].weights
        return {name: sum(part.targets / total * part.weights[name] for part in self.parts) for name in first}

    def run(
        self,
        steps: int,
        *,
        every: int,
        outer: Outer | None = None,
        first: int = 0,
        rates: Mapping[int, float] | None = None,
    ) -> None:
        """Steps 1 to ``steps``; after ``first`` that are shared, exchanges every so many and after the last."""
        before = dict(self.parts[0].weights)
        window: list[float] = []
        for step in range(1, steps + 1):
            lr = self._lr * (rates or {}).get(step, 1.0)
            if step <= first:
                self.shared_step(step, lr)
                before = dict(self.parts[0].weights)
                continue
            self.local_step(step, lr)
            window.append(lr)
            if (step - first) % every == 0 or step == steps:
                mean = self.mean()
                before = outer(before, mean, sum(window) / len(window)) if outer else mean
                window = []
                for part in self.parts:
                    part.weights, part.targets = dict(before), 0


def slow_momentum(alpha: float, beta: float) -> Outer:
    """SlowMo, arXiv 1910.00643, algorithm 1."""
    u: Weights = {}

    def step(before: Weights, mean: Weights, gamma: float) -> Weights:
        for name in before:
            u[name] = beta * u.get(name, torch.zeros(())) + (before[name] - mean[name]) / gamma
        return {name: before[name] - alpha * gamma * u[name] for name in before}

    return step


def torch_sgd(lr: float, momentum: float, nesterov: bool) -> Outer:
    """DiLoCo's outer step, by torch's own SGD on the pseudo-gradient."""
    kept: dict[str, torch.nn.Parameter] = {}
    optimizer: list[torch.optim.SGD] = []

    def step(before: Weights, mean: Weights, _: float) -> Weights:
        if not kept:
            kept.update({name: torch.nn.Parameter(value.clone()) for name, value in before.items()})
            optimizer.append(torch.optim.SGD(kept.values(), lr=lr, momentum=momentum, nesterov=nesterov))
        for name, parameter in kept.items():
            assert torch.equal(parameter.detach(), before[name])
            parameter.grad = before[name] - mean[name]
        optimizer[0].step()
        return {name: parameter.detach().clone() for name, parameter in kept.items()}

    return step
