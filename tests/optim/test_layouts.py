"""Every optimizer of the table under layouts: with the same gradients the same weights as in one process."""

import pytest
import torch

from optim.layouts import Trained, exchange_of, mesh_of
from optim.problem import SHAPES
from optim.test_conformance import options_of
from paceline.comm.mesh import Mesh
from paceline.config import Config
from paceline.errors import PlanError
from paceline.plan.run import plan_run
from paceline.registry import OPTIMIZERS
from tolerances import FP64_EQUAL

LAYOUTS = ({"shard": 2}, {"shard": 4}, {"tensor": 2}, {"shard": 2, "tensor": 2})
"""Of four shards some are empty."""
SEEING_ONE_PROCESS = {name for name in OPTIMIZERS if OPTIMIZERS.load(name).sees == "loss"}
UNDER_LAYOUTS = [name for name in OPTIMIZERS if name not in SEEING_ONE_PROCESS]
FIRST, LAST = 7, 14


def on_ranks(member, sizes, folder):
    """Each optimizer, saved after ``FIRST`` steps and trained on: boxes in the end, and bytes of state."""
    told = {}
    with mesh_of(member, sizes) as mesh:
        for name in UNDER_LAYOUTS:
            trained = Trained(options_of(name), mesh)
            trained.steps(0, FIRST)
            trained.save(f"{folder}/{name}", FIRST, exchange_of(member, name))
            trained.steps(FIRST, LAST)
            told[name] = (trained.boxes(), trained.state_bytes())
    return told


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda sizes: ",".join(f"{k}={v}" for k, v in sizes.items()))
def run(pool, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ranks = 1
    for size in request.param.values():
        ranks *= size
    return pool.run(on_ranks, ranks, request.param, str(folder)), folder


def alone(name):
    trained = Trained(options_of(name), Mesh.alone())
    trained.steps(0, LAST)
    return trained


@pytest.mark.parametrize("name", UNDER_LAYOUTS)
def test_the_layout_does_not_change_the_update(run, name):
    expected = dict(alone(name).replica.local)
    seen = {n: torch.zeros(shape, dtype=torch.bool) for n, shape in SHAPES.items()}
    for told in run[0]:
        for n, start, values in told[name][0]:
            window = tuple(slice(at, at + size) for at, size in zip(start, values.shape, strict=True))
            error = (values - expected[n].detach()[window]).norm() / expected[n].detach().norm()
            assert error <= FP64_EQUAL, f"{n} differs by {error:.1e}"
            seen[n][window] = True
    assert all(mask.all() for mask in seen.values())


@pytest.mark.parametrize("name", UNDER_LAYOUTS)
def test_what_ranks_saved_goes_on_in_one_process(run, name):
    resumed = Trained(options_of(name), Mesh.alone())
    resumed.restore(run[1] / name, FIRST)
    resumed.steps(FIRST, LAST)
    for n, expected in alone(name).replica.local.items():
        error = (resumed.replica.local[n] - expected).detach().norm() / expected.detach().norm()
        assert error <= FP64_EQUAL, f"{n} differs by {error:.1e}"


def config(name, **changes):
    tree = {
        "model": {"preset": "llama-5m"},
        "data": {"source": "unused"},
        "optimizer": name,
        "schedule": OPTIMIZERS.load(name).schedule or "constant",
        "train": {"steps": 1, "clip_norm": None},
    }
    return Config.parse({**tree, **changes})


@pytest.mark.parametrize("name", sorted(SEEING_ONE_PROCESS))
@pytest.mark.parametrize("axis", ["shard", "tensor", "pipeline", "context"])
def test_one_that_looks_at_the_loss_is_refused_where_a_model_is_cut(name, axis):
    plan_run(config(name, replicas=2))
    with pytest.raises(PlanError, match=rf"layout.{axis}=2: optimizer={name} looks at the loss .* Use replicas"):
        plan_run(config(name, layout={axis: 2}))
