import pytest

from paceline.config import Config
from paceline.train.policy import After, after


@pytest.mark.parametrize(
    ("step", "stop", "expected"),
    [
        (1, False, After(evaluate=False, save=False, stop=False)),
        (2, False, After(evaluate=True, save=False, stop=False)),
        (3, False, After(evaluate=False, save=True, stop=False)),
        (6, False, After(evaluate=True, save=True, stop=False)),
        (2, True, After(evaluate=False, save=True, stop=True)),
        (7, False, After(evaluate=True, save=True, stop=True)),
        (7, True, After(evaluate=True, save=True, stop=True)),  # a complete run has its last measurement
    ],
)
def test_what_happens_after_a_step(step, stop, expected):
    tree = {"data": {"source": "x"}, "train": {"steps": 7}, "evaluate": {"every": 2}, "checkpoint": {"every": 3}}
    assert after(Config.parse(tree), step, stop) == expected
