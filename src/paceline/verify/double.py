"""fp64 all the way: also what a family computes in fp32 whatever its weights are (norms, rotary embeddings, routers).

Without it, another order of sums would show as 1e-7, and so would a small mistake.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def in_double() -> Iterator[None]:
    """While it lasts, every cast to fp32 in this process is one to fp64. Not for other threads to live with.

    Compiled blocks are cut in two at such a cast, which torch says each time.
    """
    with torch.device("meta"):
        torch.zeros(0)  # torch looks once for all which functions make tensors: it is to find its own
    functional = torch.nn.functional
    patched = [
        *((torch.Tensor, name) for name in ("to", "type", "softmax", "sum", "mean", "cumsum")),
        *((torch, name) for name in ("zeros", "zeros_like", "softmax", "sum", "mean", "cumsum")),
        *((functional, name) for name in ("softmax", "log_softmax")),
    ]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        for owner, name in patched:
            stack.enter_context(mock.patch.object(owner, name, _wide(getattr(owner, name))))
        warnings.filterwarnings("ignore", "Dynamo does not know how to trace the builtin", UserWarning)
        yield


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    # A function mode of torch would do, but is not in force while activations are computed again in a backward pass.
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_double, args), **{name: _double(value) for name, value in kwargs.items()})

    return call


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
