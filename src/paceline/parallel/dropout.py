"""Dropout that is the same under every layout: what is dropped follows from where it stands in the run.

An element is dropped or not by its place in the model and its step, sequence, position and feature alone
(``models.chance``). Ranks that compute the same element drop it alike, and those that compute parts of one tensor drop
by the parts of one mask, whatever the micro-batch or stage, and whether it is computed for the first time or again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from types import TracebackType

import torch
from torch import Tensor, nn

from paceline.comm.mesh import Axis
from paceline.errors import PlanError
from paceline.models.chance import fold, stream_seed
from paceline.objectives.base import Batch
from paceline.parallel.dropout_calls import Caught, Chance, Numbering, Place, enter
from paceline.parallel.dropout_places import ROWS, STREAMS, Dimension, Dimensions, Places
from paceline.parallel.held import Held
from paceline.parallel.tensor_parameters import even_runs
from paceline.parallel.tensor_rules import is_in


class Dropout:
    """The dropouts of a model on one rank.

    ``tensor`` is the axis that features and heads are cut over, and with ``sequence`` positions too. ``places`` have
    nothing unknown.
    """

    def __init__(self, places: Places, *, seed: int, tensor: Axis, sequence: bool) -> None:
        assert places.unknown is None
        self.places, self.seed, self.tensor, self.sequence = places, seed, tensor, sequence
        self.fused: frozenset[int] = frozenset()
        """Features of layers that are several in one, of which a rank has a piece of each."""
        self._pass: _Pass | None = None
        """The forward pass that runs."""

    def install(self, model: nn.Module, held: Mapping[str, Held]) -> None:
        """Number the dropouts of a model, or of what is left of it on this rank, before blocks are recomputed."""
        self.fused = frozenset(
            own.full_shape[cut.dim] for own in held.values() for cut in own.cuts if len(cut.runs) > 1
        )
        enter(model, self.places.names, lambda: self._pass.numbering if self._pass else None)

    def drawing(self, step: int, batch: Batch, begun: Mapping[str, int] | None = None) -> AbstractContextManager[None]:
        """While it lasts the model drops out as in this step, of this micro-batch.

        ``begun``: calls of modules in blocks that are passed by, as ``calls_before`` tells.
        """
        return self._in_force(_Pass(self, step, batch, Numbering(begun)))

    def calls_before(self, order: Sequence[str], call: int) -> dict[str, int]:
        """How often modules are called in the first ``call`` of the calls of blocks in ``order``.

        Raises ``PlanError`` for a module that blocks do not call equally often each time, or that several share.
        """
        begun = {}
        for module, calls in self.places.calls.items():
            aliases = [alias for alias, name in self.places.names.items() if name == module]
            around = {block for block in order for alias in aliases if is_in(alias, block)}
            if not around:
                continue
            each, rest = divmod(calls, sum(block in around for block in order))
            if rest or (len(around) > 1 and each):
                raise PlanError(
                    f"layout.pipeline > 1 with dropout: {module} is called {calls} times by {len(around)} blocks, "
                    "not equally often by each call. Use pipeline=1, or set the model's dropouts to 0"
                )
            begun[module] = each * sum(block in around for block in order[:call])
        return begun

    def again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for ``torch.utils.checkpoint``: what runs from here on, and when the same runs again."""
        return nullcontext(), nullcontext() if self._pass is None else _Again(self._in_force, self._pass)

    def attention(self, query: Tensor, dropout: float) -> Tensor | None:
        """Keys (B, N), int64, of a dropout of attention that is computed over ranks; None without dropout.

        Position of the query and number of the key are still to come. ``query`` (B, N, P, H).
        """
        if dropout == 0.0 or self._pass is None:
            return None
        return self._pass.keys_of(query.shape[:2], query.device)

    @contextmanager
    def _in_force(self, own: "_Pass") -> Iterator[None]:
        before, self._pass = self._pass, own
        try:
            with Caught(own):
                yield
        finally:
            self._pass = before


class _Pass:
    """One forward pass of a micro-batch: a ``Chances``."""

    def __init__(self, dropout: Dropout, step: int, batch: Batch, numbering: Numbering) -> None:
        self.numbering = numbering
        self._dropout, self._step = dropout, step
        self._sequences, self._columns = batch.sequences, batch.columns
        self._tokens = {
            stream: ids.shape[1] for stream in STREAMS if isinstance(ids := batch.inputs.get(stream), Tensor)
        }
        self._indices: dict[tuple[Dimension, int], Tensor] = {}
        """Those that were needed so far, so that a device is sent each of them once."""

    def numbered(self, numbering: Numbering) -> "_Pass":
        """The same pass, from another place on."""
        other = copy(self)
        other.numbering = numbering
        return other

    def next(self, tensor: Tensor, shape: torch.Size) -> Chance | None:
        """See ``Chances``. Raises ``PlanError`` for a dropout that the trial has not seen like this."""
        place, dimensions = self._place()
        if len(shape) != len(dimensions):
            raise _wrong(place, shape)
        indices: list[Tensor] = []
        for counted, size in zip(dimensions, shape, strict=True):
            sizes = [size] if len(counted) == 1 else self._rows_and_positions(counted[1], size)
            indices += self._all_indices(place, shape, counted, sizes, tensor.device)
        return Chance(self._keys(place, indices[:-1]), indices[-1], shape)

    def keys_of(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Keys (B, N) of a dropout of attention that is called now."""
        place, dimensions = self._place()
        counted = [dim for dims in dimensions[:2] for dim in dims]
        return self._keys(place, self._all_indices(place, shape, counted, shape, device))

    def _place(self) -> tuple[Place, Dimensions]:
        place = self.numbering.next()
        dimensions = self._dropout.places.dimensions.get((place.module, place.number))
        if dimensions is None:
            raise PlanError(
                f"dropout number {place.number} of {place.module or 'the model'} was not called when the model was "
                "tried. Set the model's dropouts to 0"
            )
        return place, dimensions

    def _keys(self, place: Place, indices: Sequence[Tensor]) -> Tensor:
        """A key for every combination of the indices."""
        seed = stream_seed(self._dropout.seed, self._step, *place)
        keys = fold(seed, indices[0])
        for index in indices[1:]:
            keys = fold(keys.unsqueeze(-1), index)
        return keys

    def _all_indices(
        self, place: Place, shape: torch.Size, counted: Sequence[Dimension], sizes: Sequence[int], device: torch.device
    ) -> list[Tensor]:
        """The numbers, in the whole run, of what each dimension of these sizes counts on this rank; int64."""
        indices = []
        for known in zip(counted, sizes, strict=True):
            if known not in self._indices:
                index = self._index(*known)
                if index is None:
                    raise _wrong(place, shape)
                self._indices[known] = index.to(device)
            indices.append(self._indices[known])
        return indices

    def _index(self, dim: Dimension, size: int) -> Tensor | None:
        if dim == ROWS:
            return torch.tensor(self._sequences) if size == len(self._sequences) else None
        axis = self._dropout.tensor
        if dim.features is not None:
            if dim.features == size:
                return torch.arange(size)
            (own,) = even_runs([dim.features], axis.size, axis.index)
            is_piece = own.size == size and dim.features not in self._dropout.fused
            return torch.arange(own.start, own.start + size) if is_piece else None
        assert dim.stream is not None
        whole = self._padded(dim.stream)
        columns = torch.arange(whole) if self._columns is None else self._columns
        if size == whole == len(columns):
            return columns
        is_piece = self._dropout.sequence and size * axis.size == whole == len(columns)
        return columns[axis.index * size :][:size] if is_piece else None

    def _padded(self, stream: str) -> int:
        """Positions of an input that the ranks of the tensor axis have together."""
        multiple = self._dropout.tensor.size if self._dropout.sequence else 1
        return -(-self._tokens[stream] // multiple) * multiple

    def _rows_and_positions(self, positions: Dimension, size: int) -> list[int]:
        """The sizes of two dimensions that are one, row by row; 0 where they may be put together rank by rank."""
        rows = len(self._sequences)
        assert positions.stream is not None
        tokens = size // rows if size % rows == 0 else 0
        gathered = self._dropout.sequence and tokens == self._padded(positions.stream)
        return [rows, 0 if gathered else tokens]


def _wrong(place: Place, shape: torch.Size) -> PlanError:
    return PlanError(
        f"dropout in {place.module or 'the model'} is of a tensor of shape {tuple(shape)}, and under this layout it is "
        "not known which part of the whole that is. Use layout.tensor=1, or set the model's dropouts to 0"
    )


class _Again(AbstractContextManager[None]):
    """Puts a forward pass in force as it is now, every time anew: a backward pass in two halves computes twice."""

    def __init__(self, in_force: Callable[["_Pass"], AbstractContextManager[None]], own: "_Pass") -> None:
        self._in_force = in_force
        self._own, self._calls = own, dict(own.numbering.calls)
        self._open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._open.append(self._in_force(self._own.numbered(Numbering(self._calls))))
        self._open[-1].__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.pop().__exit__(kind, error, trace)
