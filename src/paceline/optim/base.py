"""What every optimizer config offers, and how parameters are put into groups.

An optimizer is given plain local tensors, whatever the layout: of a parameter that ranks share, this rank's values. It
says by ``sees`` what it has to look at, and by ``state_kinds`` how what it keeps is held, so that a checkpoint can save
it by name and load it under any other layout.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from pydantic import model_validator
from torch import Tensor, nn

from paceline.config import NonNegative, Options, Positive, Text
from paceline.errors import PlanError
from paceline.parallel.full import FullTensors

Shapes = Mapping[str, Sequence[int]]
"""Full shapes of the trainable parameters by name."""

Sees = Literal["values", "gradients", "tensors", "loss"]
"""What an optimizer looks at.

    values      each value by itself, with its gradient
    gradients   the same, and another gradient of the batch now and then (``Estimating``)
    tensors     whole tensors (``FullTensors``)
    loss        the loss of the batch, again and again (``Searching``); replicas only
"""

StateKind = Literal["like", "rows", "whole", "owner"]
"""How a tensor of an optimizer's state is held.

    like    as the parameter is: this rank's values of a tensor of its shape
    rows    as the parameter is in all dimensions but the last, of which every rank has all
    whole   the same on every rank of the stage
    owner   whole, on the rank that owns the parameter in ``FullTensors.owners``, and on no other
"""


class OptimizerConfig(Options):
    """Base of the config classes of optimizers."""

    lr: Positive
    """The peak rate; the schedule multiplies it by a factor."""

    sees: ClassVar[Sees]
    state_kinds: ClassVar[Mapping[str, StateKind]] = {}
    """Of the state's tensors by their keys; those not named are ``whole`` if scalars, else ``like``."""
    source: ClassVar[str]
    """Where the method was published."""
    code: ClassVar[str] = "paceline"
    """Whose code runs."""
    schedule: ClassVar[str | None] = None
    """The only learning-rate schedule that goes with it; None for any."""
    averages: ClassVar[bool] = False
    """Whether what is good is an average of the parameters (``Averaging``)."""
    remakes: ClassVar[bool] = False
    """Whether a step makes the weights anew from its state, so that weights set from outside are forgotten."""
    exchanges: ClassVar[bool] = False
    """It is ``Exchanging``."""
    asks_again: ClassVar[bool] = False
    """It wants gradients of the batch besides that of the step."""
    differentiates_twice: ClassVar[bool] = False
    """Whether it takes the derivative of a gradient, which not all code can."""

    def rests(self, weight_decay: float) -> bool:
        """Whether a step without a gradient leaves values, and what is kept of them, where they are."""
        return False

    @abstractmethod
    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Bytes of state, scalars apart, that all ranks together keep for parameters of ``value_bytes`` a value."""

    @abstractmethod
    def build(self, parameters: Mapping[str, nn.Parameter], full: FullTensors) -> torch.optim.Optimizer:
        """The optimizer over named local parameters, of which ``full`` knows what they are parts of."""


class GroupConfig(Options):
    """What is different for some parameters."""

    match: Text
    """A pattern of whole names, with ``*`` and ``?``: ``"*embed*"``. The first group that matches a name has it; each
    has to match one at least."""
    lr: Positive | None = None
    """Their own peak rate."""
    lr_factor: Positive | None = None
    """Their peak rate as a multiple of the optimizer's, in place of ``lr``."""
    weight_decay: NonNegative | None = None
    """Of all of them, vectors too; default: the optimizer's, and none for vectors."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.lr is not None and self.lr_factor is not None:
            raise ValueError("expected lr or lr_factor, got both")
        if self.lr is self.lr_factor is self.weight_decay is None:
            raise ValueError("expected lr, lr_factor or weight_decay beside match")
        return self


class GroupedConfig(OptimizerConfig):
    """Base of the config classes of optimizers that may treat parameters differently."""

    weight_decay: NonNegative = 0.0
    """For matrices; norms and biases never decay, unless a group says so."""
    groups: tuple[GroupConfig, ...] = ()
    """Another rate or decay for parameters by name: ``[{match: "*embed*", lr_factor: 0.1, weight_decay: 0}]``."""


@runtime_checkable
class Averaging(Protocol):
    """An optimizer whose parameters are not what is good, but an average of theirs."""

    def averaged(self, parameter: Tensor) -> Tensor:
        """What is to be evaluated, exported and saved in place of a local parameter; in memory of its own."""
        ...


@runtime_checkable
class Owning(Protocol):
    """An optimizer that keeps some of its state with one rank alone."""

    owner: Mapping[str, int]
    """The rank of the stage, by parameter name."""


@runtime_checkable
class Estimating(Protocol):
    """An optimizer that needs another gradient now and then, of labels that the model draws."""

    def estimates_at(self, step: int) -> bool:
        """Whether it does before step ``step`` (1-based)."""
        ...

    def estimate(self, targets: int) -> None:
        """Take the gradients for those of the mean loss over so many drawn labels."""
        ...


@runtime_checkable
class Exchanging(Protocol):
    """An optimizer that has something else than gradients summed over replicas where sums are not exact."""

    def expect(self, is_exact: bool) -> None:
        """Say of the coming step whether its sums are exact: of gradients. If not, they are of what is ``outgoing``."""
        ...

    def outgoing(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """What this replica sends for its gradient. What all go on with is the mean, by the same weights."""
        ...


class Passes(Protocol):
    """What an optimizer may ask of the step's batch, of all replicas, at the parameters as they are now."""

    loss: float
    """The mean loss, where the gradients at hand were taken."""

    def gradient(self) -> float:
        """Replace the gradients by those of the mean loss, which is returned."""
        ...

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss times a vector for each parameter, in the order of the parameters."""
        ...


@runtime_checkable
class Searching(Protocol):
    """An optimizer that looks at the loss of the batch again and again in one step."""

    def search(self, passes: Passes) -> None:
        """One step; the gradients at hand are those of the batch."""
        ...


def values_bytes(shapes: Shapes, tensors: int, value_bytes: int) -> int:
    """Bytes of so many tensors like each parameter."""
    return tensors * value_bytes * sum(math.prod(shape) for shape in shapes.values())


def parameter_groups(parameters: Mapping[str, nn.Parameter], options: GroupedConfig) -> list[dict[str, Any]]:
    """Parameters of one rate and one decay together: ``params``, ``names``, ``lr``, ``weight_decay``, ``is_matrix``.

    Matrices decay; norms, biases and other vectors do not, unless a group says so. ``PlanError`` if there is no
    parameter to train.
    """
    if not parameters:
        raise PlanError("the model has nothing to train: no parameter of it has requires_grad")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        index, is_matrix = _group_of(name, options.groups), parameter.ndim >= 2
        empty = {"params": [], "names": [], **_settings(options, index, is_matrix), "is_matrix": is_matrix}
        group = groups.setdefault((index, not is_matrix), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def check_groups(options: OptimizerConfig, names: Iterable[str]) -> None:
    """Raise ``PlanError`` for a group that has none of a whole model's trainable parameters."""
    groups = options.groups if isinstance(options, GroupedConfig) else ()
    taken = {_group_of(name, groups) for name in names}
    for index, group in enumerate(groups):
        if index not in taken:
            some = any(fnmatchcase(name, group.match) for name in names)
            reason = "only parameters of groups before it" if some else "no parameter that is trained"
            raise PlanError(
                f"optimizer.groups.{index}.match={group.match!r} matches {reason}; names are such as "
                f"{', '.join(list(names)[:3])}"
            )


def _group_of(name: str, groups: Sequence[GroupConfig]) -> int:
    """The first that matches; behind the last for none."""
    return next((i for i, group in enumerate(groups) if fnmatchcase(name, group.match)), len(groups))


def _settings(options: GroupedConfig, index: int, is_matrix: bool) -> dict[str, float]:
    lr, decay = options.lr, options.weight_decay if is_matrix else 0.0
    if index < len(options.groups):
        group = options.groups[index]
        lr = group.lr or lr * (group.lr_factor or 1.0)
        decay = decay if group.weight_decay is None else group.weight_decay
    return {"lr": lr, "weight_decay": decay}
