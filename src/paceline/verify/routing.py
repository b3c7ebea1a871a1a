"""Which experts of a mixture were chosen, and by how narrow a margin.

The choice is a step, not a slope: where two experts tie but for a rounding, another order of sums takes the other
one, and all that follows differs. So routing is compared before anything else, and where a choice was that narrow a
layout is judged in fp64, in which nothing is.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from paceline.objectives.base import Batch, Objective
from paceline.objectives.softening import NO_TARGET

NEAR_TIE = 1e-6
"""In units of what the router chooses by; fp32 rounds these to about a tenth of it."""

Routes = dict[str, list[int]]
"""By experts' module: how many choices fell on each."""


class Routing:
    """Watches the experts of a model; the objective tells it which tokens have a target, for the others are filling."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.is_on = False
        self.routes: Routes = {}
        self._objective = objective
        self._has_target_N: Tensor | None = None
        for name, module in model.named_modules():
            if "top_k_index" in (parameters := list(inspect.signature(module.forward).parameters)):
                module.register_forward_pre_hook(self._hook(name, parameters.index("top_k_index")), with_kwargs=True)

    def batch(self, *args: Any, **kwargs: Any) -> Batch:
        """See ``Objective``."""
        return self._objective.batch(*args, **kwargs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Objective``."""
        self._has_target_N = (batch.labels != NO_TARGET).flatten()
        return self._objective.loss(model, batch)

    def _hook(self, name: str, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            again = torch._C._current_graph_task_id() != -1  # in a backward pass, which computes the block once more
            if not self.is_on or again or not module.training:
                return
            index_NK: Tensor = kwargs["top_k_index"] if "top_k_index" in kwargs else args[place]
            assert self._has_target_N is not None
            if len(index_NK) == len(self._has_target_N):  # else the ranks of a sequence have some tokens each
                chosen = index_NK[self._has_target_N].flatten().cpu().bincount(minlength=1).tolist()
                self.routes[name] = added(self.routes.get(name, []), chosen)

        return hook


@contextmanager
def narrowest() -> Iterator[list[float]]:
    """While it lasts, the least difference between the last that a ``topk`` took and the first that it left."""
    found = [math.inf]

    def watching(topk: Callable[..., Any]) -> Callable[..., Any]:
        def call(values: Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
            if k < values.shape[-1] and values.is_floating_point():
                best = topk(values.detach(), k + 1, dim=-1)[0].double()
                found[0] = min(found[0], float((best[..., k - 1] - best[..., k]).min()))
            return topk(values, k, *args, **kwargs)

        return call

    with (
        mock.patch.object(torch, "topk", watching(torch.topk)),
        mock.patch.object(torch.Tensor, "topk", watching(torch.Tensor.topk)),
    ):
        yield found


def added(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The sums, place by place; the shorter one has zeros at its end."""
    size = max(len(first), len(second))
    return [sum(part[i] for part in (first, second) if i < len(part)) for i in range(size)]


def joined_routes(runs: Sequence[Mapping[str, Any]]) -> Routes:
    """What all ranks of a run saw."""
    total: Routes = {}
    for run in runs:
        for name, chosen in run["routes"].items():
            total[name] = added(total.get(name, []), chosen)
    return total


def compare_routes(reference: Routes, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for the first module whose tokens chose otherwise; none where routing is equal or was not seen."""
    total = joined_routes(runs)
    for name in sorted(total):
        if total[name] != reference.get(name):
            return [f"routing differs: the experts of {name} got {total[name]} tokens, expected {reference.get(name)}"]
    return []
