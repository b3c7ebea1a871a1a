"""Collectives that autograd can run backwards. Each is the transpose of another, which the backward pass runs.

forward          backward
copy             all_reduce         one tensor goes into computations that differ from rank to rank
all_reduce       copy               the parts of a sum come together
all_gather       reduce_scatter     pieces come together, and go into computations that differ
gather_equal     piece              pieces come together, and all ranks compute the same with the whole
piece            gather_equal       all ranks hold the whole, and go on with their own piece
reduce_scatter   all_gather         the parts of a sum come together, and each rank goes on with its own piece
all_to_all       all_to_all         cut along one dimension instead of another
exchange_rows    exchange_rows      every row goes to the rank that computes with it, and its gradient comes back
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from paceline.comm.mesh import Axis
from paceline.parallel.kept import kept


def copy(x: Tensor, axis: Axis, *, where: str = "") -> Tensor:
    """``x`` itself; its gradient is the sum over the axis."""
    return x if axis.size == 1 else _Copy.apply(x, axis, where)  # type: ignore[no-untyped-call]


def all_reduce(x: Tensor, axis: Axis, *, where: str = "") -> Tensor:
    """The sum over the axis, from which all ranks compute the same."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis, where)  # type: ignore[no-untyped-call]


def all_gather(x: Tensor, axis: Axis, dim: int, *, where: str = "") -> Tensor:
    """The whole of a tensor cut along ``dim``; the ranks' uses of it differ, so that their gradients are summed."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim, where)  # type: ignore[no-untyped-call]


def gather_equal(x: Tensor, axis: Axis, dim: int, *, where: str = "") -> Tensor:
    """The whole of a tensor cut along ``dim``, from which all ranks compute the same."""
    return x if axis.size == 1 else _GatherEqual.apply(x, axis, dim, where)  # type: ignore[no-untyped-call]


def piece(x: Tensor, axis: Axis, dim: int, *, where: str = "") -> Tensor:
    """This rank's piece of what all ranks hold whole."""
    return x if axis.size == 1 else _Piece.apply(x, axis, dim, where)  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, axis: Axis, dim: int, *, where: str = "") -> Tensor:
    """This rank's piece, along ``dim``, of the sum over the axis."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim, where)  # type: ignore[no-untyped-call]


def all_to_all(x: Tensor, axis: Axis, cut: int, join: int, *, where: str = "") -> Tensor:
    """From the whole of dimension ``cut`` and a piece of ``join`` to a piece of ``cut`` and the whole of ``join``."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis, cut, join, where)  # type: ignore[no-untyped-call]


def exchange_rows(x: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int], *, where: str = "") -> Tensor:
    """Rows sent to each rank, the first to rank 0; those received, in the order of ranks. Any number may be 0."""
    return x if axis.size == 1 else _ExchangeRows.apply(x, axis, sent, received, where)  # type: ignore[no-untyped-call]


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, where: str) -> Tensor:
        ctx.axis, ctx.where = axis, where
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.all_reduce(grad.contiguous().clone(), where=ctx.where), None, None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, where: str) -> Tensor:
        return kept(lambda: axis.all_reduce(x.contiguous().clone(), where=where))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, where: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.where = axis, dim, where
        return kept(lambda: axis.all_gather(x, dim, where=where))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.reduce_scatter(grad, ctx.dim, where=ctx.where), None, None, None


class _GatherEqual(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, where: str) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return kept(lambda: axis.all_gather(x, dim, where=where))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.piece(grad, ctx.dim).contiguous(), None, None, None


class _Piece(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, where: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.where = axis, dim, where
        return axis.piece(x, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.all_gather(grad, ctx.dim, where=ctx.where), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, where: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.where = axis, dim, where
        return kept(lambda: axis.reduce_scatter(x, dim, where=where))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.all_gather(grad, ctx.dim, where=ctx.where), None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, cut: int, join: int, where: str) -> Tensor:
        ctx.axis, ctx.cut, ctx.join, ctx.where = axis, cut, join, where
        return kept(lambda: axis.all_to_all(x, cut, join, where=where))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.axis.all_to_all(grad, ctx.join, ctx.cut, where=ctx.where), None, None, None, None


class _ExchangeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int], where: str) -> Tensor:
        ctx.axis, ctx.sent, ctx.received, ctx.where = axis, sent, received, where
        return kept(lambda: axis.exchange_rows(x, sent, received, where=where))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.axis.exchange_rows(grad, ctx.received, ctx.sent, where=ctx.where), None, None, None, None
