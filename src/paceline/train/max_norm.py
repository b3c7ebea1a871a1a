"""Max-norm: no row of a matrix is longer than a bound (Srivastava et al. 2014, Dropout, JMLR 15, section 5.1).

A row is what lies along the last dimension: the weights into one unit of a linear layer, the vector of one token.
"""

import torch
from torch import Tensor

from paceline.comm.replica import Shard
from paceline.train.penalties import matrices
from paceline.train.update import Adjustment, Update


class MaxNorm(Adjustment):
    """Scale rows whose L2 norm is above ``most`` back to it, after every step."""

    def __init__(self, most: float) -> None:
        self._most = most

    def after(self, update: Update) -> None:
        """See ``Adjustment``. Rows that tensor ranks hold parts of are measured over them, by one exchange."""
        shards = matrices(update)
        norms = [_row_norms(shard.local) for shard in shards]
        if cut := [place for place, shard in enumerate(shards) if _cuts_rows(update, shard)]:
            squares = torch.cat([norms[place].square().flatten() for place in cut]).to(update.device)
            sums = update.mesh.tensor.all_reduce(squares, where="row norms").sqrt()
            for place, whole in zip(cut, sums.split([norms[place].numel() for place in cut]), strict=True):
                norms[place].copy_(whole.view_as(norms[place]))
        for shard, norm in zip(shards, norms, strict=True):
            shard.local.mul_((self._most / norm).clamp_(max=1.0).to(shard.local.dtype).unsqueeze(-1))


def _row_norms(local: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(local, dim=-1, dtype=torch.promote_types(local.dtype, torch.float32))
    return norms


def _cuts_rows(update: Update, shard: Shard) -> bool:
    """Only tensor parallelism cuts a last dimension: experts are dealt out, and states are shared, along the first."""
    held = update.held.get(shard.name)
    return held is not None and any(cut.dim == shard.parameter.ndim - 1 for cut in held.cuts)
