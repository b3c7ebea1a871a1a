import math

import pytest

from paceline import registry
from paceline.optim.constant import Constant
from paceline.optim.cosine import Cosine
from paceline.optim.linear import Linear
from paceline.optim.sgd import SGD


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="momentum > 0"):
        SGD(nesterov=True)


@pytest.mark.parametrize("name", list(registry.SCHEDULES))
def test_schedules_stay_between_zero_and_the_peak(name):
    options = registry.SCHEDULES.load(name)()
    for n in (1, 2, 7, 100):
        factors = [options.factor(step, n) for step in range(1, n + 1)]
        assert all(0 < f <= 1 for f in factors)


def test_shapes_of_the_schedules():
    cosine, linear = Cosine(warmup_steps=10, final=0.2), Linear(warmup_steps=10, final=0.2)
    for schedule in (cosine, linear):
        assert [schedule.factor(s, 110) for s in (1, 5, 10)] == [0.1, 0.5, 1.0]
        assert schedule.factor(110, 110) == pytest.approx(0.2)
        assert schedule.factor(60, 110) == pytest.approx(0.6)
    assert cosine.factor(35, 110) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert linear.factor(35, 110) == pytest.approx(0.8)
    assert Constant().factor(1, 9) == 1.0 and Constant(warmup_steps=4).factor(3, 9) == 0.75
    assert Cosine().factor(5, 100) == 1.0, "a twentieth of the run is the default warm-up"
