"""Base of our optimizers that update each value by itself, in one pass through memory.

On a device one kernel goes through many tensors at once (``torch._foreach_*``). On a CPU these operations go through
memory one after the other; so values are taken a few at a time there, which stay in the cache from the first operation
on them to the last. Each value's result is the same either way.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

CACHED = 1 << 16
"""Values of a tensor that are taken together on a CPU: 256 KiB in fp32, times the parameter, gradient and states."""

Scalars = dict[str, float]
Lists = Sequence[list[Tensor]]


class Elementwise(torch.optim.Optimizer):
    """An update that is a function of a value, its gradient, its states, and scalars of its tensor."""

    states: ClassVar[tuple[str, ...]] = ()
    """Keys of the tensors like the parameter that are kept."""
    scalars: ClassVar[Scalars] = {"step": 0.0}
    """What is kept of each parameter besides, and how it starts. A parameter without a gradient is left alone, and so
    are its scalars."""
    divides_by_rate: ClassVar[bool] = False
    """A step at rate 0 then leaves everything alone."""

    def begin(self, group: dict[str, Any], key: str, parameter: Tensor) -> Tensor:
        """What a state is before a parameter's first update; zeros unless a method says otherwise."""
        return torch.zeros_like(parameter)

    def advance(self, group: dict[str, Any], now: Scalars) -> Scalars:
        """The scalars of the coming update from those of the one before."""
        return {"step": now["step"] + 1}

    @abstractmethod
    def update(
        self,
        group: dict[str, Any],
        now: Scalars,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Change parameters and states in place; ``gradients`` may be overwritten."""

    def begun(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """What is kept of a parameter, from now on if there was nothing."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update({key: self.begin(group, key, parameter) for key in self.states})
            state.update({key: torch.tensor(start, dtype=torch.float64) for key, start in self.scalars.items()})
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            if self.divides_by_rate and group["lr"] == 0:
                continue
            for now, members in self._by_scalars(group):
                new = self.advance(group, now)
                for parameter in members:
                    for key in self.scalars:
                        self.state[parameter][key].fill_(new[key])
                for parameters, gradients, *states in in_cache(self._lists(members)):
                    self.update(group, new, parameters, gradients, *states)

    def _by_scalars(self, group: dict[str, Any]) -> Iterator[tuple[Scalars, list[Tensor]]]:
        """Parameters with a gradient that have the same scalars: most often all of them."""
        alike: dict[tuple[float, ...], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.begun(group, parameter)
            alike.setdefault(tuple(float(state[key]) for key in self.scalars), []).append(parameter)
        for values, members in alike.items():
            yield dict(zip(self.scalars, values, strict=True)), members

    def _lists(self, members: list[Tensor]) -> Lists:
        gradients = [parameter.grad for parameter in members if parameter.grad is not None]
        return [members, gradients, *([self.state[p][key] for p in members] for key in self.states)]


def in_cache(lists: Lists) -> Iterator[list[list[Tensor]]]:
    """Lists of tensors, the first of one list like the first of the others, a few values at a time on a CPU."""
    columns: list[tuple[Tensor, ...]] = []
    room = CACHED
    for tensors in zip(*lists, strict=True):
        for pieces in _pieces(tensors):
            columns.append(pieces)
            room -= pieces[0].numel()
            if room <= 0 and pieces[0].device.type == "cpu":
                yield [list(column) for column in zip(*columns, strict=True)]
                columns, room = [], CACHED
    if columns:
        yield [list(column) for column in zip(*columns, strict=True)]


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(tensor.detach().view(-1).split(CACHED) for tensor in tensors), strict=True)
