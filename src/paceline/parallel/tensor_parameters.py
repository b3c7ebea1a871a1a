"""The parameters of a model while they are cut over the tensor axis, and what is said of each."""

from collections.abc import Iterator, Sequence

from torch import nn

from paceline.comm.mesh import Axis
from paceline.errors import PlanError
from paceline.parallel.held import Cut, Held, Run, cut_runs, take


class Parameters:
    """Replaces parameters by this rank's part, wherever in the model they stand, and keeps the account of it."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        self._axis = axis
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._names.values()}
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                self._places[self._names[parameter]].append((module, key))
        self._by_place = {(module, key): name for name, places in self._places.items() for module, key in places}
        self.held: dict[str, Held] = {}

    def has(self, module: nn.Module, key: str) -> bool:
        """Whether the parameter is here: a stage of a pipeline lacks those that it does not compute with."""
        return (module, key) in self._by_place

    def name(self, module: nn.Module, key: str) -> str:
        """The name by which a module's parameter goes in the whole model: a tied one has several."""
        return self._by_place[module, key]

    def below(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
        """Module, key and name of every parameter in ``module``."""
        for inner in module.modules():
            for key, _ in inner.named_parameters(recurse=False):
                yield inner, key, self.name(inner, key)

    def holders(self, module: nn.Module, key: str) -> list[nn.Module]:
        """All modules that share a parameter."""
        return [holder for holder, _ in self._places[self.name(module, key)]]

    def cut(self, module: nn.Module, key: str, dim: int, *, parts: int = 1, unit: int = 1) -> int:
        """Cut along ``dim``, each of ``parts`` fused parts evenly by itself, between units of ``unit`` rows.

        Returns the size of what is left. Where the units of a part do not divide, the first ranks have one more.
        """
        full = module.get_parameter(key)
        units, rest = divmod(full.shape[dim], parts * unit)
        if rest or units < self._axis.size:
            raise PlanError(
                f"layout.tensor={self._axis.size} cannot cut {self.name(module, key)} of shape {tuple(full.shape)} "
                f"into {parts} x {self._axis.size} pieces along dimension {dim}. Use tensor={max(1, units)} or fewer"
            )
        runs = even_runs([units] * parts, self._axis.size, self._axis.index, unit)
        return self.hold(module, key, dim, runs, sum(run.size for run in runs))

    def cut_rows(self, module: nn.Module, key: str) -> None:
        """Cut rows into pieces of equal size, the last of which are padded with zeros."""
        rows = module.get_parameter(key).shape[0]
        self.hold(module, key, 0, cut_runs([rows], self._axis.size, self._axis.index), -(-rows // self._axis.size))

    def hold(self, module: nn.Module, key: str, dim: int, runs: Sequence[Run], size: int) -> int:
        """Keep only ``runs`` along ``dim``, in a tensor of ``size``; returns that size."""
        name, full = self.name(module, key), module.get_parameter(key)
        dim %= full.ndim
        local = nn.Parameter(take(full.detach(), dim, runs, size), requires_grad=full.requires_grad)
        self._record(name, Held(full_shape=tuple(full.shape), cuts=(Cut(dim, tuple(runs)),)))
        for place, place_key in self._places[name]:
            setattr(place, place_key, local)
        return size

    def in_parts(self, module: nn.Module, key: str) -> None:
        """Leave it whole, with the gradients of all ranks to be added up; nothing if it is cut or in parts already."""
        name = self.name(module, key)
        if name not in self.held:
            shape = tuple(module.get_parameter(key).shape)
            self._record(name, Held(full_shape=shape, summed_over=self._axis, is_owner=self._axis.index == 0))

    def _record(self, name: str, held: Held) -> None:
        assert name not in self.held, f"{name} is cut twice"
        self.held[name] = held


def even_runs(sizes: Sequence[int], pieces: int, index: int, unit: int = 1) -> list[Run]:
    """The runs of piece ``index`` where each of the fused parts of ``sizes`` is cut by itself, without padding.

    ``sizes`` are in units of ``unit`` rows, which stay together.
    """
    runs, begin, inner = [], 0, 0
    for size in sizes:
        each, longer = divmod(size, pieces)
        length = each + (index < longer)
        runs.append(Run(unit * (begin + index * each + min(index, longer)), unit * length, unit * inner))
        begin, inner = begin + size, inner + length
    return runs
