import pytest

from paceline.config import Config
from paceline.errors import PlanError
from paceline.plan.run import plan_run

LEAST = {"data": {"source": "unused"}, "train": {"steps": 50}}
PERTURB = {"shrink": 0.5, "noise": 0.5}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"average": "swa"}, "average.every=cycle, but schedule=cosine has no cycles. Use schedule=cosine_restarts"),
        ({"perturb": {**PERTURB, "at": "cycle"}}, "perturb.at=cycle, but schedule=cosine has no cycles"),
        ({"perturb": {**PERTURB, "at": [10, 50]}}, "perturb.at=50 is not before the last of 50 steps"),
        ({"average": {"name": "ema", "start": 50}}, "average.start=50 leaves none of 50 steps"),
        ({"schedule": "plateau"}, "schedule=plateau follows the held-out loss, but evaluate.every=0"),
        ({"schedule": "plateau", "evaluate": {"every": 5}, "data": {"source": "x", "held_out": 0}}, "held_out=0"),
    ],
)
def test_what_would_never_happen_is_refused(sections, expected):
    with pytest.raises(PlanError) as error:
        plan_run(Config.parse({**LEAST, **sections}))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"average": "swa", "schedule": "cyclic"},
        {"average": {"name": "swa", "every": 10}},
        {"perturb": {**PERTURB, "at": "cycle"}, "schedule": "cosine_restarts"},
        {"perturb": {**PERTURB, "at": [10, 49]}},
        {"schedule": "plateau", "evaluate": {"every": 5}},
    ],
)
def test_what_goes_together(sections):
    plan_run(Config.parse({**LEAST, **sections}))
