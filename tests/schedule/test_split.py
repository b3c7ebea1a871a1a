"""The two halves of a backward pass against the whole of it."""

import pytest
import torch
from torch import nn

from paceline.schedule.split import input_half

torch.manual_seed(0)
WEIGHTS = [nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(4)]
A, B, C, D = WEIGHTS


def chain(x):
    return (torch.tanh(x @ A) @ B,)


def shared_weight(x):
    """One weight twice, and others beside it: their borders overlap in part only."""
    return (torch.tanh((x @ A + x @ C) @ B) @ A + torch.tanh(x @ D) @ C,)


def bias_of_several(x):
    """Like a position bias, which every block adds, and which is handed on: it does not depend on ``x``."""
    bias = torch.tanh(C @ D)
    y = torch.tanh(x @ A + bias)
    return torch.tanh(y @ B + bias), bias


def nothing_received(x):
    return torch.tanh(A @ B), x.detach()


def one_output_above_another(x):
    y = torch.tanh(x @ A)
    return y, torch.tanh(y @ B) * y


@pytest.mark.parametrize(
    "function", [chain, shared_weight, bias_of_several, nothing_received, one_output_above_another]
)
def test_two_halves_are_the_whole(function):
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    outputs = function(x)
    grads = [torch.randn_like(output) for output in outputs]
    learning = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    roots, root_grads = zip(*learning, strict=True)
    expected = torch.autograd.grad(roots, [x, *WEIGHTS], root_grads, allow_unused=True)
    for weight in WEIGHTS:
        weight.grad = None
    other = torch.arange(3)
    (grad_x, grad_other), rest = input_half(function(x), grads, [x, other], WEIGHTS)
    assert grad_other is None and all(weight.grad is None for weight in WEIGHTS)
    rest.run()
    for found, true in zip([grad_x, *[weight.grad for weight in WEIGHTS]], expected, strict=True):
        if true is None:
            assert found is None
        else:
            torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-14)


def test_gradients_are_added_to_those_that_are_there():
    x = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    for weight in WEIGHTS:
        weight.grad = None
    for _ in range(2):
        _, rest = input_half([chain(x)[0].sum()], [None], [x], WEIGHTS)
        rest.run()
    (once,) = torch.autograd.grad(chain(x)[0].sum(), [A])
    torch.testing.assert_close(A.grad, 2 * once)
