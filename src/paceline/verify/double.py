"""fp64 all the way: also what a family computes in fp32 whatever its weights are (norms, rotary embeddings, routers).

Without it, another order of sums would show as 1e-7, and so would a small mistake.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def in_double() -> Iterator[None]:
    """While it lasts, every cast to fp32 in this process is one to fp64. Not for other threads to live with.

    Compiled blocks are cut in two at such a cast, which torch says each time.
    """
    functional = torch.nn.functional
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.Tensor, "to", _wide(torch.Tensor.to)),
        mock.patch.object(torch.Tensor, "type", _wide(torch.Tensor.type)),
        mock.patch.object(torch.Tensor, "softmax", _wide(torch.Tensor.softmax)),
        mock.patch.object(torch, "zeros", _wide(torch.zeros)),
        mock.patch.object(torch, "zeros_like", _wide(torch.zeros_like)),
        mock.patch.object(torch, "softmax", _wide(torch.softmax)),
        mock.patch.object(functional, "softmax", _wide(functional.softmax)),
        mock.patch.object(functional, "log_softmax", _wide(functional.log_softmax)),
    ):
        warnings.filterwarnings("ignore", "Dynamo does not know how to trace the builtin", UserWarning)
        yield


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    # A function mode of torch would do, but is not in force while activations are computed again in a backward pass.
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_double, args), **{name: _double(value) for name, value in kwargs.items()})

    return call


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
