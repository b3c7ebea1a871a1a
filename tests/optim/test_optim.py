import numpy as np
import pytest
import torch
from torch import nn

from paceline import registry
from paceline.errors import PlanError
from paceline.optim.adamw import AdamW
from paceline.optim.sgd import SGD


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64)),
        "norm": nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64)),
    }


def steps(options, count=4):
    """Values after a few steps on fixed gradients, and those gradients."""
    held = parameters()
    optimizer = options.build(held)
    gradients = []
    for step in range(count):
        rng = np.random.default_rng(step)
        gradients.append({name: rng.normal(size=p.shape) for name, p in held.items()})
        for name, p in held.items():
            p.grad = torch.from_numpy(gradients[-1][name])
        optimizer.step()
    return {name: p.detach().numpy() for name, p in held.items()}, gradients


def test_adamw_against_its_formula():
    options = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    got, gradients = steps(options)
    for name, start in parameters().items():
        theta, m, v = start.detach().numpy(), 0.0, 0.0
        decay = 0.5 if name == "matrix" else 0.0
        for t, g in enumerate((each[name] for each in gradients), start=1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            theta = theta - 0.01 * decay * theta
            theta = theta - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
        np.testing.assert_allclose(got[name], theta, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_against_its_formula(nesterov):
    got, gradients = steps(SGD(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2))
    for name, start in parameters().items():
        theta, buffer = start.detach().numpy(), 0.0
        for g in (each[name] for each in gradients):
            g = g + (0.2 * theta if name == "matrix" else 0.0)
            buffer = 0.9 * buffer + g
            theta = theta - 0.1 * (g + 0.9 * buffer if nesterov else buffer)
        np.testing.assert_allclose(got[name], theta, rtol=1e-12)


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="momentum > 0"):
        SGD(nesterov=True)


@pytest.mark.parametrize(
    "options", [*(registry.OPTIMIZERS.load(name)() for name in registry.OPTIMIZERS), SGD(momentum=0.9)]
)
def test_what_the_plan_says_of_state_is_what_is_kept(options):
    held = parameters()
    optimizer = options.build(held)
    for p in held.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [v for v in optimizer.state[held["matrix"]].values() if torch.is_tensor(v) and v.shape == (3, 4)]
    assert len(kept) == options.state_per_parameter


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(PlanError, match="nothing to train"):
        AdamW().build({})


@pytest.mark.parametrize("name", list(registry.OPTIMIZERS))
def test_elementwise_optimizers_update_a_part_as_in_the_whole(name):
    options = registry.OPTIMIZERS.load(name)()
    whole, halves = parameters()["matrix"], [parameters()["matrix"].detach()[:, i : i + 2] for i in (0, 2)]
    parts = [nn.Parameter(half.clone()) for half in halves]
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for held, own in ((whole, gradient), (parts[0], gradient[:, :2]), (parts[1], gradient[:, 2:])):
        held.grad = own.clone()
        options.build({"layers.0.weight": held}).step()
    assert torch.allclose(torch.cat([*parts], dim=1), whole, rtol=1e-12) is options.is_elementwise
