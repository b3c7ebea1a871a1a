"""Base of the optimizers that treat some parameters in a way of their own, and leave the others to torch's AdamW."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from paceline.optim.base import GroupedConfig


class WithAdamW(torch.optim.Optimizer):
    """One optimizer over two kinds of parameters, with one state and one list of groups."""

    def __init__(
        self,
        options: GroupedConfig,
        groups: list[dict[str, Any]],
        is_own: Callable[[str], bool],
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """``is_own``: of a name, whether AdamW, with these ``betas`` and ``eps``, is not for it."""
        own = list(_those(groups, is_own))
        others = list(_those(groups, lambda name: not is_own(name)))
        super().__init__([*own, *others], {"lr": options.lr})
        self.own_groups = self.param_groups[: len(own)]
        self._others: torch.optim.Optimizer | None = None
        if others:
            adamw = torch.optim.AdamW(others, lr=options.lr, betas=betas, eps=eps, fused=True)
            self.param_groups[len(own) :] = adamw.param_groups
            adamw.state = self.state
            self._others = adamw

    @abstractmethod
    def own_step(self) -> None:
        """Update those parameters of ``own_groups`` that have a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        self.own_step()
        if self._others is not None:
            self._others.step()


def _those(groups: Iterable[dict[str, Any]], keep: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """The groups with only those parameters whose names are kept."""
    for group in groups:
        kept = [(name, p) for name, p in zip(group["names"], group["params"], strict=True) if keep(name)]
        if kept:
            yield {**group, "names": [name for name, _ in kept], "params": [p for _, p in kept]}
