"""A table of which each step touches some rows, on a shard: the others take their steps when they are looked at.

A step without a gradient still moves a row: it decays, and goes on by its momentum. What a row is after ``steps`` steps
is what it would be if all rows had taken every one of them, for that is what they do, only later: a row that is behind
takes the steps it has not, one after the other, by the run's own optimizer, with a gradient of zero and at the rate of
that step. So any optimizer of single values serves, and sharing out rows changes nothing of what is learned. Steps that
leave a row where it is (``OptimizerConfig.rests``) are not taken.

    rows      values and what the optimizer keeps of them (R, W)
    last      (R,) how many steps each row has taken
    history   what was different from step to step: the rate, and the numbers that the optimizer keeps of a parameter

A version that is read is not copied. Rows that change are set aside for it, as they were; so what is copied is what is
touched. Rows are taken together padded to a multiple of 64 values, so that each value goes through the same
instructions, whichever rows are at its side: a server that comes back has the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paceline.optim.base import OptimizerConfig

_LONGEST = 32
"""Steps after which rows that are behind catch up, all at once: each taken step has a cost of its own."""
_LANES = 64


@dataclass
class _History:
    """Of the steps from ``first`` on."""

    first: int
    steps: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """The rate's share of its peak, and the optimizer's numbers before the step."""


@dataclass
class _Rows:
    """Some rows: values, what the optimizer keeps, and how many steps they have taken."""

    values: Tensor
    kept: dict[str, Tensor]
    last: Tensor


@dataclass(eq=False)
class Before:
    """A table as it was after ``steps`` steps: rows that have changed since, and the rest in the table itself."""

    steps: int
    history: _History
    where: Tensor
    """(R,) in which of the rows that were set aside each is; -1 for those still in the table."""
    aside: list[_Rows] = field(default_factory=list)
    count: int = 0


class Table:
    """``flat``: memory of R rows of W values, one after the other, that it works in."""

    def __init__(self, name: str, flat: Tensor, width: int, optimizer: OptimizerConfig) -> None:
        full: Any = None
        self._name, self._config = name, optimizer
        self.values = flat.view(-1, width)
        self._last = torch.zeros(len(self.values), dtype=torch.int64)
        self._kept: dict[str, Tensor] = {}
        self._numbers: dict[str, Tensor] = {}
        self._begun = False
        """Whether the optimizer keeps what it will."""
        self.steps = 0
        self._history = _History(0)
        self._before: list[Before] = []
        self._parameter = nn.Parameter(torch.zeros(1, 1, dtype=flat.dtype))
        self._optimizer = optimizer.build({name: self._parameter}, full)
        (group,) = self._optimizer.param_groups
        self._peak = group["lr"]
        self._rests = optimizer.rests(group.get("weight_decay", 0.0))

    @torch.no_grad()
    def step(self, ids: Tensor, gradients: Tensor, rate: float) -> None:
        """One step: of some rows (K,), each once, with their gradients (K, W), of all others with none."""
        if not self._begun:
            return self._first_step(ids, gradients, rate)
        rows = self._taken(ids)
        self._history.steps.append((rate, {key: float(number) for key, number in self._numbers.items()}))
        self._catch_up(rows, self._history, self.steps)
        self._numbers = self._step(rows, _padded(gradients), self.steps, self._history)
        self.steps += 1
        rows.last.fill_(self.steps)
        self._put(ids, rows)
        if self._rests:
            self._history = _History(self.steps)
        elif self.steps - self._history.first >= _LONGEST:
            self.settle()
        return None

    @torch.no_grad()
    def settle(self) -> None:
        """Let all rows catch up."""
        self._bring(torch.arange(len(self.values)))
        self._history = _History(self.steps)

    @torch.no_grad()
    def read(self, ids: Tensor | None, before: Before | None = None) -> Tensor:
        """Rows (K, W), None for all, as they are now or were before: in memory of their own."""
        if ids is None:
            ids = torch.arange(len(self.values))
        if before is None:
            self._bring(ids)
            return self.values[ids]
        rows = self._as_before(ids, before)
        self._catch_up(rows, before.history, before.steps)
        return rows.values[:, : self.values.shape[1]]

    def copy(self) -> Before:
        """The table as it is now, for ``read``, until it is let go."""
        before = Before(self.steps, self._history, torch.full((len(self.values),), -1, dtype=torch.int32))
        self._before.append(before)
        return before

    def release(self, before: Before) -> None:
        """It is not read any more."""
        self._before.remove(before)

    # What the optimizer keeps.

    def kept(self) -> dict[str, Any]:
        """By its keys: None for a tensor like the table, else the number and its dtype."""
        numbers = {key: (float(number), str(number.dtype)[6:]) for key, number in self._numbers.items()}
        return {**dict.fromkeys(self._kept), **numbers}

    def kept_values(self, key: str) -> Tensor:
        """(R, W), of rows that have all caught up; zeros if there is none."""
        self.settle()
        return self._kept.get(key, torch.zeros_like(self.values))

    def fill(self, key: str, values: Tensor) -> None:
        """Set what the optimizer keeps, before the first step."""
        self._kept[key], self._begun = values.clone(), True

    def set_number(self, key: str, number: Tensor) -> None:
        """Set a number that it keeps, before the first step."""
        self._numbers[key], self._begun = number, True

    def save(self) -> dict[str, Any]:
        """All of it but copies, with rows that have all caught up."""
        self.settle()
        return {
            "values": self.values.clone(),
            "steps": self.steps,
            "begun": self._begun,
            "kept": [(key, value.clone()) for key, value in self._kept.items()],
            "numbers": [(key, number.clone()) for key, number in self._numbers.items()],
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """As saved."""
        self.values.copy_(saved["values"])
        self.steps, self._begun = saved["steps"], saved["begun"]
        self._kept = {key: value.clone() for key, value in saved["kept"]}
        self._numbers = {key: number.clone() for key, number in saved["numbers"]}
        self._last.fill_(self.steps)
        self._history = _History(self.steps)

    def loaded_copy(self, values: Tensor) -> Before:
        """A copy that was saved as its values (R, W)."""
        before = self.copy()
        before.where.copy_(torch.arange(len(values)))
        before.count = len(values)
        before.aside.append(_Rows(values, {}, torch.full((len(values),), before.steps)))
        return before

    # Rows in and out.

    def _taken(self, ids: Tensor) -> _Rows:
        """Rows as they are, padded, in memory of their own."""
        kept = {key: _padded(values[ids]) for key, values in self._kept.items()}
        return _Rows(_padded(self.values[ids]), kept, self._last[ids])

    def _put(self, ids: Tensor, rows: _Rows) -> None:
        """Rows back in their place; as they were they are set aside for those who read a version before."""
        self._set_aside(ids)
        width = self.values.shape[1]
        self.values[ids] = rows.values[:, :width]
        for key, values in rows.kept.items():
            self._kept[key][ids] = values[:, :width]
        self._last[ids] = rows.last

    def _set_aside(self, ids: Tensor) -> None:
        for before in self._before:
            new = ids[before.where[ids] < 0]
            if len(new):
                kept = {key: values[new] for key, values in self._kept.items()}
                before.where[new] = torch.arange(before.count, before.count + len(new), dtype=torch.int32)
                before.count += len(new)
                before.aside.append(_Rows(self.values[new], kept, self._last[new]))

    def _as_before(self, ids: Tensor, before: Before) -> _Rows:
        rows = self._taken(ids)
        where = before.where[ids]
        moved = (where >= 0).nonzero().view(-1)
        if len(moved):
            width, at = self.values.shape[1], where[moved].long()
            rows.values[moved, :width] = torch.cat([each.values for each in before.aside])[at]
            rows.last[moved] = torch.cat([each.last for each in before.aside])[at]
            for key, values in rows.kept.items():
                if all(key in each.kept for each in before.aside):  # else nothing was kept then, and it has caught up
                    values[moved, :width] = torch.cat([each.kept[key] for each in before.aside])[at]
        return rows

    # Steps.

    def _first_step(self, ids: Tensor, gradients: Tensor, rate: float) -> None:
        """It is of all rows: so the optimizer makes what it keeps of them."""
        every, full = torch.arange(len(self.values)), None
        dense = torch.zeros_like(self.values)
        dense[ids] = gradients
        rows = self._taken(every)
        parameter = nn.Parameter(rows.values.view(-1, 1))
        optimizer = self._config.build({self._name: parameter}, full)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["lr"] = self._peak * rate
        parameter.grad = _padded(dense).view_as(parameter)
        optimizer.step()
        self._set_aside(every)
        state = optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        width = self.values.shape[1]
        self.values.copy_(parameter.detach().view_as(rows.values)[:, :width])
        self._kept = {k: v.view_as(rows.values)[:, :width].clone() for k, v in tensors.items() if v.ndim}
        self._numbers = {key: value for key, value in tensors.items() if not value.ndim}
        self._begun = bool(tensors) or rate > 0  # an optimizer that divides by the rate does nothing at 0
        self.steps += 1
        self._last.fill_(self.steps)
        self._history = _History(self.steps)

    def _bring(self, ids: Tensor) -> None:
        """Let rows catch up with the newest step."""
        ids = ids[self._last[ids] < self.steps]
        if len(ids) and not self._rests:
            rows = self._taken(ids)
            self._catch_up(rows, self._history, self.steps)
            self._put(ids, rows)

    def _step(self, rows: _Rows, gradients: Tensor | None, at: int, history: _History) -> dict[str, Tensor]:
        """Let padded rows take step number ``at``, in place; what numbers the optimizer keeps then."""
        rate, numbers = history.steps[at - history.first]
        if not rows.values.numel():  # the optimizer's numbers go on all the same
            rows = _Rows(
                rows.values.new_zeros(1, _LANES), {k: v.new_zeros(1, _LANES) for k, v in rows.kept.items()}, rows.last
            )
            gradients = None
        parameter, optimizer = self._parameter, self._optimizer
        parameter.grad = None
        parameter.data = rows.values.view(-1, 1)
        given = {key: values.view(-1, 1) for key, values in rows.kept.items()}
        told = {key: torch.tensor(value, dtype=self._numbers[key].dtype) for key, value in numbers.items()}
        optimizer.state[parameter] = {**given, **told}
        for group in optimizer.param_groups:
            group["lr"] = self._peak * rate
        parameter.grad = torch.zeros_like(parameter) if gradients is None else gradients.view_as(parameter)
        optimizer.step()
        for key, values in given.items():
            new = optimizer.state[parameter][key]
            if new.data_ptr() != values.data_ptr():
                values.copy_(new)
        return {key: optimizer.state[parameter][key] for key in told}

    def _catch_up(self, rows: _Rows, history: _History, until: int) -> None:
        """Let padded rows take the steps before ``until`` that they have not, without a gradient; in place."""
        if not self._rests and len(rows.last) and int(rows.last.min()) < until:
            order = torch.argsort(rows.last, stable=True)
            values, last = rows.values[order], rows.last[order]
            kept = {key: each[order] for key, each in rows.kept.items()}
            first = int(last[0])
            counts = torch.searchsorted(last, torch.arange(first, until), right=True).tolist()
            for at, count in zip(range(first, until), counts, strict=True):
                behind = _Rows(values[:count], {key: each[:count] for key, each in kept.items()}, last)
                self._step(behind, None, at, history)
            rows.values[order] = values
            for key, each in rows.kept.items():
                each[order] = kept[key]
        rows.last.fill_(until)


def _padded(values: Tensor) -> Tensor:
    """(K, W) with zeros behind, so that W is a multiple of 64; in memory of its own if it was."""
    width = values.shape[1]
    more = -width % _LANES
    return torch.nn.functional.pad(values, (0, more)) if more else values
