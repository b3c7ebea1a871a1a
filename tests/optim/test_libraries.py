"""Against the implementations of a library, in the forms that it has: a second reference beside the formulas."""

import pytest
import pytorch_optimizer
import torch

from optim.problem import build, gradients, parameters
from paceline.optim.ftrl import FTRL
from paceline.optim.shampoo import Shampoo
from paceline.optim.soap import SOAP
from tolerances import FP64_EQUAL

SQUARE = {"model.layers.0.square.weight": (6, 6), "model.layers.1.square.weight": (9, 9)}
"""Whose first gradient leaves nothing open: of other shapes a library takes the eigenvectors that rounding chooses."""
STEPS = 10
CASES = {
    "ftrl, from zero": (
        FTRL(lr=0.3, beta=0.5, l1=0.4, weight_decay=0.2),
        lambda p: pytorch_optimizer.FTRL(p, lr=0.3, beta=0.5, lambda_1=0.4, lambda_2=0.2),
        0.0,
    ),
    "shampoo, as first published": (
        Shampoo(lr=0.1, betas=(0.0, 0.9), decay=1.0, grafted=False, every=1, ridge=1e-15, weight_decay=0.0),
        lambda p: pytorch_optimizer.Shampoo(p, lr=0.1, matrix_eps=1e-15),
        1.0,
    ),
    "soap, with the bases of the first step": (
        SOAP(lr=0.1, weight_decay=0.2, every=STEPS),
        lambda p: pytorch_optimizer.SOAP(p, lr=0.1, weight_decay=0.2, precondition_frequency=STEPS),
        1.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_does_what_the_librarys_does(case):
    options, make, start = CASES[case]
    ours, theirs = parameters(shapes=SQUARE), parameters(shapes=SQUARE)
    with torch.no_grad():
        for p in (*ours.values(), *theirs.values()):
            p.mul_(start)
    optimizer, other = build(options, ours), make(list(theirs.values()))
    for step in range(STEPS):
        for held in (ours, theirs):
            for name, gradient in gradients(step, shapes=SQUARE).items():
                held[name].grad = gradient.clone()
        optimizer.step()
        other.step()
    for name in SQUARE:
        error = (ours[name] - theirs[name]).detach().norm() / theirs[name].detach().norm()
        assert error <= FP64_EQUAL, f"{name} differs by {error:.1e}"
