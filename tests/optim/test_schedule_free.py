"""Schedule-free: what is evaluated, exported and saved is the average; the parameters are not."""

import pytest
import torch

from optim.layouts import Trained
from optim.problem import gradients, parameters, rate
from optim.references import schedule_free_adamw
from optim.test_layouts import config
from paceline.checkpoint import load
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.errors import ConfigError, PlanError
from paceline.optim.schedule_free_adamw import ScheduleFreeAdamW
from paceline.plan.run import plan_run
from paceline.registry import OPTIMIZERS
from paceline.train.replica import holding
from tolerances import FP64_EQUAL

OPTIONS = ScheduleFreeAdamW()
STEPS = 9


@pytest.fixture
def trained():
    trained = Trained(OPTIONS, Mesh.alone())
    trained.steps(0, STEPS)
    return trained


def averages():
    """By the authors' library, in its evaluation mode."""
    start = {n: p.detach().numpy() for n, p in parameters().items()}
    given = [{n: g.numpy() for n, g in gradients(step).items()} for step in range(STEPS)]
    rates = [OPTIONS.lr * rate(step) for step in range(STEPS)]
    made = schedule_free_adamw(OPTIONS, start, given, rates, finish=lambda optimizer: optimizer.eval())
    return {n: torch.from_numpy(w) for n, w in made.items()}


def test_the_model_is_evaluated_at_the_average_and_learns_on_where_it_was(trained):
    before = {n: p.detach().clone() for n, p in trained.replica.local.items()}
    with holding(trained.replica, trained.replica.averages()):
        for n, expected in averages().items():
            error = (trained.model.get_parameter(n) - expected).detach().norm() / expected.norm()
            assert error <= FP64_EQUAL, n
            assert not trained.model.get_parameter(n).equal(before[n]), n
    assert all(trained.replica.local[n].equal(w) for n, w in before.items())


def test_a_checkpoint_has_the_averages_as_its_weights(trained, tmp_path):
    trained.save(tmp_path, STEPS)
    with load(tmp_path, STEPS) as checkpoint:
        for n, expected in averages().items():
            saved = checkpoint.tensor(f"model/{n}")
            assert (saved - expected).norm() / expected.norm() <= FP64_EQUAL, n
            assert checkpoint.tensor(f"optimizer/{n}/iterate").equal(trained.replica.local[n].detach()), n


def test_a_model_that_has_not_learned_is_its_own_average():
    fresh = Trained(OPTIONS, Mesh.alone())
    assert all(value.equal(fresh.replica.local[n].detach()) for n, value in fresh.replica.averages().items())


def test_a_schedule_beside_it_is_refused():
    plan_run(config("schedule_free_adamw"))
    with pytest.raises(PlanError, match=r"schedule=cosine would do it again\. Use schedule=constant"):
        plan_run(config("schedule_free_adamw", schedule="cosine"))
    with pytest.raises(ConfigError, match="needs betas"):
        choose(OPTIMIZERS, {"name": "schedule_free_adamw", "betas": [0, 0.9]})


@pytest.mark.parametrize(("key", "value"), [("average", "ema"), ("perturb", {"at": [3], "shrink": 0.8, "noise": 0.1})])
def test_what_would_average_or_move_the_weights_beside_it_is_refused(key, value):
    with pytest.raises(PlanError, match=f"^{key}"):
        plan_run(config("schedule_free_adamw", **{key: value}))
