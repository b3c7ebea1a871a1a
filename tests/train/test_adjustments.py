"""Clipping and penalties against a few lines of NumPy; that layouts change nothing: tests/verify/test_stability.py."""

import numpy as np
import pytest
import torch
from torch import nn

from paceline.comm.mesh import Mesh
from paceline.config import Config, LossScaleConfig
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.registry import OPTIMIZERS
from paceline.train.adjustments import adjustments
from paceline.train.loss_scale import LossScale
from paceline.train.replica import ModuleReplica

RATE = 0.1


class Model(nn.Module):
    """Two blocks, and something outside of them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)


def rng(step):
    return np.random.default_rng(step)


def replica(optimizer=None, loss_scale=None, **sections):
    torch.manual_seed(0)
    model = Model().double()
    config = Config.parse({"data": {"source": "x"}, "train": {"steps": 1, "clip_norm": None}} | sections)
    blocks = ["layers.0", "layers.1"]
    states = Masters(model, torch.float64)
    adjusting = adjustments(config, blocks)
    return ModuleReplica(states, optimizer or SGD(lr=RATE), adjusting, mesh=Mesh.alone(), loss_scale=loss_scale)


def step(held, number, without=()):
    """Give gradients that follow from the number, at the loss scale; finish the step, and return them without it."""
    generator, given = rng(number), {}
    for shard in held.shards:
        given[shard.name] = generator.normal(size=shard.parameter.shape)
        if shard.name not in without:
            shard.parameter.grad = torch.from_numpy(held.loss_scale.value * given[shard.name])
    finish = held.finish(lambda wish: wish)
    assert finish.stepped
    assert finish.gradient_norm == pytest.approx(norm(given[n] for n in given if n not in without), rel=1e-12)
    return given


def norm(values):
    return np.sqrt(sum((value**2).sum() for value in values))


def may_move_weights(options):
    """See ``plan.adjustments`` and ``plan.optimizer``."""
    return options.sees != "loss" and not options.averages


def weights(held):
    return {shard.name: shard.local.numpy().copy() for shard in held.shards}


def expected_clip(gradients, value=None, block=None, whole=None):
    clipped = {name: g if value is None else np.clip(g, -value, value) for name, g in gradients.items()}
    if block is not None:
        for part in ("layers.0.", "layers.1.", ""):
            own = [n for n in clipped if (n.startswith(part) if part else not n.startswith("layers."))]
            factor = min(1.0, block / norm(clipped[n] for n in own))
            clipped |= {n: clipped[n] * factor for n in own}
    if whole is not None:
        factor = min(1.0, whole / norm(clipped.values()))
        clipped = {n: g * factor for n, g in clipped.items()}
    return clipped


@pytest.mark.parametrize(
    "bounds",
    [
        {"value": 0.5},
        {"block": 1.0},
        {"whole": 1.0},
        {"block": 1.0, "whole": 1.2},
        {"value": 0.5, "block": 1.0, "whole": 1.2},
        {"value": 100.0, "block": 100.0, "whole": 100.0},
        {"block": 5.0},  # above the norm of one block alone
    ],
)
def test_clipping(bounds):
    keys = {"value": "clip_value", "block": "clip_block_norm", "whole": "clip_norm"}
    train = {"steps": 1, "clip_norm": None} | {keys[kind]: most for kind, most in bounds.items()}
    held = replica(train=train)
    before = weights(held)
    gradients = step(held, 1, without={"layers.1.bias"})
    gradients.pop("layers.1.bias")
    clipped = expected_clip(gradients, **bounds)
    for name, weight in weights(held).items():
        expected = before[name] - RATE * clipped.get(name, 0.0)
        np.testing.assert_allclose(weight, expected, rtol=1e-12, atol=1e-15)
    if bounds == {"block": 5.0}:
        assert any(clipped[n] is not gradients[n] and np.array_equal(clipped[n], gradients[n]) for n in clipped)


def test_penalties_come_after_clipping_and_only_on_matrices():
    held = replica(train={"steps": 1, "clip_norm": 0.1}, regularisation={"l2": 0.5})
    before = weights(held)
    clipped = expected_clip(step(held, 1), whole=0.1)
    for name, weight in weights(held).items():
        pull = 0.5 * before[name] if weight.ndim == 2 else 0.0
        np.testing.assert_allclose(weight, before[name] - RATE * (clipped[name] + pull), rtol=1e-12)


def test_sparsity_is_the_proximal_step_and_reaches_zero():
    held = replica(regularisation={"l1": 2.0})
    before = weights(held)
    gradients = step(held, 1, without={"layers.0.weight"})
    for name, weight in weights(held).items():
        if name == "layers.0.weight":
            assert np.array_equal(weight, before[name])
            continue
        moved = before[name] - RATE * gradients[name]
        if weight.ndim == 2:
            moved = np.sign(moved) * np.maximum(np.abs(moved) - RATE * 2.0, 0.0)
            assert (weight == 0.0).any() and (weight != 0.0).any()
        np.testing.assert_allclose(weight, moved, rtol=1e-12, atol=1e-15)


def test_sparsity_follows_the_rate():
    held = replica(regularisation={"l1": 1.0})
    held.set_rate_factor(0.5)
    before = weights(held)
    gradients = step(held, 1)
    moved = before["embed.weight"] - 0.5 * RATE * gradients["embed.weight"]
    expected = np.sign(moved) * np.maximum(np.abs(moved) - 0.5 * RATE, 0.0)
    np.testing.assert_allclose(weights(held)["embed.weight"], expected, rtol=1e-12, atol=1e-15)


def test_max_norm_scales_long_rows_alone():
    held, free = replica(regularisation={"max_norm": 2.0}), replica()
    step(held, 1)
    step(free, 1)
    for name, weight in weights(held).items():
        moved = weights(free)[name]
        if weight.ndim == 2:
            lengths = np.linalg.norm(moved, axis=1, keepdims=True)
            if name == "embed.weight":
                assert (lengths > 2.0).any() and (lengths < 2.0).any()
            kept = (lengths <= 2.0).squeeze(1)
            assert np.array_equal(weight[kept], moved[kept])
            moved = moved * np.minimum(1.0, 2.0 / lengths)
        np.testing.assert_allclose(weight, moved, rtol=1e-12)


def test_the_momentum_penalty_is_less_momentum():
    """Of SGD at a constant rate, by rate x strength; on matrices, so that vectors keep all of it."""
    penalised = replica(SGD(lr=RATE, momentum=0.9), regularisation={"momentum": 4.0})
    less, plain = replica(SGD(lr=RATE, momentum=0.5)), replica(SGD(lr=RATE, momentum=0.9))
    for number in range(6):
        for held in (penalised, less, plain):
            step(held, number)
    for name, weight in weights(penalised).items():
        reference = less if weight.ndim == 2 else plain
        np.testing.assert_allclose(weight, weights(reference)[name], rtol=1e-12)


def test_the_momentum_penalty_looks_one_update_back():
    """At a rate that changes, and past a step in which a parameter has no gradient: by its formula."""
    held = replica(SGD(lr=RATE), regularisation={"momentum": 3.0})
    name = "layers.0.weight"
    now = last = weights(held)[name]
    for number, factor in enumerate((1.0, 0.5, 2.0, 1.0, 1.5)):
        held.set_rate_factor(factor)
        gone = number == 2
        gradient = step(held, number, without={name} if gone else ())[name]
        then = now if gone else now - RATE * factor * (gradient + 3.0 * (now - last))
        now, last = then, now
        np.testing.assert_allclose(weights(held)[name], now, rtol=1e-12)


EVERYTHING = {
    "train": {"steps": 1, "clip_value": 1.0, "clip_block_norm": 2.0, "clip_norm": 2.5},
    "regularisation": {"l2": 0.1, "l1": 0.2, "momentum": 0.5, "max_norm": 2.0},
}


def test_a_loss_scale_changes_no_bit():
    """A power of two: what clips and what pulls sees gradients without it."""
    plain, scaled = replica(**EVERYTHING), replica(**EVERYTHING, loss_scale=LossScale(LossScaleConfig(initial=1024.0)))
    for number in range(3):
        for held in (plain, scaled):
            step(held, number)
    assert all(np.array_equal(weight, weights(scaled)[name]) for name, weight in weights(plain).items())


def test_nothing_is_adjusted_in_a_step_that_is_not_taken():
    held = replica(**EVERYTHING, loss_scale=LossScale(LossScaleConfig(initial=1024.0)))
    step(held, 0)
    before, kept = weights(held), {name: tensor.clone() for name, tensor in held.adjusted().items()}
    for shard in held.shards:
        shard.parameter.grad = torch.full_like(shard.parameter, torch.inf)
    assert held.finish(lambda wish: wish).overflowed
    assert all(np.array_equal(weight, before[name]) for name, weight in weights(held).items())
    assert kept and all(torch.equal(tensor, kept[name]) for name, tensor in held.adjusted().items())


def test_gradients_for_an_estimate_of_curvature_are_not_adjusted():
    held = replica(**EVERYTHING)
    gradients = {shard.name: torch.from_numpy(rng(1).normal(size=shard.parameter.shape)) for shard in held.shards}
    for shard in held.shards:
        shard.parameter.grad = gradients[shard.name].clone()
    length = held.lend_unscaled()
    assert length == pytest.approx(norm(g.numpy() for g in gradients.values()), rel=1e-12)
    assert all(torch.equal(held.local[name].grad, gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if may_move_weights(OPTIMIZERS.load(n))])
def test_sparsity_goes_with_every_optimizer(name):
    """The proximal step at the rate that the optimizer says, of the weights that it has made."""
    options = OPTIMIZERS.load(name)(lr=0.05)
    plain, sparse = replica(options), replica(options, regularisation={"l1": 0.5})
    for held in (plain, sparse):
        held.set_rate_factor(0.5)
        held.begin(1)
        step(held, 1)
    for name, weight in weights(plain).items():
        pulled = np.sign(weight) * np.maximum(np.abs(weight) - 0.5 * 0.05 * 0.5, 0.0)
        expected = pulled if weight.ndim == 2 else weight
        np.testing.assert_allclose(weights(sparse)[name], expected, rtol=1e-12, atol=1e-15)


def test_what_is_not_asked_for_is_not_there():
    config = Config.parse({"data": {"source": "x"}, "train": {"steps": 1, "clip_norm": None}})
    assert adjustments(config, []) == ()
    assert [
        type(a).__name__ for a in adjustments(Config.parse({"data": {"source": "x"}, "train": {"steps": 1}}), [])
    ] == ["ClipNorm"]
