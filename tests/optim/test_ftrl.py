import torch
from torch import nn

from optim.problem import build, gradients, parameters, run
from paceline.optim.ftrl import FTRL


def test_it_starts_where_the_model_is():
    """Without penalties a step is -eta g, eta = lr / (beta + |g|), whatever the weights are."""
    held, _ = run(FTRL(lr=0.3, beta=0.5), 1)
    for name, start in parameters().items():
        g = gradients(0)[name]
        torch.testing.assert_close(held[name], start - 0.3 * g / (0.5 + g.abs()), rtol=1e-12, atol=1e-12)


def test_l1_makes_weights_exactly_zero_and_leaves_vectors():
    held, _ = run(FTRL(lr=0.1, l1=5.0), 20)
    matrix, norm = held["model.layers.0.wide.weight"], held["model.layers.1.norm.weight"]
    assert 0.1 < (matrix == 0).double().mean() < 0.9 and (norm != 0).all()
    assert (run(FTRL(lr=0.1), 20)[0]["model.layers.0.wide.weight"] != 0).all()


def test_decay_takes_its_share_of_the_first_weights_too():
    held = {"w": nn.Parameter(torch.ones(2, 3, dtype=torch.float64))}
    optimizer = build(FTRL(lr=0.5, beta=1.0, weight_decay=3.0), held)
    held["w"].grad = torch.zeros(2, 3, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(held["w"].detach(), torch.full((2, 3), 2 / (2 + 3), dtype=torch.float64))


def test_a_step_at_rate_zero_is_none():
    held = parameters()
    optimizer = build(FTRL(), held)
    for rate in (0.1, 0.0, 0.2):
        before = {name: (p.detach().clone(), {**optimizer.state[p]}) for name, p in held.items()}
        kept = {name: {key: t.clone() for key, t in state.items()} for name, (_, state) in before.items()}
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in held.items():
            p.grad = gradients(3)[name]
        optimizer.step()
        for name, p in held.items():
            assert p.equal(before[name][0]) is (rate == 0.0)
            if rate == 0.0:
                assert all(optimizer.state[p][key].equal(t) for key, t in kept[name].items())


def test_a_value_that_nothing_draws_stays():
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = build(FTRL(beta=0.0), {"w": parameter})
    parameter.grad = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    optimizer.step()
    assert parameter.tolist()[0][0] == parameter.tolist()[1][1] == 1.0 and parameter.tolist()[0][1] < 1.0
