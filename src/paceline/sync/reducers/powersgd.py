"""PowerSGD (Vogels et al. 2019, arXiv 1905.13727, algorithms 1 and 2): matrices of low rank in place of matrices.

    M = share * value + residual             (rows, columns), of each member
    P = sum of M Q;  P^ = orthonormal basis of P's columns
    Q = sum of M^T P^                        kept as the start of the next time
    the sum is P^ Q^T;  residual = M - P^ (M^T P^)^T, what a member's own part of it leaves out

Two sums, the second of which waits for the first, each of all matrices in one buffer, in no callback. Tensors of which
the factors would not be smaller go with the first as they are. The last dimension is the columns. A column of Q that
has become zero would stay so, and is begun anew. Matrices are whole on one rank of the replica each. All members
compute the same factors from the same sums, which takes the same library and processor.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from paceline.comm.replica import Shard
from paceline.config import Count, Options
from paceline.models.chance import stream_seed
from paceline.plan.wire import all_reduce_bytes, all_reduce_delays
from paceline.sync.base import Shapes, SyncContext, SyncState
from paceline.sync.reducers.whole import Arrive, WholeReducer, as_matrix


class PowerSGD(Options):
    """Send two factors of low rank in place of each matrix."""

    rank: Count = 4
    """Columns of the factors; the paper has 1 to 4."""
    warm_start: bool = True
    """Begin with the factor of the last time; else with a new one by chance."""
    error_feedback: bool = True
    """Keep what the factors leave out and send it the next time."""

    is_exact: ClassVar[bool] = False
    ns_per_value: ClassVar[float] = 19
    source: ClassVar[str] = "Vogels et al. 2019, arXiv 1905.13727"

    def wire_bytes(self, shapes: Shapes, members: int) -> int:
        """The left factors and what has none, then the right factors, each a sum."""
        return sum(all_reduce_bytes(n_bytes, members) for n_bytes in self._sums(shapes))

    def delays(self, shapes: Shapes, members: int) -> int:
        """Of the two sums, one after the other."""
        return sum(all_reduce_delays(n_bytes, members) for n_bytes in self._sums(shapes))

    def late_delays(self, shapes: Shapes, members: int) -> int:
        """Of the second sum."""
        return all_reduce_delays(self._sums(shapes)[1], members)

    def _sums(self, shapes: Shapes) -> tuple[int, int]:
        """Bytes of both."""
        first = second = 0
        for shape in shapes.values():
            if has_factors(shape, self.rank):
                rows, columns = as_matrix(shape)
                first, second = first + self.rank * rows, second + self.rank * columns
            else:
                first += math.prod(shape)
        return 4 * first, 4 * second

    def state_bytes(self, shapes: Shapes) -> int:
        """The residual and the factors, those of before until the sum is used; and three copies while it is made."""
        values = sum(math.prod(shape) for shape in shapes.values())
        factors = sum(self.rank * sum(as_matrix(shape)) for shape in shapes.values() if has_factors(shape, self.rank))
        return 4 * (values * (3 + 2 * self.error_feedback) + 3 * factors)

    def build(self, context: SyncContext) -> "PowerSGDReducer":
        """The reducer at work."""
        return PowerSGDReducer(context, self)


class PowerSGDReducer(WholeReducer):
    """Sums of matrices by their factors, over a link."""

    def __init__(self, context: SyncContext, options: PowerSGD) -> None:
        super().__init__(context, error_feedback=options.error_feedback)
        self._options = options
        self._right: dict[str, Tensor] = {}
        """Q (columns, rank) of the matrices of this rank."""
        self._right_before: dict[str, Tensor] = {}

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether it has factors."""
        return has_factors(shape, self._options.rank)

    def start(self, shards: Sequence[Shard]) -> None:
        """Choose who has which matrix, and begin with factors by chance."""
        super().start(shards)
        for shard in shards:
            if shard.name in self.owner and self.is_here(shard.name):
                dtype = torch.promote_types(shard.local.dtype, torch.float32)
                self._right[shard.name] = self._by_chance(shard.name, 0).to(shard.local.device, dtype)

    def start_exchange(self, whole: Mapping[str, Tensor], plain: dict[str, Tensor], step: int) -> Arrive:
        """See ``WholeReducer``."""
        matrices = {name: tensor.reshape(as_matrix(tensor.shape)) for name, tensor in whole.items()}
        before = self._right
        if not self._options.warm_start:
            before = {name: self._by_chance(name, step).to(q) for name, q in before.items()}
        left = {name: matrix @ before[name] for name, matrix in matrices.items()}
        add_up = self._start_adding_up(left, plain)

        def arrive() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            add_up()
            basis = {name: _basis(p) for name, p in left.items()}
            own = {name: matrix.T @ basis[name] for name, matrix in matrices.items()}
            right = {name: q.clone() for name, q in own.items()}
            self._start_adding_up(right)()

            begun = {name: self._begun_anew(name, q) for name, q in right.items()}
            self._right_before, self._right = self._right, begun
            sums = {name: (basis[name] @ right[name].T).view(tensor.shape) for name, tensor in whole.items()}
            return sums, {name: t - (basis[name] @ own[name].T).view(t.shape) for name, t in whole.items()}

        return arrive

    def settle(self, unused: Collection[str] = ()) -> None:
        """See ``Reducer``."""
        super().settle(unused)
        self._right |= {name: self._right_before[name] for name in unused if name in self._right_before}
        self._right_before = {}

    def state(self) -> Mapping[str, SyncState]:
        """The residual, and the right factors, each on the rank that has its matrix."""
        if not self._options.warm_start:
            return super().state()
        nothing = torch.zeros(0)
        factors = {
            f"{name}/right_factor": SyncState(self._right[name], owner="here")
            if self.is_here(name)
            else SyncState(nothing, owner="elsewhere")
            for name in self.owner
        }
        return {**super().state()} | factors

    def _start_adding_up(self, *tensors: dict[str, Tensor]) -> Callable[[], None]:
        """Start the sums over the members in one exchange; what is returned puts them in place of the tensors."""
        each = [(kept, name) for kept in tensors for name in kept]
        if not each:
            return lambda: None
        together = torch.cat([kept[name].reshape(-1) for kept, name in each])
        pending = self.link.all_reduce(together)

        def add_up() -> None:
            pending.wait()
            parts = together.split([kept[name].numel() for kept, name in each])
            for (kept, name), part in zip(each, parts, strict=True):
                kept[name] = part.view(kept[name].shape)

        return add_up

    def _begun_anew(self, name: str, right: Tensor) -> Tensor:
        is_zero = (right == 0).all(0)
        return torch.where(is_zero, self._by_chance(name, 0).to(right), right) if is_zero.any() else right

    def _by_chance(self, name: str, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(stream_seed(self.context.seed, "right factor", step, name))
        return torch.randn(as_matrix(self.full.shape(name))[1], self._options.rank, generator=generator)


def has_factors(shape: Sequence[int], rank: int) -> bool:
    """Whether the factors of a tensor are smaller than it."""
    if len(shape) < 2:
        return False
    rows, columns = as_matrix(shape)
    return rank * (rows + columns) < rows * columns


def _basis(left: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix; what is not finite stays so."""
    if not left.isfinite().all():
        return torch.full_like(left, torch.nan)
    basis: Tensor = torch.linalg.qr(left).Q
    return basis
