import pytest
import torch
from torch import nn

from optim.problem import build, gradients, parameters, run
from paceline.optim import elementwise
from paceline.optim.adabelief import AdaBelief
from paceline.optim.elementwise import in_cache
from paceline.optim.lion import Lion
from paceline.optim.sgd import SGD
from paceline.parallel.full import FullTensors


def test_every_value_is_taken_once_with_those_that_belong_to_it(monkeypatch):
    monkeypatch.setattr(elementwise, "CACHED", 10)
    sizes = [3, 25, 0, 4, 10]
    first = [torch.arange(n, dtype=torch.float64) + 100 * i for i, n in enumerate(sizes)]
    seen = []
    for ones, others in in_cache([first, [2 * t for t in first]]):
        assert sum(t.numel() for t in ones) <= 20, "no more than a tensor's piece beyond the limit"
        assert all(other.equal(2 * one) for one, other in zip(ones, others, strict=True))
        seen += ones
    assert torch.cat(seen).equal(torch.cat(first))


@pytest.mark.parametrize("options", [AdaBelief(), Lion()])
def test_how_many_are_taken_at_a_time_changes_no_bit(options, monkeypatch):
    whole, _ = run(options, 3)
    monkeypatch.setattr(elementwise, "CACHED", 7)
    pieces, _ = run(options, 3)
    assert all(pieces[name].equal(p) for name, p in whole.items())


def test_a_parameter_that_does_not_lie_in_one_piece_of_memory():
    plain = parameters()["model.layers.0.up.weight"].detach()
    turned = nn.Parameter(plain.T.contiguous().T)
    assert not turned.is_contiguous()
    held = {"model.layers.0.up.weight": turned}
    run(AdaBelief(), 3, held)
    expected, _ = run(AdaBelief(), 3, {"model.layers.0.up.weight": nn.Parameter(plain.clone())})
    assert turned.equal(expected["model.layers.0.up.weight"])


def test_parameters_that_have_learned_for_fewer_steps_keep_their_own_count():
    """The average of one that starts late is corrected for its own steps."""
    held = parameters()
    optimizer = build(AdaBelief(), held)
    late = "model.layers.1.norm.weight"
    for step in range(4):
        for name, p in held.items():
            p.grad = None if name == late and step < 3 else gradients(step)[name]
        optimizer.step()
    alone = {late: parameters()[late]}
    alone[late].grad = gradients(3)[late]
    build(AdaBelief(), alone).step()
    assert held[late].equal(alone[late])


def test_a_first_gradient_later_than_others_begins_a_momentum():
    given = [torch.full((3,), g, dtype=torch.float64) for g in (1.0, 2.0, 4.0)]
    early, late = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    parameters = {"early": early, "late": late}
    optimizer = SGD(lr=1.0, momentum=0.5).build(parameters, FullTensors.alone(parameters))
    for step, gradient in enumerate(given):
        early.grad, late.grad = gradient.clone(), gradient.clone() if step else None
        optimizer.step()
    assert early.tolist() == [-(1.0 + 2.5 + 5.25)] * 3 and late.tolist() == [-(2.0 + 5.0)] * 3


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="momentum > 0"):
        SGD(nesterov=True)
