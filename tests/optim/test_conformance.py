"""What holds for every optimizer, read from the table: a new one needs a reference, and no other test code."""

import numpy as np
import pytest
import torch

from optim.layouts import Trained
from optim.problem import SHAPES, Bowl, build, gradients, parameters, rate, run
from optim.references import REFERENCES
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.registry import OPTIMIZERS
from tolerances import FP64_EQUAL

EVERY = pytest.mark.parametrize("name", list(OPTIMIZERS))
STEPS = 12
OPTIONS = {
    "adafactor": {"weight_decay": 0.1, "eps": (1e-12, 1e-3)},
    "adagrad": {"initial": 0.1, "weight_decay": 0.1},
    "lbfgs": {"iterations": 2, "history": 3},
    "newton_cg": {"iterations": 3},
    "sophia": {"every": 3},
    "ftrl": {"l1": 0.3, "weight_decay": 0.2, "lr": 0.3},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
    "shampoo": {"every": 3},
    "soap": {"every": 3},
}
"""Such that every term counts."""


def options_of(name):
    return choose(OPTIMIZERS, {"name": name, **OPTIONS.get(name, {})})


@EVERY
def test_it_does_what_its_reference_does(name):
    options = options_of(name)
    got, _ = run(options, STEPS)
    start = {n: p.detach().numpy() for n, p in parameters().items()}
    given = [{n: g.numpy() for n, g in gradients(step).items()} for step in range(STEPS)]
    expected = REFERENCES[name](options, start, given, [options.lr * rate(step) for step in range(STEPS)])
    for n in SHAPES:
        error = np.linalg.norm(got[n].detach().numpy() - expected[n]) / np.linalg.norm(expected[n])
        assert error <= FP64_EQUAL, f"{n} differs by {error:.1e}"
        assert not np.allclose(expected[n], start[n], rtol=1e-4), n


@EVERY
def test_a_saved_one_goes_on_bit_for_bit(name, tmp_path):
    never_stopped, first, second = (Trained(options_of(name), Mesh.alone()) for _ in range(3))
    never_stopped.steps(0, STEPS)
    first.steps(0, STEPS // 2)
    first.save(tmp_path, STEPS // 2)
    second.restore(tmp_path, STEPS // 2)
    second.steps(STEPS // 2, STEPS)
    for n, p in never_stopped.replica.local.items():
        assert second.replica.local[n].equal(p), n
        kept, restored = (t.replica.optimizer.state.get(t.replica.local[n], {}) for t in (never_stopped, second))
        assert kept.keys() == restored.keys()
        assert all(torch.equal(kept[key], restored[key]) for key in kept), n


@EVERY
def test_the_plan_knows_the_bytes_of_its_state(name):
    options = options_of(name)
    trained = Trained(options, Mesh.alone())
    trained.steps(0, STEPS)
    assert trained.state_bytes() == options.state_bytes(SHAPES, value_bytes=8)
    held, optimizer = run(options, STEPS, parameters(torch.float32))
    kept = sum(t.nbytes for p in held.values() for t in optimizer.state.get(p, {}).values() if t.ndim)
    assert kept == options.state_bytes(SHAPES)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS.load(name).sees != "loss"])
def test_a_parameter_without_a_gradient_is_left_alone(name):
    """In the steps in which it has none; and others do not notice."""
    options = options_of(name)
    still = ("model.layers.0.up.weight", "model.layers.1.norm.weight")
    without = [(step, n) for n in still for step in range(3, 6)]
    held, optimizer = run(options, 3)
    before = {n: (p.detach().clone(), {k: t.clone() for k, t in optimizer.state[p].items()}) for n, p in held.items()}
    run(options, 3, held, optimizer, begin=3, without=without)
    plain, _ = run(options, 6)
    for n, p in held.items():
        if n in still:
            assert p.equal(before[n][0]), n
            assert all(t.equal(before[n][1][k]) for k, t in optimizer.state[p].items()), n
        else:
            assert p.equal(plain[n]), n


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS.load(name).sees == "values"])
def test_a_parameter_whose_first_gradient_comes_late_learns_from_then_on(name):
    """As if the steps before had not been; and one may never have any, as an expert that is not chosen."""
    late, never = "model.layers.0.up.weight", "model.layers.1.norm.weight"
    without = [(0, late), (1, late), *((step, never) for step in range(5))]
    held, _ = run(options_of(name), 5, without=without)
    alone = {late: parameters()[late]}
    run(options_of(name), 3, alone, begin=2)
    torch.testing.assert_close(held[late], alone[late], rtol=FP64_EQUAL, atol=FP64_EQUAL)
    assert held[never].equal(parameters()[never])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS.load(name).sees == "loss"])
def test_one_that_looks_at_the_loss_leaves_a_parameter_without_a_gradient_where_it_is(name):
    held = {**parameters(), "unused": torch.nn.Parameter(torch.ones(3, dtype=torch.float64))}
    optimizer = build(options_of(name), held)
    used = {n: p for n, p in held.items() if n != "unused"}
    for step in range(4):
        optimizer.search(WithUnused(used, step))
    assert held["unused"].tolist() == [1.0, 1.0, 1.0]
    assert not held["model.layers.1.norm.weight"].equal(parameters()["model.layers.1.norm.weight"])


class WithUnused(Bowl):
    """The last parameter has no part in the loss."""

    def product(self, vectors):
        return [*super().product(vectors[:-1]), torch.zeros_like(vectors[-1])]


@EVERY
def test_it_says_what_the_docs_tell(name):
    options = OPTIMIZERS.load(name)
    assert options.__doc__.partition("\n")[0].endswith(".") and options.source and options.code
