"""Delayed Nesterov (Liu et al. 2024, arXiv 2401.09135, algorithm 3): the outer rule of workers that do not wait.

Momentum on every push would go on along pseudo-gradients that are old. So a push moves the parameters at once, by its
share, and momentum takes part in every N-th push only, with the mean of the N since:

    while the window is open    theta <- theta - lr Delta / N
    the N-th push closes it     m     <- mu m + mean of Delta
                                theta <- theta - lr (Delta / N + mu m)

With N = 1 it is SGD with Nesterov's momentum, which is the outer rule of DiLoCo. Here the mean is by the targets that
were learned from, as all means are. A push goes times r, its targets over those of a usual push, which is as long as
leases are by rule; and what went in at once is set right when the window closes:

    open                        theta <- theta - lr r Delta / N,      B <- B + r Delta,      R <- R + r
    close                       m     <- mu m + (B + r Delta) / (R + r)
                                theta <- theta - lr ((B + r Delta) / (R + r) - B / N + mu m),      B, R <- 0

Where all pushes are of as many targets that is the rule above. The paper's share c of the momentum in every push is its
default, 0. The paper could not be read when this was written: the rule is that of a published implementation of its
algorithm 3 (torchft's).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paceline.config import Count, Fraction, Options, Positive
from paceline.sync.server.place import Piece
from paceline.sync.server.store import TensorStore


@dataclass
class Window:
    """How far the pushes since the last step of momentum have come: numbers only."""

    delay: int
    """N."""
    pushes: int = 0
    weight: float = 0.0
    """R."""
    usual: float = 0.0
    """Targets of a usual push, since the window was opened."""

    @classmethod
    def of(cls, delay: int, numbers: Sequence[float]) -> "Window":
        """From its numbers."""
        pushes, weight, usual = numbers
        return cls(delay, int(pushes), weight, usual)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """All of it that changes."""
        return self.pushes, self.weight, self.usual

    def take(self, targets: float, usual: float) -> tuple[float, float]:
        """The weight r of a push, and the sum of the weights of the window if the push closes it, else 0.

        ``usual``: how many targets there are in a usual push, by now; what counts is how it was when the window opened.
        """
        self.usual = usual if self.pushes == 0 else self.usual
        weight = targets / self.usual
        self.pushes, self.weight = self.pushes + 1, self.weight + weight
        if self.pushes < self.delay:
            return weight, 0.0
        closed = self.weight
        self.pushes, self.weight = 0, 0.0
        return weight, closed


class DelayedNesterov(Options):
    """The rule with its numbers."""

    lr: Positive = 0.7
    momentum: Fraction = 0.9
    delay: Count = 1

    def build(self, parameters: Mapping[str, nn.Parameter], full: Any = None) -> "OuterOptimizer":
        """At work on plain tensors."""
        return OuterOptimizer(list(parameters.values()), self)


class OuterOptimizer(torch.optim.Optimizer):
    """The rule as an optimizer; a gradient is r Delta, and ``window`` is what the push closes."""

    def __init__(self, parameters: list[nn.Parameter], rule: DelayedNesterov) -> None:
        super().__init__(parameters, {"lr": rule.lr})
        self._rule = rule
        self.window = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one push."""
        rule, window = self._rule, self.window
        for parameter in self.param_groups[0]["params"]:
            if (moved := parameter.grad) is None:
                continue
            state = self.state[parameter]
            buffer = state.setdefault("buffer", torch.zeros_like(parameter))
            if window == 0.0:
                buffer.add_(moved)
                parameter.sub_(moved, alpha=rule.lr / rule.delay)
                continue
            mean = (buffer + moved).div_(window)
            parameter.sub_(mean, alpha=rule.lr).add_(buffer, alpha=rule.lr / rule.delay)
            if rule.momentum > 0:
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(rule.momentum).add_(mean)
                parameter.sub_(momentum, alpha=rule.lr * rule.momentum)
            buffer.zero_()


class PushStore(TensorStore):
    """A store whose workers push what they have moved by."""

    def __init__(
        self, pieces: Sequence[Piece], ndims: Mapping[str, int], rule: DelayedNesterov, dtype: torch.dtype
    ) -> None:
        super().__init__(pieces, ndims, rule, dtype)  # type: ignore[arg-type]

    def push(self, window: float) -> None:
        """See ``OuterStore``."""
        if self.optimizer is not None:
            assert isinstance(self.optimizer, OuterOptimizer)
            self.optimizer.window = window
            self.step(1.0, 1.0)


class OuterRule:
    """The rule as ``sync.periodic.Outer``, for a replica without others: it has moved from the parameters of now.

    Delta is taken as an interpolation, which for lr = 1 is exact.
    """

    def __init__(self, rule: DelayedNesterov) -> None:
        self._rule, self.window = rule, Window(rule.delay)
        self._weight, self._closed = 1.0, 1.0
        self.buffer: dict[str, Tensor] = {}
        self.momentum: dict[str, Tensor] = {}

    def start(self, like: Mapping[str, Tensor]) -> None:
        """Nothing is remembered yet."""
        wide = {
            name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in like.items()
        }
        self.buffer = wide
        self.momentum = {name: torch.zeros_like(t) for name, t in wide.items()} if self._rule.momentum > 0 else {}

    def take(self, targets: float, usual: float) -> None:
        """The next push is of so many targets; see ``Window``."""
        self._weight, self._closed = self.window.take(targets, usual)

    def step(self, name: str, before: Tensor, mean: Tensor, rate: float) -> Tensor:
        """Where to go from ``before``."""
        rule, weight, closed, buffer = self._rule, self._weight, self._closed, self.buffer[name]
        if closed == 0.0:
            buffer.add_(before - mean, alpha=weight)
            return torch.lerp(before, mean, rule.lr * weight / rule.delay)
        after = torch.lerp(before, mean, rule.lr * weight / closed)
        after.sub_(buffer, alpha=rule.lr * (1.0 / closed - 1.0 / rule.delay))
        if name in self.momentum:
            moved = (before - mean).mul_(weight).add_(buffer).div_(closed)
            momentum = self.momentum[name].mul_(rule.momentum).add_(moved)
            after.sub_(momentum, alpha=rule.lr * rule.momentum)
        buffer.zero_()
        return after
