import torch
from torch import nn

from optim.problem import build, parameters, run
from paceline.optim.adamw import AdamW
from paceline.optim.adamw_8bit import AdamW8bit, dynamic_map, encode

WIDE = "model.layers.0.wide.weight"


def test_the_codes_are_those_of_the_publication():
    """Signed: down to 5.5e-7 in seven powers of ten; unsigned: twice as many; both with 0 and 1."""
    for signed, positive, smallest in ((True, 128, 5.5e-7), (False, 255, 3.25e-7)):
        codes = dynamic_map(signed=signed)
        assert len(codes) == len(codes.unique()) == 256 and codes.equal(codes.sort().values)
        assert (codes > 0).sum() == positive and (codes == 0).sum() == 1 and codes[-1] == 1.0
        assert torch.isclose(codes[codes > 0][0], torch.tensor(smallest, dtype=torch.float64))


def test_a_value_gets_the_nearest_code():
    codes = dynamic_map(signed=True)
    values = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    nearest = (values[:, None] - codes).abs().min(1).values
    chosen = codes[encode(values, codes).int()]
    assert ((chosen - values).abs() - nearest).abs().max() < 1e-15


def test_it_stays_near_to_adamw():
    ours, _ = run(AdamW8bit(lr=1e-2), 20)
    theirs, _ = run(AdamW(lr=1e-2), 20)
    start = parameters()
    moved = (theirs[WIDE] - start[WIDE]).norm()
    assert 0 < (ours[WIDE] - theirs[WIDE]).norm() < 0.05 * moved
    assert all(ours[name].equal(p) for name, p in theirs.items() if name != WIDE), "small ones are AdamW's"


def test_a_square_that_is_not_zero_does_not_become_zero():
    """Beside one a million times greater: else the next step would be the average over eps."""
    held = {WIDE: nn.Parameter(torch.zeros(16, 300))}
    optimizer = build(AdamW8bit(lr=1e-3), held)
    for _ in range(3):
        held[WIDE].grad = torch.full((16, 300), 1e-6)
        held[WIDE].grad[:, 0] = 1.0
        optimizer.step()
    state = optimizer.state[held[WIDE]]
    assert (state["square_codes"] > 0).all()
    held[WIDE].grad = torch.zeros(16, 300)
    before = held[WIDE].detach().clone()
    optimizer.step()
    assert (held[WIDE] - before).abs().max() < 2e-3


def test_values_that_never_had_a_gradient_have_neither_average_nor_square():
    held = {WIDE: nn.Parameter(torch.ones(16, 300))}
    optimizer = build(AdamW8bit(weight_decay=0.0), held)
    held[WIDE].grad = torch.zeros(16, 300)
    held[WIDE].grad[3] = 1.0
    optimizer.step()
    others = [row for row in range(16) if row != 3]
    assert (held[WIDE][others] == 1).all() and (held[WIDE][3] < 1).all()
    assert (optimizer.state[held[WIDE]]["square_codes"][others] == 0).all()
