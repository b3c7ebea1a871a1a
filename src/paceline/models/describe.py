"""The parameters of a module as plain data; a module on the meta device will do."""

from collections import defaultdict
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter; parameters tied to each other are one."""

    name: str
    """The first of its names in the module's own order."""
    shape: tuple[int, ...]
    numel: int
    aliases: tuple[str, ...]
    """Its other names, where it is tied."""
    trainable: bool


def describe(module: nn.Module) -> list[ParameterInfo]:
    """Every parameter once, in the module's own order."""
    names: dict[int, list[str]] = defaultdict(list)
    parameters = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
        parameters[id(parameter)] = parameter
    return [
        ParameterInfo(
            name=names[key][0],
            shape=tuple(parameter.shape),
            numel=parameter.numel(),
            aliases=tuple(names[key][1:]),
            trainable=parameter.requires_grad,
        )
        for key, parameter in parameters.items()
    ]


def count(module: nn.Module, *, trainable_only: bool = False) -> int:
    """How many numbers the parameters of ``module`` hold, tied ones once."""
    return sum(info.numel for info in describe(module) if info.trainable or not trainable_only)
